"""Which way of the row op is the fastest at a size, from what was measured on the GPU once. Pure: any machine can ask.

    fastest(table, Size(2, 1, 50257, 2048), first="fused", among=("fused", "split", "torch"))

The ways: "fused", one Triton kernel for statistics and gradient; "split", one after the other; "torch".
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

MARGIN = 0.03  # another way than the plan's own must be faster by this much: what is not clear stays as it is


class Size(NamedTuple):
    """What decides a time: bytes of a logit, passes over a row for its value (1 or 2), and the logits' shape."""

    itemsize: int
    passes: int
    vocabulary: int
    tokens: int


class Timing(NamedTuple):
    """Microseconds of each way, from logits to statistics, losses and gradient; None where it was not timed."""

    size: Size
    torch: float
    split: float
    fused: float | None

    def of(self, way: str) -> float:
        """Infinite where the way was not timed."""
        found: float | None = getattr(self, way)
        return math.inf if found is None else found

    def row(self) -> list[float | None]:
        """As JSON holds it."""
        return [*self.size, self.torch, self.split, self.fused]


def timing_of(row: Sequence[float | None]) -> Timing:
    """The inverse of `Timing.row`. Raises TypeError or ValueError for what is no timing."""
    *size, torch, split, fused = row
    times = [None if x is None else float(x) for x in (torch, split, fused)]
    if len(size) != 4 or None in (*size, *times[:2]) or not all(x is None or 0 < x < math.inf for x in times):
        raise ValueError(f"no timing: {row}")
    return Timing(Size(*(int(x or 0) for x in size)), times[0] or 0.0, times[1] or 0.0, times[2])


# 16 bits, one pass and many tokens first: what training runs most, should the time for measuring not suffice.
SIZES = tuple(
    Size(itemsize, passes, vocabulary, tokens)
    for passes, itemsize, tokens, vocabulary in itertools.product(
        (1, 2), (2, 4), (4096, 512, 64), (50257, 151936, 262144, 4096)
    )
)


def fastest(table: Sequence[Timing], size: Size, first: str, among: Sequence[str]) -> str:
    """One of the ways `among`: `first` unless another was faster by MARGIN at the measured size that is nearest."""
    like = [timing for timing in table if timing.size[:2] == size[:2]]
    if not like:
        return first
    nearest = min(like, key=lambda timing: _distance(timing.size, size))
    best = min(among, key=nearest.of)
    return best if nearest.of(best) <= (1 - MARGIN) * nearest.of(first) else first


def _distance(a: Size, b: Size) -> float:
    """In powers of 2, over both dimensions."""
    pairs = ((a.vocabulary, b.vocabulary), (a.tokens, b.tokens))
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in pairs)
