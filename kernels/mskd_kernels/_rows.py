"""The row op's three calls - `statistics`, `gradient`, `fused` - and which of `_torch_rows`, `_triton_rows` does them.

Formulas: `_row_op`. Neither way ever synchronises with the host on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from mskd_kernels import _torch_rows
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._row_op import COLUMNS, Coefficients, Objective, RowOp, evaluate, in_effect


def statistics(op: RowOp, s: Tensor, t: Tensor | None, tokens: Tensor | None, live: Tensor | None = None) -> Tensor:
    """Raw logits s, t [N, V] (any row stride), tokens int64 [N], live bool [N] -> statistics [N, COLUMNS].

    Rows that are not live are never read and hold zeros.
    """
    out = torch.zeros(s.shape[0], COLUMNS, dtype=accumulate_dtype(s, t), device=s.device)
    if s.shape[0]:
        _path(op).statistics(op, s, t, tokens, live, out)
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
    _path(op).gradient(op, s, t, tokens, stats, in_effect(coefficients, stats, live), out)


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
    if s.shape[0] == 0 or not _path(op).fuses(op, s, t):
        return in_steps(op, s, t, tokens, objective, out, live)
    return _path(op).fused(op, s, t, tokens, objective, out, live)


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


def _path(op: RowOp) -> Any:
    """The module that does the work."""
    if op.backend == "triton":
        from mskd_kernels import _triton_rows  # where it is used: triton may be missing

        return _triton_rows
    return _torch_rows
