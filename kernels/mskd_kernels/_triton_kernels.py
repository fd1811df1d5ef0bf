"""The row op's Triton kernels. Formulas: `_row_op`; how they are launched: `_triton_rows`, in which shape: `_plan`.

| kernel | grid | does |
|---|---|---|
| statistics | (row, part) | running sums of a slice of the row; the whole row's statistics where there is one part |
| combine | row | the parts' sums -> statistics |
| terms | (row, part) | value and center of the kinds that need Ls and Lt first |
| gradient | (row, tile) | the gradient for any coefficients |
| scale | programs | a stored gradient times a factor on the device; nothing where that is 1 |
| fused | programs | row after row: statistics, loss, and the gradient while the row is still in L2, in reverse order |

Every thread keeps running sums of its own columns, rescaled when its maximum grows; threads, then parts are merged
once, in a fixed order, without atomics: results repeat bit for bit. A row is read from its first 16-byte boundary in
full tiles without a mask, 128 bits a load; the columns before it and after the last full tile make one masked tile.
No argument is specialised and N is no constant: nothing is compiled again when N, V or strides change. Sums are
float32, float64 where an input is.
"""

from typing import Any

import triton
import triton.language as tl

from mskd_kernels._plan import MOST_PARTS
from mskd_kernels._row_op import COLUMNS

_ARGUMENTS = (  # never specialised: what is aligned is said by WIDE
    "s_ptr t_ptr tokens_ptr live_ptr stats_ptr partials_ptr coefficients_ptr out_ptr losses_ptr clipped_ptr old_ptr "
    "advantages_ptr weights_ptr divisor_ptr factor_ptr N V s_stride t_stride out_stride parts"
).split()
_FRAME_COLUMNS = tl.constexpr(256)
_LEAST = tl.constexpr(-1e30)  # starts a running maximum (-inf - -inf is NaN), and is the logarithm of a mass of 0
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_COLUMNS = tl.constexpr(COLUMNS)
_SUMS = tl.constexpr(6)
_MOST_PARTS = tl.constexpr(MOST_PARTS)


def _kernel(function: Any) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _ARGUMENTS])


# Tiles ----------------------------------------------------------------------------------------------------------------
# A side is (pointer to its first boundary, inner, cap, factor, frame, CAPPED); a span is (columns before the boundary,
# full tiles, columns after the boundary, all tiles). Columns are counted from the boundary.


@triton.jit
def _tanh(x):
    """Triton has none of its own that the interpreter knows; near 0 exp would lose digits (Cephes' rational there)."""
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * (p / q), tl.where(x < 0.0, -far, far))


