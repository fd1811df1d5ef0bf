"""The row op in Triton: one pass for the statistics of a row, one for the gradient. Formulas: `_rows`.

The statistics kernel has one program a row and keeps running sums that are rescaled when the running maximum grows;
the gradient kernel has one program a tile. Every reduction has a fixed order and there are no atomics, so results
repeat bit for bit. N is the grid, never an argument: nothing is compiled again when it changes. Full tiles are loaded
unmasked, only the tail has a mask. Sums are float32, float64 where an input is.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mskd_kernels._rows import Coefficients, RowOp, Side

_NO_TEACHER, _REVERSE, _FORWARD = 0, 1, 2
_KINDS = {None: _NO_TEACHER, "reverse_kl": _REVERSE, "forward_kl": _FORWARD}


@triton.jit
def _tanh(x):
    """Triton has none of its own that the interpreter knows; near 0 exp would lose digits (Cephes' rational there)."""
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * (p / q), tl.where(x < 0.0, -far, far))


@triton.jit
def _capped(z, inner, cap, CAPPED: tl.constexpr):
    return cap * _tanh(z * inner) if CAPPED else z


@triton.jit
def _tile(row_ptr, offsets, V, inner, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Soft-capped logits of one tile; columns outside are -inf."""
    if MASKED:
        inside = offsets < V
        z = tl.load(row_ptr + offsets, mask=inside, other=-float("inf")).to(ACC)
        y = tl.where(inside, _capped(z, inner, cap, CAPPED), -float("inf"))
    else:
        y = _capped(tl.load(row_ptr + offsets).to(ACC), inner, cap, CAPPED)
    return y


@triton.jit
def _frame(row_ptr, V, inner, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """A constant near the row's maximum: the maximum of its first tile; 0 if that is -inf."""
    top = tl.max(_tile(row_ptr, tl.arange(0, BLOCK), V, inner, cap, CAPPED, True, ACC), 0)
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _expected_difference(total, infinite, e, a, b, rescale):
    """Adds sum e (a - b), e = exp(a - top): a = -inf counts 0, b = -inf alone makes the row infinite."""
    difference = a - b
    endless = difference == float("inf")
    terms = tl.where(endless | (a == -float("inf")), 0.0, e * difference)
    return total * rescale + tl.sum(terms, 0), tl.maximum(infinite, tl.max(endless.to(tl.int32), 0))


@triton.jit
def _accumulate(x, u, m, d, h, mt, dt, k, infinite, KIND: tl.constexpr, ENTROPY: tl.constexpr):
    """Merges a tile of framed logits (x student, u teacher) into the running maxima m, mt and sums d, h, dt, k."""
    top = tl.maximum(m, tl.max(x, 0))
    e = tl.exp(x - top)
    rescale = tl.exp(m - top)
    d = d * rescale + tl.sum(e, 0)
    if ENTROPY:
        h = h * rescale + tl.sum(tl.where(x == -float("inf"), 0.0, e * x), 0)
    if KIND != 0:
        teacher_top = tl.maximum(mt, tl.max(u, 0))
        w = tl.exp(u - teacher_top)
        teacher_rescale = tl.exp(mt - teacher_top)
        dt = dt * teacher_rescale + tl.sum(w, 0)
        if KIND == 1:
            k, infinite = _expected_difference(k, infinite, e, x, u, rescale)
        else:
            k, infinite = _expected_difference(k, infinite, w, u, x, teacher_rescale)
        mt = teacher_top
    return top, d, h, mt, dt, k, infinite


@triton.jit
def _framed_token(row_ptr, token, V, frame, inner, cap, factor, CAPPED: tl.constexpr, ACC: tl.constexpr):
    """The framed logit of the token; NaN where the token lies outside the vocabulary."""
    inside = (token >= 0) & (token < V)
    z = tl.load(row_ptr + tl.where(inside, token, 0)).to(ACC)
    return tl.where(inside, (_capped(z, inner, cap, CAPPED) - frame) * factor, float("nan"))


@triton.jit
def _statistics_kernel(
    s_ptr,
    t_ptr,
    tokens_ptr,
    live_ptr,
    out_ptr,
    V,
    s_stride,
    t_stride,
    s_inner: tl.float64,
    s_cap: tl.float64,
    s_factor: tl.float64,
    t_inner: tl.float64,
    t_cap: tl.float64,
    t_factor: tl.float64,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if HAS_LIVE:
        if tl.load(live_ptr + row) == 0:  # the output holds zeros already
            return
    s_inner, s_cap, s_factor = tl.full([], s_inner, ACC), tl.full([], s_cap, ACC), tl.full([], s_factor, ACC)
    t_inner, t_cap, t_factor = tl.full([], t_inner, ACC), tl.full([], t_cap, ACC), tl.full([], t_factor, ACC)
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    zero = tl.full([], 0.0, ACC)
    frame = _frame(s_row, V, s_inner, s_cap, S_CAPPED, BLOCK, ACC)
    teacher_frame = _frame(t_row, V, t_inner, t_cap, T_CAPPED, BLOCK, ACC) if KIND != 0 else zero
    m, mt = tl.full([], -1e30, ACC), tl.full([], -1e30, ACC)  # not -inf: -inf - -inf is NaN
    d, h, dt, k = zero, zero, zero, zero
    infinite = tl.full([], 0, tl.int32)
    lanes = tl.arange(0, BLOCK)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = (_tile(s_row, start + lanes, V, s_inner, s_cap, S_CAPPED, False, ACC) - frame) * s_factor
        u = x
        if KIND != 0:
            u = (_tile(t_row, start + lanes, V, t_inner, t_cap, T_CAPPED, False, ACC) - teacher_frame) * t_factor
        m, d, h, mt, dt, k, infinite = _accumulate(x, u, m, d, h, mt, dt, k, infinite, KIND, ENTROPY)
    if full < V:
        x = (_tile(s_row, full + lanes, V, s_inner, s_cap, S_CAPPED, True, ACC) - frame) * s_factor
        u = x
        if KIND != 0:
            u = (_tile(t_row, full + lanes, V, t_inner, t_cap, T_CAPPED, True, ACC) - teacher_frame) * t_factor
        m, d, h, mt, dt, k, infinite = _accumulate(x, u, m, d, h, mt, dt, k, infinite, KIND, ENTROPY)
    out = out_ptr + row * 9
    lse = m + tl.log(d)
    tl.store(out + 4, frame)
    tl.store(out + 5, lse)
    if ENTROPY:
        tl.store(out + 3, lse - h / d)
    if KIND != 0:
        shift = (m - mt) + (tl.log(d) - tl.log(dt))
        value = k / d - shift if KIND == 1 else k / dt + shift
        value = tl.where(infinite > 0, float("inf"), value)
        tl.store(out, value)
        tl.store(out + 8, value if KIND == 1 else zero)
        tl.store(out + 6, teacher_frame)
        tl.store(out + 7, mt + tl.log(dt))
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
        tl.store(out + 1, _framed_token(s_row, token, V, frame, s_inner, s_cap, s_factor, S_CAPPED, ACC) - lse)
        if KIND != 0:
            x = _framed_token(t_row, token, V, teacher_frame, t_inner, t_cap, t_factor, T_CAPPED, ACC)
            tl.store(out + 2, x - (mt + tl.log(dt)))


@triton.jit
def _gradient_tile(
    s_row,
    t_row,
    out_row,
    offsets,
    token,
    V,
    value,
    entropy,
    frame,
    lse,
    teacher_frame,
    teacher_lse,
    gk,
    gy,
    gh,
    s_inner,
    s_cap,
    s_factor,
    t_inner,
    t_cap,
    t_factor,
    slope,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
):
    y = _tile(s_row, offsets, V, s_inner, s_cap, S_CAPPED, MASKED, ACC)
    x = (y - frame) * s_factor - lse  # log q
    q = tl.exp(x)
    if KIND == 1:
        u = (_tile(t_row, offsets, V, t_inner, t_cap, T_CAPPED, MASKED, ACC) - teacher_frame) * t_factor - teacher_lse
        grad = q * (gk * (x - u - value) - gy)
    elif KIND == 2:
        u = (_tile(t_row, offsets, V, t_inner, t_cap, T_CAPPED, MASKED, ACC) - teacher_frame) * t_factor - teacher_lse
        grad = gk * (q - tl.exp(u)) - gy * q
    else:
        grad = -gy * q
    if ENTROPY:
        grad -= gh * q * (x + entropy)
    grad = tl.where(x == -float("inf"), 0.0, grad)  # 0 * -inf
    grad += tl.where(offsets == token, gy, 0.0)
    if S_CAPPED:
        y = y / s_cap
        grad *= 1.0 - y * y
    grad = (grad * slope).to(out_row.dtype.element_ty)
    if MASKED:
        tl.store(out_row + offsets, grad, mask=offsets < V)
    else:
        tl.store(out_row + offsets, grad)


@triton.jit
def _gradient_kernel(
    s_ptr,
    t_ptr,
    tokens_ptr,
    stats_ptr,
    coefficients_ptr,
    out_ptr,
    V,
    s_stride,
    t_stride,
    out_stride,
    s_inner: tl.float64,
    s_cap: tl.float64,
    s_factor: tl.float64,
    t_inner: tl.float64,
    t_cap: tl.float64,
    t_factor: tl.float64,
    slope: tl.float64,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    s_row, t_row, out_row = s_ptr + row * s_stride, t_ptr + row * t_stride, out_ptr + row * out_stride
    gk = tl.load(coefficients_ptr + row * 3)
    gy = tl.load(coefficients_ptr + row * 3 + 1)
    gh = tl.load(coefficients_ptr + row * 3 + 2)
    if (gk == 0.0) & (gy == 0.0) & (gh == 0.0):  # masked, or infinite: never read
        tl.store(out_row + offsets, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=offsets < V)
        return
    token = tl.load(tokens_ptr + row) if HAS_TOKENS else tl.full([], -1, tl.int64)
    stats = stats_ptr + row * 9
    value, entropy = tl.load(stats), tl.load(stats + 3)
    frame, lse = tl.load(stats + 4), tl.load(stats + 5)
    teacher_frame, teacher_lse = tl.load(stats + 6), tl.load(stats + 7)
    s_inner, s_cap, s_factor = tl.full([], s_inner, ACC), tl.full([], s_cap, ACC), tl.full([], s_factor, ACC)
    t_inner, t_cap, t_factor = tl.full([], t_inner, ACC), tl.full([], t_cap, ACC), tl.full([], t_factor, ACC)
    slope = tl.full([], slope, ACC)
    # fmt: off
    if start + BLOCK <= V:
        _gradient_tile(
            s_row, t_row, out_row, offsets, token, V, value, entropy, frame, lse, teacher_frame, teacher_lse,
            gk, gy, gh, s_inner, s_cap, s_factor, t_inner, t_cap, t_factor, slope,
            KIND, ENTROPY, S_CAPPED, T_CAPPED, False, ACC,
        )
    else:
        _gradient_tile(
            s_row, t_row, out_row, offsets, token, V, value, entropy, frame, lse, teacher_frame, teacher_lse,
            gk, gy, gh, s_inner, s_cap, s_factor, t_inner, t_cap, t_factor, slope,
            KIND, ENTROPY, S_CAPPED, T_CAPPED, True, ACC,
        )
    # fmt: on


INTERPRETED = not isinstance(_statistics_kernel, triton.JITFunction)


# The host side --------------------------------------------------------------------------------------------------------


def statistics(op: RowOp, s: Tensor, t: Tensor | None, tokens: Tensor | None, live: Tensor | None, out: Tensor) -> None:
    """Fills `out` [N, 9], zeros on entry, for the rows that are live. N > 0."""
    teacher = s if t is None else t
    with _on(s):
        _statistics_kernel[(s.shape[0],)](
            s,
            teacher,
            s if tokens is None else tokens,
            s if live is None else live,
            out,
            s.shape[1],
            s.stride(0),
            teacher.stride(0),
            *_scalars(op.student, op.temperature),
            *_scalars(op.teacher, op.temperature),
            KIND=_kind(op),
            ENTROPY=op.entropy,
            HAS_TOKENS=tokens is not None,
            HAS_LIVE=live is not None,
            S_CAPPED=op.student.softcap is not None,
            T_CAPPED=op.teacher.softcap is not None,
            **tile_shape(s.shape[1], out.dtype, _any_cap(op)),
        )


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
    nothing = stats.new_zeros(stats.shape[0])
    table = torch.stack([nothing if c is None else c.to(stats.dtype) for c in coefficients], 1)
    teacher = s if t is None or coefficients.value is None else t
    shape = tile_shape(s.shape[1], stats.dtype, _any_cap(op))
    with _on(s):
        _gradient_kernel[(s.shape[0], triton.cdiv(s.shape[1], shape["BLOCK"]))](
            s,
            teacher,
            s if tokens is None else tokens,
            stats.contiguous(),
            table,
            out,
            s.shape[1],
            s.stride(0),
            teacher.stride(0),
            out.stride(0),
            *_scalars(op.student, op.temperature),
            *_scalars(op.teacher, op.temperature),
            op.student.scale / op.temperature,
            KIND=_NO_TEACHER if coefficients.value is None else _kind(op),
            ENTROPY=coefficients.entropy is not None,
            HAS_TOKENS=tokens is not None,
            S_CAPPED=op.student.softcap is not None,
            T_CAPPED=op.teacher.softcap is not None,
            **shape,
        )


# (float64, soft-capped) -> tile, warps: compiled for eight architectures, no register spills with any of them.
_TILES = {(False, False): (2048, 8), (False, True): (1024, 8), (True, False): (1024, 8), (True, True): (512, 4)}


def tile_shape(vocabulary: int, dtype: torch.dtype, capped: bool) -> dict[str, Any]:
    """Tile and warps; a small vocabulary gets a small tile."""
    most, warps = _TILES[dtype == torch.float64, capped]
    block = min(most, max(128, triton.next_power_of_2(vocabulary)))
    return {"BLOCK": block, "num_warps": max(1, warps * block // most)}


def _scalars(side: Side, temperature: float) -> tuple[float, float, float]:
    """inner, cap, factor: logits over T = factor * cap * tanh(inner * z), or factor * z where there is no soft-cap."""
    if side.softcap is None:
        return 1.0, 1.0, side.scale / temperature
    return side.scale / side.softcap, side.softcap, 1.0 / temperature


def _kind(op: RowOp) -> int:
    name = None if op.kind is None else op.kind.name
    if name not in _KINDS:
        raise NotImplementedError(f'kind={name!r} is not in the Triton kernels yet: use backend="torch"')
    return _KINDS[name]


def _any_cap(op: RowOp) -> bool:
    return op.student.softcap is not None or op.teacher.softcap is not None


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
