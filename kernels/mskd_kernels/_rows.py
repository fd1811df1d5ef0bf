"""The row op's three calls - `statistics`, `gradient`, `fused` - and which of `_torch_rows`, `_triton_rows` does them.

Formulas: `_row_op`. Neither way ever synchronises with the host on a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mskd_kernels import _torch_rows
from mskd_kernels._backend import automatic
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._row_op import COLUMNS, Coefficients, Objective, RowOp, evaluate, in_effect
from mskd_kernels.proof.cases import covers, subject_of
from mskd_kernels.proof.timings import Size, fastest


def statistics(op: RowOp, s: Tensor, t: Tensor | None, tokens: Tensor | None, live: Tensor | None = None) -> Tensor:
    """Raw logits s, t [N, V] (any row stride), tokens int64 [N], live bool [N] -> statistics [N, COLUMNS].

    Rows that are not live are never read and hold zeros.
    """
    out = torch.zeros(s.shape[0], COLUMNS, dtype=accumulate_dtype(s, t), device=s.device)
    if s.shape[0]:
        _path(_way(op, s, t, ("split", "torch"))).statistics(op, s, t, tokens, live, out)
    return out


def gradient(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    stats: Tensor,
    coefficients: Coefficients,
    out: Tensor,
    live: Tensor | None = None,
) -> None:
    """Writes the gradient in the raw student logits to `out` [N, V], which may be `s` itself.

    A token whose value is +inf gets a gradient of 0, and so does one whose coefficients are all 0.
    """
    if s.shape[0] == 0 or all(c is None for c in coefficients):
        out.zero_()
        return
    path = _path(_way(op, s, t, ("split", "torch")))
    path.gradient(op, s, t, tokens, stats, in_effect(coefficients, stats, live), out)


def fused(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    objective: Objective,
    out: Tensor,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [N, COLUMNS], losses [N], clip flags [N]; the gradient of the losses' sum over the divisor to `out`.

    `out` [N, V] may be `s` itself. Rows that are not live have zeros everywhere. The same as `in_steps`, in one go
    where that can be.
    """
    ways = ("split", "torch") if objective.weights is not None else ("fused", "split", "torch")  # it knows no weights
    way = _way(op, s, t, ways) if s.shape[0] else "split"
    if way == "split":
        return in_steps(replace(op, backend="triton"), s, t, tokens, objective, out, live)
    return _path(way).fused(op, s, t, tokens, objective, out, live)


def in_steps(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    objective: Objective,
    out: Tensor,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused` by its parts: `statistics`, `evaluate` and `gradient`, one after the other."""
    stats = statistics(op, s, t, tokens, live)
    losses, clipped, coefficients = evaluate(objective, stats)
    if live is not None:
        losses, clipped = losses.masked_fill(~live, 0.0), clipped & live
    gradient(op, s, t, tokens, stats, coefficients, out, live)
    return stats, losses, clipped


def scales(backend: str, x: Tensor) -> bool:
    """Whether `scale` is there for x."""
    return backend == "triton" or (backend == "auto" and x.is_cuda and covers(x) and automatic(x.device).passed)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor [] in Triton, x contiguous, in place; where the factor is 1, nothing is read or written."""
    return _path("split").scale(x, factor)


def _way(op: RowOp, s: Tensor, t: Tensor | None, among: Sequence[str]) -> str:
    """One of the ways `among` ("fused", "split", "torch"): as the backend asks, or as the GPU's proof has measured."""
    if op.backend == "torch" or (op.backend == "auto" and not s.is_cuda):
        return "torch"
    proof = automatic(s.device, subject_of(op, s, t)) if op.backend == "auto" else None
    if proof is not None and not proof.passed:
        return "torch"
    first = "fused" if "fused" in among and _path("fused").fuses(op, s, t) else "split"
    if proof is None:
        return first
    passes = 2 if op.kind is not None and op.kind.expectation is None else 1
    return fastest(proof.table, Size(s.element_size(), passes, s.shape[1], s.shape[0]), first, among)


def _path(way: str) -> Any:
    """The module that does the work."""
    if way == "torch":
        return _torch_rows
    from mskd_kernels import _triton_rows  # where it is used: triton may be missing

    return _triton_rows
