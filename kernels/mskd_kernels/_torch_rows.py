"""The row op in torch: some rows at a time, in place, no graph. Any device; formulas: `_row_op`.

Each block of rows leaves its statistics and two buffers, a slope and a mass, from which w - q c follows row by row;
so the gradient of a block that is still in cache costs two passes and no exponential.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._row_op import (
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
    Objective,
    RowOp,
    Side,
    evaluate,
    in_effect,
)

# Elements of one row block. Smaller blocks stay in cache, but every op ends in a barrier of its threads, which other
# work on the machine delays. `fused` at N=256, V=50257 on two idle cores, blocks of 0.2, 0.4, 0.8, 1.6 and 3.2 million:
# 59, 45, 39, 36 and 50 ms (autograd: 149); beside other work a loss cost 12 s with 0.4 million and 2 to 4 with more.
_CPU_BLOCK = 1_600_000
_GPU_BLOCK = 16 * 1024**2
_LEAST = -1e30  # the logarithm of a mass of 0 in the terms: finite, so that 0 * log 0 is 0


class _Block(NamedTuple):
    """Some rows of the inputs, raw logits [n, V], with buffers [4, n, V] in the dtype that sums are made in."""

    op: RowOp
    s: Tensor
    t: Tensor | None
    tokens: Tensor | None
    dead: Tensor | None  # [n, 1] bool: rows that must not count, whatever they hold
    work: Tensor


class _Slope(NamedTuple):
    """w - q c = scale * slope - center * mass_scale * mass; the vectors are [n, 1]. No slope: there is no teacher."""

    mass: Tensor
    mass_scale: Tensor
    slope: Tensor | None = None
    scale: Tensor | float = 1.0
    center: Tensor | float = 0.0


def statistics(op: RowOp, s: Tensor, t: Tensor | None, tokens: Tensor | None, live: Tensor | None, out: Tensor) -> None:
    """Fills `out` [N, COLUMNS], zeros on entry, for the rows that are live. N > 0."""
    for rows, block in _blocks(op, s, t, tokens, live):
        out[rows] = _block_statistics(block)[0]


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
    _clear(out, live)
    teacher = None if coefficients.value is None else t
    for rows, block in _blocks(op, s, teacher, tokens, live):
        slope, logprobs = _block_slope(block, stats[rows, :, None])
        some = Coefficients(*(None if c is None else c[rows, None] for c in coefficients))
        extra = None if some.entropy is None else some.entropy * (logprobs + stats[rows, ENTROPY, None])
        _write_gradient(block, slope, some, extra, out, rows)


def fused(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    objective: Objective,
    out: Tensor,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [N, COLUMNS], losses [N], clip flags [N]; the gradient goes to `out`, which may be `s`."""
    stats = torch.zeros(s.shape[0], COLUMNS, dtype=accumulate_dtype(s, t), device=s.device)
    losses, clipped = torch.zeros_like(stats[:, 0]), torch.zeros_like(stats[:, 0], dtype=torch.bool)
    _clear(out, live)
    for rows, block in _blocks(op, s, t, tokens, live):
        stats[rows], slope = _block_statistics(block)
        losses[rows], clipped[rows], coefficients = evaluate(objective.at(rows), stats[rows])
        coefficients = in_effect(coefficients, stats[rows], None if block.dead is None else ~block.dead[:, 0])
        some = Coefficients(*(None if c is None else c[:, None] for c in coefficients))
        _write_gradient(block, slope, some, None, out, rows)
    if live is not None:
        losses, clipped = losses.masked_fill_(~live, 0.0), clipped.logical_and_(live)
    return stats, losses, clipped


# Blocks of rows -------------------------------------------------------------------------------------------------------


