"""Steps on data as it is: sft, kd, seqkd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mskd.config.phases import (
    KdPhase,
)
from mskd.data.instructions import Example
from mskd.training.job import Job
from mskd.training.work.adaptive_share import RisingShare
from mskd.training.work.data_parallel import deal, stream
from mskd.training.work.microbatches import (
    Micro,
    Supervised,
    supervised,
)


class OnData:
    """Steps of an sft, kd or seqkd phase: examples (default: those of the data) in an order drawn anew each epoch."""

    share: RisingShare | None = None

    def __init__(self, job: Job, phase: Supervised, seed: int, examples: Sequence[Example] | None = None) -> None:
        self.job, self.phase, self.seed = job, phase, seed
        self.examples = job.data.train if examples is None else examples
        self.shown = "forward_kl" if isinstance(phase, KdPhase) else "nll"

    def work(self, step: int) -> list[Micro]:
        """This process's forwards of one optimizer step."""
        examples = deal(stream(self.examples, step, self.phase.batch_size, self.seed), self.job.accelerator)
        return supervised(self.job, self.phase, examples)

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Nothing: a step depends on its number and the weights alone."""
        return {}

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""
