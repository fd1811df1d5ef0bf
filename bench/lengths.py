"""Answers whose lengths are given, by one rule for every sampler: models with random weights hardly ever end one.

    answers = Answers(prompts, lengths, end=vocabulary - 1)
    rollout = answers.sample(student, teacher, prompts, ...)           # mskd.sampling.rollout.sample, same arguments
    ids = model.generate(..., logits_processor=answers.processors(prompts))

The end token is the vocabulary's last. Token L of an answer of length L is the end token, no token before it is; no
sampler knows L beforehand. transformers is told by its scores. mskd draws by the inverse of the cumulative distribution
with one random number for each (sequence, position), so its random numbers tell it: almost 1 draws the last token, and
the others are kept below MOST, which leaves out the last tokens of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mskd.sampling import rollout
from mskd.sampling.draw import signed, uniforms

MOST = 0.98  # a random number that ends nothing; the end token has less than the rest of the mass
LEAST = -1e4  # score of a token that must not come; finite, as users of scores look for infinities


def uniform(count: int, bounds: tuple[int, int], seed: int) -> list[int]:
    """So many whole numbers, uniform between two bounds, both included; the same for the same seed."""
    draw = random.Random(seed)
    return [draw.randint(*bounds) for _ in range(count)]


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Different prompts of random tokens, none of them the end token."""
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(vocabulary - 1) for _ in range(length)) for length in lengths]
    assert len(set(prompts)) == len(prompts)
    return prompts


class Answers:
    """The length of the answer to each of the given, different prompts; a response includes its end token."""

    def __init__(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], end: int) -> None:
        self.lengths = {tuple(p): n for p, n in zip(prompts, lengths, strict=True)}
        self.end = end

    def of(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        return [self.lengths[tuple(p)] for p in prompts]

    def sample(self, student: Any, teacher: Any, prompts: Sequence[Sequence[int]], **options: Any) -> rollout.Rollout:
        """`mskd.sampling.rollout.sample` with answers of these lengths. Raises ValueError where they are not."""
        last = {signed(i): n - 1 for i, n in zip(options["sequence_ids"], self.of(prompts), strict=True)}
        with mock.patch.object(rollout, "uniforms", _ending(last, options["mix_alpha"])):
            found = rollout.sample(student, teacher, prompts, **options)
        self.check(prompts, found.responses())
        return found

    def processors(self, prompts: Sequence[Sequence[int]]) -> LogitsProcessorList:
        """For transformers' `generate` of these prompts, left-padded, in this order."""
        return LogitsProcessorList([_Ends(self.of(prompts), self.end)])

    def check(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """ValueError unless each response has its length, ends with the end token and holds no other."""
        for want, response in zip(self.of(prompts), responses, strict=True):
            ends = [i + 1 for i, token in enumerate(response) if token == self.end]
            if len(response) != want or ends != [want]:
                raise ValueError(f"an answer of {want} tokens came with {len(response)}, end tokens at {ends}")


def _ending(last: dict[int, int], alpha: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """mskd.sampling.draw.uniforms, with almost 1 at the last position of each sequence.

    Of the numbers below alpha, which may draw the teacher's tokens, and of those above it, the lower part MOST is used.
    """

    def ending(seed: int, sequence_ids: Tensor, positions: Tensor) -> Tensor:
        ends = torch.tensor([last[i] for i in sequence_ids.flatten().tolist()], device=sequence_ids.device)
        u = uniforms(seed, sequence_ids, positions)
        u = torch.where(u < alpha, MOST * u, alpha + MOST * (u - alpha))
        return u.masked_fill(positions == ends.view(sequence_ids.shape), 1 - 2.0**-53)

    return ending


class _Ends(LogitsProcessor):
    """Scores that leave the end token alone at the last position of a row, and everywhere else all but it."""

    def __init__(self, lengths: Sequence[int], end: int) -> None:
        self.lengths, self.end, self.width = torch.tensor(lengths), end, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.width is None:  # of the prompts: this is the first token
            self.width = input_ids.shape[1]
        scores[:, self.end] = LEAST
        now = self.lengths.to(scores.device) == input_ids.shape[1] - self.width + 1
        scores[now] = LEAST
        scores[now, self.end] = 0.0
        return scores
