"""Which sequences share a forward, and which share a row of it, so that at least 95 % of its tokens are real.

    forwards = cut(lengths, most=8, batching="bucket")   # lists of places: like lengths together, a row each
    rows = fill_rows(lengths)                            # lists of places: several sequences in one row

Both depend on the lengths alone: a run that goes on makes the same forwards again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mskd.config import Batching

REAL = 0.95  # least share of real tokens; the rest is padding


def cut(lengths: Sequence[int], most: int, batching: Batching) -> list[list[int]]:
    """The fewest forwards of at most `most` sequences each, as lists of places in `lengths`, longest sequences first.

    bucket: neighbours in order of length share a forward, and of all cuts into so many forwards it is the one with the
    least padding. pack: each forward gets long and short ones, so that all are about as big; see fill_rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if batching == "pack":
        forwards = -(-len(order) // most)
        return [order[i::forwards] for i in range(forwards)]
    return [order[a:b] for a, b in _buckets(np.array([lengths[i] for i in order], dtype=np.int64), most)]


def _buckets(lengths: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Spans of falling lengths [B]: the fewest in which, padded to the first of each, REAL of the tokens are real.

    best[j] is the least number of tokens, padding included, of the first j sequences in k spans; k grows by one a turn.
    """
    n = len(lengths)
    if not n:
        return []
    size = np.arange(n + 1)[None] - np.arange(n + 1)[:, None]  # of the span [i, j)
    too_many = 2 * n * int(lengths[0])  # more than any cut, and too many to be real to REAL
    tokens = np.where((size > 0) & (size <= most), size * np.append(lengths, 0)[:, None], too_many)
    best, cuts = np.where(np.arange(n + 1) == 0, 0, too_many), []
    while best[n] * REAL > lengths.sum():
        total = best[:, None] + tokens
        cuts.append(total.argmin(0))
        best = total.min(0)
    spans, end = [], n
    for begin in reversed(cuts):
        spans.append((int(begin[end]), end))
        end = int(begin[end])
    return spans[::-1]


def fill_rows(lengths: Sequence[int], *, most: int | None = None) -> list[list[int]]:
    """Rows of several sequences each, as lists of places in `lengths`: the most rows that are full to REAL.

    Rows are as wide as the fullest one; attention costs less the more there are. `most`: at most so many rows. Longest
    sequence first into the emptiest row (Graham 1969, LPT).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for count in range(min(most or len(order), len(order)), 0, -1):
        rows: list[list[int]] = [[] for _ in range(count)]
        used = [0] * count
        for i in order:
            row = used.index(min(used))
            rows[row].append(i)
            used[row] += lengths[i]
        if sum(used) >= REAL * count * max(used):
            return rows
    return []
