"""The row op in torch: some rows at a time, in place, no graph. Any device; formulas: `_rows`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mskd_kernels._rows import (
    CENTER,
    COLUMNS,
    ENTROPY,
    FRAME,
    LOGPROB,
    LSE,
    TEACHER_FRAME,
    TEACHER_LOGPROB,
    TEACHER_LSE,
    VALUE,
    Coefficients,
    Divergence,
    RowOp,
    Side,
)

# Elements of one row block. Smaller blocks stay in cache, but every op ends in a barrier of its threads. A loss at
# N=512, V=49152 on two idle cores: 0.6 s with blocks of 1.6 million, 0.66 with these, 0.85 with 13 million; beside
# other work 2.3 to 3.9, 2 to 2.6 and 1.8 s; with 0.4 million it was 12 s there.
_CPU_BLOCK = 3_200_000
_GPU_BLOCK = 16 * 1024**2
_LEAST = -1e30  # the logarithm of a mass of 0 in the terms: finite, so that 0 * log 0 is 0


def statistics(op: RowOp, s: Tensor, t: Tensor | None, tokens: Tensor | None, live: Tensor | None, out: Tensor) -> None:
    """Fills `out` [N, COLUMNS], zeros on entry, for the rows that are live. N > 0."""
    work = _workspace(s, out.dtype)
    for rows, count in _blocks(s, live):
        out[rows] = _block_statistics(op, s, t, tokens, live, rows, work[:, :count])


def gradient(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    stats: Tensor,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    """Writes the gradient in the raw student logits to `out` [N, V], N > 0; rows with coefficients 0 are not read."""
    live = torch.stack([c != 0 for c in coefficients if c is not None]).any(0)
    if s.device.type == "cpu":
        out[~live] = 0
    work = _workspace(s, stats.dtype)
    for rows, count in _blocks(s, live):
        grad = _block_gradient(op, s, t, tokens, live, rows, stats, coefficients, work[:, :count])
        out[rows] = grad.to(out.dtype)


def _block_rows(s: Tensor) -> int:
    return max(1, (_CPU_BLOCK if s.device.type == "cpu" else _GPU_BLOCK) // s.shape[1])


def _blocks(s: Tensor, live: Tensor | None) -> Iterator[tuple[slice | Tensor, int]]:
    """Row blocks and their sizes: slices, or on the CPU indices of live rows (on a GPU counting them synchronises)."""
    size = _block_rows(s)
    if live is not None and s.device.type == "cpu":
        yield from ((rows, len(rows)) for rows in live.nonzero().squeeze(1).split(size) if len(rows))
    else:
        yield from ((slice(i, i + size), min(size, s.shape[0] - i)) for i in range(0, s.shape[0], size))


def _workspace(s: Tensor, dtype: torch.dtype) -> Tensor:
    """Four buffers [rows, V], used again by every block: fresh memory costs as much as the arithmetic."""
    return torch.empty(4, min(_block_rows(s), s.shape[0]), s.shape[1], dtype=dtype, device=s.device)


def _load(z: Tensor, rows: slice | Tensor, live: Tensor | None, buffer: Tensor, side: Side) -> Tensor:
    """Soft-capped logits of some rows, in the buffer; those of rows that are not live are of zeros."""
    x = buffer.copy_(z[rows])
    if live is not None and isinstance(rows, slice):
        x.masked_fill_(~live[rows, None], 0.0)
    return x if side.softcap is None else x.mul_(side.scale / side.softcap).tanh_().mul_(side.softcap)


def _enter_frame(x: Tensor, frame: Tensor, side: Side, temperature: float) -> Tensor:
    factor = (1.0 if side.softcap is not None else side.scale) / temperature  # a soft-cap has the scale inside
    x.sub_(frame)
    return x if factor == 1.0 else x.mul_(factor)


def _framed(x: Tensor, e: Tensor, side: Side, temperature: float) -> tuple[Tensor, Tensor]:
    """Capped logits x -> framed logits in x, their exp in e; returns sum of e and frame (row maximum), both [n, 1]."""
    frame = x.amax(1, keepdim=True)
    frame = frame.masked_fill_(frame == -torch.inf, 0.0)  # a row of -inf: -inf - -inf is NaN
    torch.exp(_enter_frame(x, frame, side, temperature), out=e)
    return e.sum(1, keepdim=True), frame


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """x[i, tokens[i]]; NaN where the token is outside (on a GPU nobody has looked)."""
    inside = (tokens >= 0) & (tokens < x.shape[1])
    return x.gather(1, tokens.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1).masked_fill(~inside, torch.nan)


def _block_statistics(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    live: Tensor | None,
    rows: slice | Tensor,
    work: Tensor,
) -> Tensor:
    x, e, u, w = work
    stats = work.new_zeros(x.shape[0], COLUMNS)
    token = None if tokens is None else tokens[rows]
    d, frame = _framed(_load(s, rows, live, x, op.student), e, op.student, op.temperature)
    stats[:, FRAME], stats[:, LSE] = frame[:, 0], d[:, 0].log()
    if token is not None:
        stats[:, LOGPROB] = _gather(x, token) - stats[:, LSE]
    if op.entropy:
        mean = torch.mul(e, x, out=u).sum(1)
        if _suspect(mean):  # 0 * -inf
            mean = torch.mul(e, x.masked_fill(x == -torch.inf, 0.0), out=u).sum(1)
        stats[:, ENTROPY] = stats[:, LSE] - mean / d[:, 0]
    if t is not None and op.kind is not None:
        dt, frame = _framed(_load(t, rows, live, u, op.teacher), w, op.teacher, op.temperature)
        stats[:, TEACHER_FRAME], stats[:, TEACHER_LSE] = frame[:, 0], dt[:, 0].log()
        if token is not None:
            stats[:, TEACHER_LOGPROB] = _gather(u, token) - stats[:, TEACHER_LSE]
        if op.kind.expectation is None:
            x.sub_(stats[:, LSE, None]).clamp_(min=_LEAST)
            u.sub_(stats[:, TEACHER_LSE, None]).clamp_(min=_LEAST)
            value, slope = op.kind.terms(x, u, torch.exp(x, out=e), op.kind.beta)
            stats[:, VALUE], stats[:, CENTER] = value.sum(1), slope.sum(1)
        else:
            stats[:, VALUE] = _expectation(op.kind, x, e, d, u, w, dt, stats)
            stats[:, CENTER] = stats[:, VALUE] if op.kind.expectation == "student" else 0.0
    return stats if live is None else stats.masked_fill_(~live[rows, None], 0.0)


def _expectation(
    kind: Divergence, x: Tensor, e: Tensor, d: Tensor, u: Tensor, w: Tensor, dt: Tensor, stats: Tensor
) -> Tensor:
    shift = stats[:, LSE] - stats[:, TEACHER_LSE]
    if kind.expectation == "student":
        expected = _expected_difference(e, d, x, u, work=w)
    else:
        expected, shift = _expected_difference(w, dt, u, x, work=e), -shift
    return (expected - shift).masked_fill(expected == torch.inf, torch.inf)


def _expected_difference(e: Tensor, d: Tensor, a: Tensor, b: Tensor, work: Tensor) -> Tensor:
    """sum_v e/d (a - b), e = exp(a). a = -inf counts 0, b = -inf alone gives +inf. Overwrites b and work."""
    difference = torch.sub(a, b, out=b)
    total = torch.mul(e, difference, out=work).sum(1)
    if _suspect(total):
        infinite = difference == torch.inf
        total = torch.mul(e, difference.masked_fill_(infinite | (a == -torch.inf), 0.0), out=work).sum(1)
        total = total.masked_fill(infinite.any(1), torch.inf)
    return total / d[:, 0]


def _suspect(total: Tensor) -> bool:
    """Whether -inf may be among the logits. On a GPU asking would synchronise: always yes."""
    return total.device.type != "cpu" or not bool(total.isfinite().all())


def _block_gradient(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    live: Tensor | None,
    rows: slice | Tensor,
    stats: Tensor,
    coefficients: Coefficients,
    work: Tensor,
) -> Tensor:
    stats = stats[rows, :, None]
    gk, gy, gh = (None if c is None else c[rows, None] for c in coefficients)
    x, q, u, cap_slope = work
    x = _load(s, rows, live, x, op.student)
    if op.student.softcap is not None:
        torch.div(x, op.student.softcap, out=cap_slope).square_().neg_().add_(1)
    x = _enter_frame(x, stats[:, FRAME], op.student, op.temperature).sub_(stats[:, LSE]).clamp_(min=_LEAST)  # log q
    torch.exp(x, out=q)
    factor = torch.zeros_like(stats[:, VALUE])  # of q: everything that does not depend on v
    if gk is not None:
        factor = factor - gk * stats[:, CENTER]
    if gy is not None:
        factor = factor - gy
    if gh is not None:
        factor = factor - gh * stats[:, ENTROPY]
    if gk is not None and t is not None and op.kind is not None:
        u = _load(t, rows, live, u, op.teacher)
        u = _enter_frame(u, stats[:, TEACHER_FRAME], op.teacher, op.temperature).sub_(stats[:, TEACHER_LSE])  # log p
        grad = op.kind.terms(x, u.clamp_(min=_LEAST), q, op.kind.beta)[1].mul_(gk)
        grad.addcmul_(q, factor if gh is None else factor - gh * x)
    else:
        grad = q.mul_(factor if gh is None else factor - gh * x)
    if live is not None and isinstance(rows, slice):
        grad.masked_fill_(~live[rows, None], 0.0)
    if gy is not None and tokens is not None:
        grad.scatter_add_(1, tokens[rows, None].clamp(0, grad.shape[1] - 1), gy)
    if op.student.softcap is not None:
        grad.mul_(cap_slope)
    factor_z = 1.0 / op.temperature * op.student.scale
    return grad if factor_z == 1.0 else grad.mul_(factor_z)
