"""The student's share of a round's responses where it follows the validation loss, as phases.AdaptiveShare says.

    share = RisingShare(phase.adaptive_share, phase.student_share)
    share.observe(loss)             # after every validation; the first one is before the phase's first step
    share.value                     # in force

After the adaptive scheduler of DistiLLM, Ko et al., ICML 2024.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mskd.config.phases import AdaptiveShare


class RisingShare:
    """A share that starts at `start`, rises with validation losses, and never falls."""

    def __init__(self, rule: AdaptiveShare, start: float) -> None:
        self.rule, self.value = rule, start
        self.reference: float | None = None  # the loss that the next ones are compared with

    def observe(self, loss: float) -> None:
        """Take note of a validation loss, in nats a token. One that is not a number changes nothing."""
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.rule.margin:
            self.value = min(round(self.value + self.rule.step, 9), 1.0)  # ten steps of 0.1 are 1
            self.reference = loss

    def state(self) -> dict[str, torch.Tensor]:
        """Value and reference, float64; nothing before the first validation."""
        if self.reference is None:
            return {}
        return {"student_share": torch.tensor([self.value, self.reference], dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        if "student_share" in tensors:
            self.value, self.reference = tensors["student_share"].tolist()