@triton.jit
def _lanes(BLOCK: tl.constexpr, PER: tl.constexpr):
    """Columns within a tile [BLOCK / PER, PER]: a thread has all of a row of it, 16 bytes."""
    return tl.arange(0, BLOCK // PER)[:, None] * PER + tl.arange(0, PER)[None, :]


@triton.jit
def _span(row_ptr, V, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    head = 0
    if WIDE:
        bytes = row_ptr.to(tl.int64) & 15
        head = tl.minimum((((16 - bytes) & 15) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)).to(tl.int32), V)
    full = (V - head) // BLOCK
    return head, full, V - head, full + tl.cdiv(V - full * BLOCK, BLOCK)


@triton.jit
def _start(row_ptr, span, WIDE: tl.constexpr):
    start = row_ptr + span[0]
    if WIDE:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def _columns(k, span, lanes, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The columns of tile k. Masked tiles have what the full ones leave: before the boundary, and after them."""
    c = k * BLOCK + lanes
    if MASKED:
        head, done = span[0], span[1] * BLOCK
        c = tl.where(c - done < head, c - done - head, c - head)
    return c


@triton.jit
def _capped(z, side):
    return side[2] * _tanh(z * side[1]) if side[5] else z


@triton.jit
def _tile(side, c, span, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Soft-capped logits of some columns; those outside are -inf."""
    if MASKED:
        inside = c < span[2]
        z = tl.load(side[0] + c, mask=inside, other=-float("inf")).to(ACC)
        y = tl.where(inside, _capped(z, side), -float("inf"))
    else:
        y = _capped(tl.load(side[0] + c).to(ACC), side)
    return y


@triton.jit
def _framed(side, c, span, MASKED: tl.constexpr, ACC: tl.constexpr):
    return (_tile(side, c, span, MASKED, ACC) - side[4]) * side[3]


@triton.jit
def _side(row_ptr, span, V, inner, cap, factor, CAPPED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr):
    """The side of a row with its frame, a constant near the row's maximum: that of its first columns; 0 if -inf."""
    inner, cap, factor = tl.full([], inner, ACC), tl.full([], cap, ACC), tl.full([], factor, ACC)
    first = tl.arange(0, _FRAME_COLUMNS)
    z = tl.load(row_ptr + first, mask=first < V, other=-float("inf")).to(ACC)
    y = tl.where(first < V, _capped(z, (row_ptr, inner, cap, factor, factor, CAPPED)), -float("inf"))
    top = tl.max(y, 0)
    frame = tl.where(top == -float("inf"), 0.0, top)
    return _start(row_ptr, span, WIDE), inner, cap, factor, frame, CAPPED


@triton.jit
def _framed_token(row_ptr, token, V, side, ACC: tl.constexpr):
    """The framed logit of the token; NaN where the token lies outside the vocabulary."""
    inside = (token >= 0) & (token < V)
    z = tl.load(row_ptr + tl.where(inside, token, 0)).to(ACC)
    return tl.where(inside, (_capped(z, side) - side[4]) * side[3], float("nan"))


# Statistics -----------------------------------------------------------------------------------------------------------
# Sums of columns: m the maximum in powers of 2, d = sum e, h = sum e x with e = exp(x) / 2^m; mt, dt the teacher's;
# k = sum e (x - u) of the kind's expectation, x the student's framed logits, u the teacher's.


@triton.jit
def _shares(x, m):
    """The grown maximum, exp(x) over 2 to it, and the factor of what was summed over 2^m before."""
    top = tl.maximum(m, tl.max(x, 1) * _LOG2E)
    return top, tl.exp2(x * _LOG2E - top[:, None]), tl.exp2(m - top)


@triton.jit
def _expected_difference(e, a, b):
    """sum e (a - b): a = -inf counts 0; b = -inf alone makes it +inf, or NaN where e underflows."""
    return tl.sum(tl.where(a == -float("inf"), 0.0, e * (a - b)), 1)


@triton.jit
def _accumulate(
    student, teacher, c, span, m, d, h, mt, dt, k,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    x = _framed(student, c, span, MASKED, ACC)
    m, e, shrink = _shares(x, m)
    d = d * shrink + tl.sum(e, 1)
    if ENTROPY:
        h = h * shrink + tl.sum(tl.where(x == -float("inf"), 0.0, e * x), 1)
    if TERMS is not None:
        u = _framed(teacher, c, span, MASKED, ACC)
        mt, w, teacher_shrink = _shares(u, mt)
        dt = dt * teacher_shrink + tl.sum(w, 1)
        if EXPECTATION == 1:
            k = k * shrink + _expected_difference(e, x, u)
        if EXPECTATION == 2:
            k = k * teacher_shrink + _expected_difference(w, u, x)
    return m, d, h, mt, dt, k


@triton.jit
def _merged(m, d, h, mt, dt, k, EXPECTATION: tl.constexpr):
    """Sums [n] of threads or parts -> scalars."""
    top, teacher_top = tl.max(m, 0), tl.max(mt, 0)
    e, w = tl.exp2(m - top), tl.exp2(mt - teacher_top)
    k = k * (w if EXPECTATION == 2 else e)
    return top, tl.sum(d * e, 0), tl.sum(h * e, 0), teacher_top, tl.sum(dt * w, 0), tl.sum(k, 0)


@triton.jit
def _summed(
    student, teacher, span, first, last, lanes,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of the tiles from `first` to before `last`."""
    PER: tl.constexpr = lanes.shape[1]
    zero = tl.zeros([BLOCK // PER], ACC)
    m, d, h, mt, dt, k = zero + _LEAST, zero, zero, zero + _LEAST, zero, zero
    full = span[1]
    for i in range(first, tl.minimum(last, full)):
        c = _columns(i, span, lanes, BLOCK, False)
        m, d, h, mt, dt, k = _accumulate(
            student, teacher, c, span, m, d, h, mt, dt, k, TERMS, EXPECTATION, ENTROPY, False, ACC
        )
    for i in range(tl.maximum(first, full), last):
        c = _columns(i, span, lanes, BLOCK, True)
        m, d, h, mt, dt, k = _accumulate(
            student, teacher, c, span, m, d, h, mt, dt, k, TERMS, EXPECTATION, ENTROPY, True, ACC
        )
    return _merged(m, d, h, mt, dt, k, EXPECTATION)


@triton.jit
def _value(m, d, mt, dt, k, EXPECTATION: tl.constexpr):
    """The value of a kind of one pass. k is not finite where a mass meets none (or where d or dt is NaN)."""
    shift = (m - mt) * _LN2 + (tl.log(d) - tl.log(dt))
    value = k / d - shift if EXPECTATION == 1 else k / dt + shift
    infinite = ((k != k) | (k == float("inf"))) & (d == d) & (dt == dt)
    return tl.where(infinite, float("inf"), value)


@triton.jit
def _store_statistics(
    out, student, teacher, x, u, m, d, h, mt, dt, k,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums and the token's framed logits x, u -> the row of statistics; what the terms give is not among them."""
    lse = m * _LN2 + tl.log(d)
    tl.store(out + 4, student[4])
    tl.store(out + 5, lse)
    if HAS_TOKENS:
        tl.store(out + 1, x - lse)
    if ENTROPY:
        tl.store(out + 3, lse - h / d)
    if TERMS is not None:
        teacher_lse = mt * _LN2 + tl.log(dt)
        tl.store(out + 6, teacher[4])
        tl.store(out + 7, teacher_lse)
        if HAS_TOKENS:
            tl.store(out + 2, u - teacher_lse)
    if EXPECTATION != 0:
        value = _value(m, d, mt, dt, k, EXPECTATION)
        tl.store(out, value)
        tl.store(out + 8, value if EXPECTATION == 1 else tl.zeros_like(value))


@_kernel
def _statistics_kernel(
    s_ptr, t_ptr, tokens_ptr, live_ptr, stats_ptr, partials_ptr,
    V: tl.int32, s_stride: tl.int64, t_stride: tl.int64,
    s_inner: tl.float64, s_cap: tl.float64, s_factor: tl.float64,
    t_inner: tl.float64, t_cap: tl.float64, t_factor: tl.float64, parts: tl.int32,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr,
    HAS_LIVE: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if HAS_LIVE:
        if tl.load(live_ptr + row) == 0:  # the output holds zeros already
            return
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    span = _span(s_row, V, BLOCK, WIDE)
    student = _side(s_row, span, V, s_inner, s_cap, s_factor, S_CAPPED, WIDE, ACC)
    teacher = student
    if TERMS is not None:
        teacher = _side(t_row, span, V, t_inner, t_cap, t_factor, T_CAPPED, WIDE, ACC)
    tiles = span[3]
    share = tl.cdiv(tiles, parts)
    m, d, h, mt, dt, k = _summed(
        student, teacher, span, part * share, tl.minimum(part * share + share, tiles), _lanes(BLOCK, PER),
        TERMS, EXPECTATION, ENTROPY, BLOCK, ACC,
    )  # fmt: skip
    if WHOLE:
        x, u = m, mt
        if HAS_TOKENS:
            token = tl.load(tokens_ptr + row)
            x = _framed_token(s_row, token, V, student, ACC)
            u = _framed_token(t_row, token, V, teacher, ACC) if TERMS is not None else x
        _store_statistics(
            stats_ptr + row * _COLUMNS, student, teacher, x, u, m, d, h, mt, dt, k,
            TERMS, EXPECTATION, ENTROPY, HAS_TOKENS,
        )  # fmt: skip
    else:
        out = partials_ptr + (row * parts + part) * _SUMS
        tl.store(out, m)
        tl.store(out + 1, d)
        tl.store(out + 2, h)
        tl.store(out + 3, mt)
        tl.store(out + 4, dt)
        tl.store(out + 5, k)


@_kernel
def _combine_kernel(
    s_ptr, t_ptr, tokens_ptr, live_ptr, stats_ptr, partials_ptr,
    V: tl.int32, s_stride: tl.int64, t_stride: tl.int64,
    s_inner: tl.float64, s_cap: tl.float64, s_factor: tl.float64,
    t_inner: tl.float64, t_cap: tl.float64, t_factor: tl.float64, parts: tl.int32,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr,
    HAS_LIVE: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,
):  # fmt: skip
    """The parts' sums in the order of the row -> its statistics. One warp."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if HAS_LIVE:
        if tl.load(live_ptr + row) == 0:
            return
    part = tl.arange(0, _MOST_PARTS)
    sums, there = partials_ptr + (row * parts + part) * _SUMS, part < parts
    m, d = tl.load(sums, mask=there, other=_LEAST), tl.load(sums + 1, mask=there, other=0.0)
    h, mt = tl.load(sums + 2, mask=there, other=0.0), tl.load(sums + 3, mask=there, other=_LEAST)
    dt, k = tl.load(sums + 4, mask=there, other=0.0), tl.load(sums + 5, mask=there, other=0.0)
    m, d, h, mt, dt, k = _merged(m, d, h, mt, dt, k, EXPECTATION)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    span = (0, 0, V, 0)
    student = _side(s_row, span, V, s_inner, s_cap, s_factor, S_CAPPED, False, ACC)
    teacher = student
    if TERMS is not None:
        teacher = _side(t_row, span, V, t_inner, t_cap, t_factor, T_CAPPED, False, ACC)
    x, u = m, mt
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
        x = _framed_token(s_row, token, V, student, ACC)
        u = _framed_token(t_row, token, V, teacher, ACC) if TERMS is not None else x
    _store_statistics(
        stats_ptr + row * _COLUMNS, student, teacher, x, u, m, d, h, mt, dt, k, TERMS, EXPECTATION, ENTROPY, HAS_TOKENS
    )  # fmt: skip


# The kinds' terms -----------------------------------------------------------------------------------------------------


@triton.jit
def _masses(side, lse, c, span, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Log-probabilities, finite (NaN stays), and probabilities."""
    x = _framed(side, c, span, MASKED, ACC) - lse
    return tl.maximum(x, _LEAST, propagate_nan=tl.PropagateNan.ALL), tl.exp(x)


@triton.jit
def _add_terms(
    student, teacher, lse, teacher_lse, c, span, value, center, beta,
    TERMS: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    lq, q = _masses(student, lse, c, span, MASKED, ACC)
    lp, p = _masses(teacher, teacher_lse, c, span, MASKED, ACC)
    f, w = TERMS(lq, lp, q, p, beta)
    return value + tl.sum(f, 1), center + tl.sum(w, 1)


@triton.jit
def _summed_terms(
    student, teacher, lse, teacher_lse, span, first, last, lanes, beta,
    TERMS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value and center of the tiles before `last` down to `first`: the last ones read are still in L2."""
    PER: tl.constexpr = lanes.shape[1]
    value, center = tl.zeros([BLOCK // PER], ACC), tl.zeros([BLOCK // PER], ACC)
    full = span[1]
    for i in range(tl.maximum(first, full), last):
        c = _columns(i, span, lanes, BLOCK, True)
        value, center = _add_terms(student, teacher, lse, teacher_lse, c, span, value, center, beta, TERMS, True, ACC)
    last = tl.minimum(last, full)
    for i in range(first, last):
        c = _columns(last - 1 - (i - first), span, lanes, BLOCK, False)
        value, center = _add_terms(student, teacher, lse, teacher_lse, c, span, value, center, beta, TERMS, False, ACC)
    return tl.sum(value, 0), tl.sum(center, 0)


@_kernel
def _terms_kernel(
    s_ptr, t_ptr, live_ptr, stats_ptr, partials_ptr,
    V: tl.int32, s_stride: tl.int64, t_stride: tl.int64,
    s_inner: tl.float64, s_cap: tl.float64, s_factor: tl.float64,
    t_inner: tl.float64, t_cap: tl.float64, t_factor: tl.float64, beta: tl.float64, parts: tl.int32,
    TERMS: tl.constexpr, HAS_LIVE: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,
    WIDE: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the terms [N, parts, 2]; zeros on entry, and where rows are not live."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if HAS_LIVE:
        if tl.load(live_ptr + row) == 0:
            return
    s_row, t_row, stats = s_ptr + row * s_stride, t_ptr + row * t_stride, stats_ptr + row * _COLUMNS
    span = _span(s_row, V, BLOCK, WIDE)
    student = _given(s_row, span, s_inner, s_cap, s_factor, tl.load(stats + 4), S_CAPPED, WIDE, ACC)
    teacher = _given(t_row, span, t_inner, t_cap, t_factor, tl.load(stats + 6), T_CAPPED, WIDE, ACC)
    tiles = span[3]
    share = tl.cdiv(tiles, parts)
    value, center = _summed_terms(
        student, teacher, tl.load(stats + 5), tl.load(stats + 7), span,
        part * share, tl.minimum(part * share + share, tiles), _lanes(BLOCK, PER),
        tl.full([], beta, ACC), TERMS, BLOCK, ACC,
    )  # fmt: skip
    tl.store(partials_ptr + (row * parts + part) * 2, value)
    tl.store(partials_ptr + (row * parts + part) * 2 + 1, center)


# The gradient ---------------------------------------------------------------------------------------------------------


@triton.jit
def _given(row_ptr, span, inner, cap, factor, frame, CAPPED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr):
    """The side of a row whose frame is known."""
    inner, cap, factor = tl.full([], inner, ACC), tl.full([], cap, ACC), tl.full([], factor, ACC)
    return _start(row_ptr, span, WIDE), inner, cap, factor, frame, CAPPED


@triton.jit
def _gradient_tile(
    student, teacher, out, lse, teacher_lse, k, span, lanes, token, gk, gy, gh, base, slope, beta,
    TERMS: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """gk w + q (base - gh log q) + gy 1[v = token], base = -(gk center + gy + gh H), times the slope of the logits."""
    c = _columns(k, span, lanes, BLOCK, MASKED)
    y = _tile(student, c, span, MASKED, ACC)
    x = (y - student[4]) * student[3] - lse
    q, lq = tl.exp(x), tl.maximum(x, _LEAST, propagate_nan=tl.PropagateNan.ALL)
    grad = q * (base - gh * lq) if ENTROPY else q * base
    if TERMS is not None:
        lp, p = _masses(teacher, teacher_lse, c, span, MASKED, ACC)
        f, w = TERMS(lq, lp, q, p, beta)
        grad += gk * w
    if HAS_TOKENS:
        if MASKED:
            grad += tl.where(c == token, gy, 0.0)
        else:
            if (token >= k * BLOCK) & (token < k * BLOCK + BLOCK):
                grad += tl.where(c == token, gy, 0.0)
    if student[5]:
        y = y / student[2]
        grad *= 1.0 - y * y
    grad = (grad * slope).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + c, grad, mask=c < span[2])
    else:
        tl.store(out + c, grad)


@triton.jit
def _column_of(token, span):
    """The token's column, counted from the boundary; one that does not exist where it is outside."""
    return tl.where((token >= 0) & (token < span[0] + span[2]), token - span[0], span[2])


@triton.jit
def _clear_tile(out, k, span, lanes, BLOCK: tl.constexpr):
    c = _columns(k, span, lanes, BLOCK, False) if k < span[1] else _columns(k, span, lanes, BLOCK, True)
    tl.store(out + c, tl.zeros(lanes.shape, out.dtype.element_ty), mask=c < span[2])


@_kernel
def _gradient_kernel(
    s_ptr, t_ptr, tokens_ptr, stats_ptr, coefficients_ptr, out_ptr,
    V: tl.int32, s_stride: tl.int64, t_stride: tl.int64, out_stride: tl.int64,
    s_inner: tl.float64, s_cap: tl.float64, s_factor: tl.float64,
    t_inner: tl.float64, t_cap: tl.float64, t_factor: tl.float64, slope: tl.float64, beta: tl.float64,
    TERMS: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr, S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s_row, t_row, out_row = s_ptr + row * s_stride, t_ptr + row * t_stride, out_ptr + row * out_stride
    span, lanes = _span(s_row, V, BLOCK, WIDE), _lanes(BLOCK, PER)
    out = _start(out_row, span, WIDE)
    gk = tl.load(coefficients_ptr + row * 3)
    gy = tl.load(coefficients_ptr + row * 3 + 1)
    gh = tl.load(coefficients_ptr + row * 3 + 2)
    if (gk == 0.0) & (gy == 0.0) & (gh == 0.0):  # masked, or infinite: never read
        _clear_tile(out, k, span, lanes, BLOCK)
        return
    token = _column_of(tl.load(tokens_ptr + row), span) if HAS_TOKENS else -1
    stats = stats_ptr + row * _COLUMNS
    lse, teacher_lse = tl.load(stats + 5), tl.load(stats + 7)
    base = -(gk * tl.load(stats + 8) + gy + gh * tl.load(stats + 3))
    student = _given(s_row, span, s_inner, s_cap, s_factor, tl.load(stats + 4), S_CAPPED, WIDE, ACC)
    teacher = _given(t_row, span, t_inner, t_cap, t_factor, tl.load(stats + 6), T_CAPPED, WIDE, ACC)
    slope, beta = tl.full([], slope, ACC), tl.full([], beta, ACC)
    if k < span[1]:
        _gradient_tile(
            student, teacher, out, lse, teacher_lse, k, span, lanes, token, gk, gy, gh, base, slope, beta,
            TERMS, ENTROPY, HAS_TOKENS, BLOCK, False, ACC,
        )  # fmt: skip
    else:
        _gradient_tile(
            student, teacher, out, lse, teacher_lse, k, span, lanes, token, gk, gy, gh, base, slope, beta,
            TERMS, ENTROPY, HAS_TOKENS, BLOCK, True, ACC,
        )  # fmt: skip


# The loss and all of it in one go -------------------------------------------------------------------------------------


@triton.jit
def _policy(lq, old, a, w, clip, CLIP_WEIGHTED: tl.constexpr):
    """`_row_op._policy_terms` of one token."""
    ratio = tl.exp(lq - old)
    x = w * ratio if CLIP_WEIGHTED else ratio
    inside = tl.where(x < 1.0 - clip, 1.0 - clip, tl.where(x > 1.0 + clip, 1.0 + clip, x))
    free, limited = -a * x, -a * inside
    clipped = limited > free
    term, slope = tl.where(clipped, limited, free), tl.where(clipped, 0.0, free)
    if not CLIP_WEIGHTED:
        term, slope = w * term, w * slope
    return term, slope, clipped


@triton.jit
def _row_gradient(
    student, teacher, out, lse, teacher_lse, span, lanes, token, gk, gy, base, slope, beta,
    TERMS: tl.constexpr, HAS_TOKENS: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All tiles of a row, those first that were read last."""
    full, tiles = span[1], span[3]
    if REVERSE:
        for i in range(full, tiles):
            _gradient_tile(
                student, teacher, out, lse, teacher_lse, i, span, lanes, token, gk, gy, gy, base, slope, beta,
                TERMS, False, HAS_TOKENS, BLOCK, True, ACC,
            )  # fmt: skip
    for i in range(0, full):
        _gradient_tile(
            student, teacher, out, lse, teacher_lse, full - 1 - i if REVERSE else i, span, lanes, token,
            gk, gy, gy, base, slope, beta, TERMS, False, HAS_TOKENS, BLOCK, False, ACC,
        )  # fmt: skip
    if not REVERSE:
        for i in range(full, tiles):
            _gradient_tile(
                student, teacher, out, lse, teacher_lse, i, span, lanes, token, gk, gy, gy, base, slope, beta,
                TERMS, False, HAS_TOKENS, BLOCK, True, ACC,
            )  # fmt: skip


@triton.jit
def _fused_row(
    s_row, t_row, out_row, tokens_ptr, stats, losses_ptr, clipped_ptr, old_ptr, advantages_ptr, weights_ptr, row, V,
    s_inner, s_cap, s_factor, t_inner, t_cap, t_factor, slope, beta, value_scale, nll, clip,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_POLICY: tl.constexpr, WEIGHT_SINGLE_STEP: tl.constexpr, CLIP_WEIGHTED: tl.constexpr,
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    span, lanes = _span(s_row, V, BLOCK, WIDE), _lanes(BLOCK, PER)
    student = _side(s_row, span, V, s_inner, s_cap, s_factor, S_CAPPED, WIDE, ACC)
    teacher = student
    if TERMS is not None:
        teacher = _side(t_row, span, V, t_inner, t_cap, t_factor, T_CAPPED, WIDE, ACC)
    m, d, h, mt, dt, k = _summed(
        student, teacher, span, 0, span[3], lanes, TERMS, EXPECTATION, ENTROPY, BLOCK, ACC
    )  # fmt: skip
    lse, teacher_lse = m * _LN2 + tl.log(d), mt * _LN2 + tl.log(dt)
    x, u = lse, teacher_lse
    token = -1
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
        x = _framed_token(s_row, token, V, student, ACC)
        u = _framed_token(t_row, token, V, teacher, ACC) if TERMS is not None else x
        token = _column_of(token, span)
    _store_statistics(
        stats, student, teacher, x, u, m, d, h, mt, dt, k, TERMS, EXPECTATION, ENTROPY, HAS_TOKENS
    )  # fmt: skip
    value, center = tl.zeros([], ACC), tl.zeros([], ACC)
    if EXPECTATION != 0:
        value = _value(m, d, mt, dt, k, EXPECTATION)
        center = value if EXPECTATION == 1 else center
    elif TERMS is not None:
        value, center = _summed_terms(
            student, teacher, lse, teacher_lse, span, 0, span[3], lanes, beta, TERMS, BLOCK, ACC
        )  # fmt: skip
        tl.store(stats, value)
        tl.store(stats + 8, center)
    gk, gy, loss = tl.zeros([], ACC), -nll, tl.zeros([], ACC)
    if HAS_TOKENS:
        loss = tl.where(nll == 0.0, 0.0, -nll * (x - lse))
    if HAS_POLICY:
        w = tl.load(weights_ptr + row).to(ACC)
        old, advantage = tl.load(old_ptr + row).to(ACC), tl.load(advantages_ptr + row).to(ACC)
        term, policy_slope, clipped = _policy(x - lse, old, advantage, w, clip, CLIP_WEIGHTED)
        loss, gy = loss + term, gy + policy_slope
        tl.store(clipped_ptr + row, clipped)
    if HAS_VALUE:
        gk += value_scale
        if HAS_POLICY and WEIGHT_SINGLE_STEP:
            gk *= w
        loss += gk * value
    tl.store(losses_ptr + row, loss)
    out = _start(out_row, span, WIDE)
    if (value == float("inf")) | ((gk == 0.0) & (gy == 0.0)):
        for i in range(0, span[3]):
            _clear_tile(out, i, span, lanes, BLOCK)
    else:
        tl.debug_barrier()  # `out` may be the student's logits: all have been read
        _row_gradient(
            student, teacher, out, lse, teacher_lse, span, lanes, token, gk, gy, -(gk * center + gy), slope, beta,
            TERMS if HAS_VALUE else None, HAS_TOKENS, EXPECTATION != 0 or TERMS is None, BLOCK, ACC,
        )  # fmt: skip


@_kernel
def _fused_kernel(
    s_ptr, t_ptr, tokens_ptr, live_ptr, stats_ptr, losses_ptr, clipped_ptr, old_ptr, advantages_ptr, weights_ptr,
    divisor_ptr, out_ptr, N: tl.int32, V: tl.int32, s_stride: tl.int64, t_stride: tl.int64, out_stride: tl.int64,
    s_inner: tl.float64, s_cap: tl.float64, s_factor: tl.float64,
    t_inner: tl.float64, t_cap: tl.float64, t_factor: tl.float64, slope: tl.float64, beta: tl.float64,
    value_scale: tl.float64, nll: tl.float64, clip: tl.float64,
    TERMS: tl.constexpr, EXPECTATION: tl.constexpr, ENTROPY: tl.constexpr, HAS_TOKENS: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_VALUE: tl.constexpr, HAS_POLICY: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    WEIGHT_SINGLE_STEP: tl.constexpr, CLIP_WEIGHTED: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,
    WIDE: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    slope, beta, clip = tl.full([], slope, ACC), tl.full([], beta, ACC), tl.full([], clip, ACC)
    value_scale, nll = tl.full([], value_scale, ACC), tl.full([], nll, ACC)
    if HAS_DIVISOR:
        slope = slope / tl.load(divisor_ptr).to(ACC)
    for i in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + i
        s_row, t_row, out_row = s_ptr + row * s_stride, t_ptr + row * t_stride, out_ptr + row * out_stride
        live = 1
        if HAS_LIVE:
            live = tl.load(live_ptr + row).to(tl.int32)
        if live == 0:  # never read
            span = _span(s_row, V, BLOCK, WIDE)
            out = _start(out_row, span, WIDE)
            for k in range(0, span[3]):
                _clear_tile(out, k, span, _lanes(BLOCK, PER), BLOCK)
        else:
            _fused_row(
                s_row, t_row, out_row, tokens_ptr, stats_ptr + row * _COLUMNS, losses_ptr, clipped_ptr, old_ptr,
                advantages_ptr, weights_ptr, row, V, s_inner, s_cap, s_factor, t_inner, t_cap, t_factor, slope, beta,
                value_scale, nll, clip, TERMS, EXPECTATION, ENTROPY, HAS_TOKENS, HAS_VALUE, HAS_POLICY,
                WEIGHT_SINGLE_STEP, CLIP_WEIGHTED, S_CAPPED, T_CAPPED, WIDE, PER, BLOCK, ACC,
            )  # fmt: skip


@_kernel
def _scale_kernel(out_ptr, factor_ptr, N: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        lanes, full = tl.arange(0, BLOCK), N // BLOCK
        for i in range(tl.program_id(0), full, tl.num_programs(0)):
            tile = out_ptr + (tl.full([], 0, tl.int64) + i) * BLOCK
            x = tl.multiple_of(tile, 16) + lanes  # said of an argument itself, Triton forgets it
            tl.store(x, (tl.load(x) * factor).to(out_ptr.dtype.element_ty))
        if tl.program_id(0) == 0:
            last = full * BLOCK + lanes
            x = tl.load(out_ptr + last, mask=last < N, other=0.0) * factor
            tl.store(out_ptr + last, x.to(out_ptr.dtype.element_ty), mask=last < N)


INTERPRETED = not isinstance(_statistics_kernel, triton.JITFunction)
