"""A frozen teacher's hidden states, kept while a round of samples is trained on.

states = HiddenStates(rollout.response_lengths.tolist(), budget=2 * 2**30)
states.put([0, 1], hidden)          # [n, H] of sequences 0 and 1
states.get([1])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HiddenStates:
    """The teacher's hidden states at the response tokens of a round, by sequence, in the dtype that it computed.

    They stay on its device up to `budget` bytes; more lie in pinned host memory, from which a copy to a GPU does not
    wait. lengths: response tokens of every sequence.
    """

    def __init__(self, lengths: list[int], budget: int) -> None:
        self.lengths, self.budget = lengths, budget
        self.parts: Sequence[torch.Tensor] = ()

    def put(self, places: Sequence[int], hidden: torch.Tensor) -> None:
        """Keep the states [n, H] of the sequences at `places`."""
        if not self.parts:
            self.device = hidden.device
            self.parts = self._room(hidden).split(self.lengths)
        for i, part in zip(places, hidden.split([self.lengths[i] for i in places]), strict=True):
            self.parts[i].copy_(part, non_blocking=True)

    def get(self, places: Sequence[int]) -> torch.Tensor:
        """The states [n, H] of the sequences at `places`, on the teacher's device."""
        return torch.cat([self.parts[i].to(self.device, non_blocking=True) for i in places])

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        shape = sum(self.lengths), like.shape[1]
        if like.is_cuda and shape[0] * shape[1] * like.element_size() > self.budget:
            return torch.empty(shape, dtype=like.dtype, pin_memory=True)
        return like.new_empty(shape)