def _blocks(
    op: RowOp, s: Tensor, t: Tensor | None, tokens: Tensor | None, live: Tensor | None
) -> Iterator[tuple[slice | Tensor, _Block]]:
    """All blocks with their rows: slices, or on the CPU indices of live rows (on a GPU counting them synchronises).

    The buffers are the same for every block: fresh memory costs as much as the arithmetic.
    """
    cpu = s.device.type == "cpu"
    size = min(s.shape[0], max(1, (_CPU_BLOCK if cpu else _GPU_BLOCK) // s.shape[1]))
    work = torch.empty(4, size, s.shape[1], dtype=accumulate_dtype(s, t), device=s.device) if size else s
    every: Iterator[slice | Tensor] = (slice(i, min(i + size, s.shape[0])) for i in range(0, s.shape[0], size or 1))
    if live is not None and cpu:
        every = (rows for rows in live.nonzero().squeeze(1).split(size) if len(rows))
    for rows in every:
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        dead = None if live is None or cpu else ~live[rows, None]
        teacher, token = (None if x is None else x[rows] for x in (t, tokens))
        yield rows, _Block(op, s[rows], teacher, token, dead, work[:, :count])


def _clear(out: Tensor, live: Tensor | None) -> None:
    if live is not None and out.device.type == "cpu":
        out[~live] = 0


def _logits(z: Tensor, side: Side, dead: Tensor | None, buffer: Tensor) -> Tensor:
    """Soft-capped logits: in the buffer, or the raw ones where that is the same; zeros in dead rows."""
    if z.dtype == buffer.dtype and dead is None and side.softcap is None:
        return z
    x = buffer.copy_(z)
    if dead is not None:
        x.masked_fill_(dead, 0.0)
    return x if side.softcap is None else x.mul_(side.scale / side.softcap).tanh_().mul_(side.softcap)


def _enter_frame(x: Tensor, frame: Tensor, op: RowOp, side: Side, buffer: Tensor) -> Tensor:
    x = torch.sub(x, frame, out=buffer)
    factor = (1.0 if side.softcap is not None else side.scale) / op.temperature  # a soft-cap has the scale inside
    return x if factor == 1.0 else x.mul_(factor)


# Statistics -----------------------------------------------------------------------------------------------------------


def _block_statistics(block: _Block) -> tuple[Tensor, _Slope]:
    op, token = block.op, block.tokens
    x, e, u, w = block.work
    stats = x.new_zeros(x.shape[0], COLUMNS)
    frame, d = _exponentials(block.s, block, op.student, x, e)
    stats[:, FRAME], stats[:, LSE] = frame[:, 0], d[:, 0].log()
    if token is not None:
        stats[:, LOGPROB] = _gather(x, token) - stats[:, LSE]
    if op.entropy:
        stats[:, ENTROPY] = stats[:, LSE] - _mean(e, d, x, out=u)[0]
    slope = _Slope(e, 1 / d)
    if block.t is not None and op.kind is not None:
        frame, dt = _exponentials(block.t, block, op.teacher, u, w)
        stats[:, TEACHER_FRAME], stats[:, TEACHER_LSE] = frame[:, 0], dt[:, 0].log()
        if token is not None:
            stats[:, TEACHER_LOGPROB] = _gather(u, token) - stats[:, TEACHER_LSE]
        one_pass = op.kind.expectation is not None
        slope = _one_pass(op.kind, block.work, d, dt, stats) if one_pass else _two_passes(op.kind, block.work, stats)
    return stats if block.dead is None else stats.masked_fill_(block.dead, 0.0), slope


def _exponentials(z: Tensor, block: _Block, side: Side, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Framed logits to x, their exp to e; returns the frame (the maximum) and the sum of e, each [n, 1]."""
    logits = _logits(z, side, block.dead, x)
    frame = logits.amax(1, keepdim=True)
    frame = frame.masked_fill_(frame == -torch.inf, 0.0)  # a row of -inf: -inf - -inf is NaN
    torch.exp(_enter_frame(logits, frame, block.op, side, x), out=e)
    return frame, e.sum(1, keepdim=True)


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """x[i, tokens[i]]; NaN where the token is outside (on a GPU nobody has looked)."""
    inside = (tokens >= 0) & (tokens < x.shape[1])
    return x.gather(1, tokens.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1).masked_fill(~inside, torch.nan)


def _mean(e: Tensor, d: Tensor, values: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v e / d values and whether one of them is +inf, both [n]; infinite ones count 0. `out` gets e values."""
    total = torch.mul(e, values, out=out).sum(1)
    infinite = torch.zeros_like(total, dtype=torch.bool)
    if total.device.type != "cpu" or not bool(total.isfinite().all()):  # on a GPU asking would synchronise
        infinite = (values == torch.inf).any(1)
        total = torch.mul(e, values.masked_fill(~values.isfinite(), 0.0), out=out).sum(1)
    return total / d[:, 0], infinite


def _one_pass(kind: Divergence, work: Tensor, d: Tensor, dt: Tensor, stats: Tensor) -> _Slope:
    """A KL is the mean of a difference of logits, less the difference of Ls and Lt."""
    x, e, u, w = work
    shift = (d / dt).log()[:, 0]  # Ls - Lt, without the rounding of either
    if kind.expectation == "student":
        mean, infinite = _mean(e, d, torch.sub(x, u, out=u), out=w)
        value = (mean - shift).masked_fill_(infinite, torch.inf)
        stats[:, CENTER] = value
        slope = _Slope(e, 1 / d, w, 1 / d, mean[:, None])
    else:
        mean, infinite = _mean(w, dt, torch.sub(u, x, out=x), out=u)
        value = (mean + shift).masked_fill_(infinite, torch.inf)
        slope = _Slope(e, 1 / d, w, -1 / dt, -1.0)
    stats[:, VALUE] = value
    return slope


def _two_passes(kind: Divergence, work: Tensor, stats: Tensor) -> _Slope:
    """Any kind, from log q and log p."""
    x, e, u, _ = work
    _to_logprobs(x, stats[:, LSE, None])
    _to_logprobs(u, stats[:, TEACHER_LSE, None])
    terms, slope = kind.terms(x, u, torch.exp(x, out=e), kind.beta)
    stats[:, VALUE], stats[:, CENTER] = terms.sum(1), slope.sum(1)
    return _Slope(e, torch.ones_like(stats[:, :1]), slope, 1.0, stats[:, CENTER, None])


def _to_logprobs(x: Tensor, lse: Tensor) -> Tensor:
    return x.sub_(lse).clamp_(min=_LEAST)


# Gradient -------------------------------------------------------------------------------------------------------------


def _block_slope(block: _Block, stats: Tensor) -> tuple[_Slope, Tensor]:
    """The slope from statistics [n, COLUMNS, 1] that are known, and log q, which stays in the first buffer."""
    op = block.op
    x, e, u, _ = block.work
    x = _enter_frame(_logits(block.s, op.student, block.dead, x), stats[:, FRAME], op, op.student, x)
    mass = torch.exp(_to_logprobs(x, stats[:, LSE]), out=e)
    scale = torch.ones_like(stats[:, FRAME])
    if block.t is None or op.kind is None:
        return _Slope(mass, scale), x
    u = _enter_frame(_logits(block.t, op.teacher, block.dead, u), stats[:, TEACHER_FRAME], op, op.teacher, u)
    slope = op.kind.terms(x, _to_logprobs(u, stats[:, TEACHER_LSE]), mass, op.kind.beta)[1]
    return _Slope(mass, scale, slope, 1.0, stats[:, CENTER]), x


def _write_gradient(
    block: _Block,
    slope: _Slope,
    coefficients: Coefficients,
    extra: Tensor | None,
    out: Tensor,
    rows: slice | Tensor,
) -> None:
    """gK (w - q c) + gy (1[v = y] - q) - q extra, in the raw logits, to `out`[rows]; coefficients [n, 1]."""
    gk, gy, _ = coefficients
    of_mass = torch.zeros_like(slope.mass_scale)
    if gk is not None:
        of_mass = of_mass - gk * slope.center
    if gy is not None:
        of_mass = of_mass - gy
    of_mass = (of_mass if extra is None else of_mass - extra) * slope.mass_scale
    target = out[rows] if isinstance(rows, slice) and out.dtype == slope.mass.dtype else slope.mass
    capped = _cap_slope(block)  # of the raw logits, which `out` may replace
    if gk is None or slope.slope is None:
        grad = torch.mul(slope.mass, of_mass, out=target)
    else:
        grad = torch.addcmul(slope.slope.mul_(gk * slope.scale), slope.mass, of_mass, out=target)
    if block.dead is not None:
        grad.masked_fill_(block.dead, 0.0)
    if gy is not None and block.tokens is not None:
        grad.scatter_add_(1, block.tokens[:, None].clamp(0, grad.shape[1] - 1), gy)
    if capped is not None:
        grad.mul_(capped)
    if (factor := block.op.student.scale / block.op.temperature) != 1.0:
        grad.mul_(factor)
    if target is slope.mass:
        out[rows] = grad.to(out.dtype)


def _cap_slope(block: _Block) -> Tensor | None:
    """1 - tanh^2 of the soft-cap, in the first buffer; None without one."""
    side = block.op.student
    if side.softcap is None:
        return None
    return _logits(block.s, side, block.dead, block.work[0]).div_(side.softcap).square_().neg_().add_(1)
