"""Responses that the student gave in earlier rounds, to be trained on again, as phases.Replay says.

    buffer = ReplayBuffer(phase.replay, steps, seed)
    buffer.fresh(step)                        # share of the student's responses that it gives anew
    buffer.draw(number, places)               # the buffer's at these places of round `number`: {place: Example}
    buffer.put(examples)                      # of the whole round, at its end

After the replay buffer of DistiLLM, Ko et al., ICML 2024. Every process holds all of it, so that it gives the same
sequences for any number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch

from mskd.config.phases import Replay
from mskd.data.instructions import Example, order
from mskd.store import checkpoint
from mskd.store.hashes import stream_seed


class ReplayBuffer:
    """The newest responses of a phase. steps: all of the phase."""

    def __init__(self, settings: Replay, steps: int, seed: int) -> None:
        self.settings, self.steps = settings, steps
        self.seed = stream_seed(seed, "replay")
        self.kept: deque[Example] = deque(maxlen=settings.capacity)

    def fresh(self, step: int) -> float:
        """Share of the student's responses in a step (from 0) that it gives anew: all until the buffer is full."""
        if len(self.kept) < self.settings.capacity:
            return 1.0
        done = (step + 1) / self.steps
        return {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.settings.fresh]

    def draw(self, number: int, places: Sequence[int]) -> dict[int, Example]:
        """A response of the buffer for each of these places, all different; drawn by (seed, number of the round)."""
        drawn = order(len(self.kept), number, self.seed)
        return {place: self.kept[i] for place, i in zip(places, drawn, strict=False)}

    def put(self, examples: Iterable[Example]) -> None:
        """Take in new responses; the oldest leave."""
        self.kept.extend(examples)

    def state(self) -> dict[str, torch.Tensor]:
        """Prompts and responses; nothing where the buffer is empty."""
        if not self.kept:
            return {}
        parts = {"prompts": [e.prompt_ids for e in self.kept], "responses": [e.response_ids for e in self.kept]}
        packed = {part: checkpoint.pack_sequences(sequences) for part, sequences in parts.items()}
        return {f"replay.{part}.{k}": v for part, tensors in packed.items() for k, v in tensors.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        if "replay.prompts.ids" not in tensors:
            return
        parts = [{k: tensors[f"replay.{part}.{k}"] for k in ("ids", "lengths")} for part in ("prompts", "responses")]
        prompts, responses = (map(tuple, checkpoint.unpack_sequences(part)) for part in parts)
        self.kept.extend(Example("", p, r, ()) for p, r in zip(prompts, responses, strict=True))
