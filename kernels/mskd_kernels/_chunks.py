"""Chunks of tokens through lm_heads and the row op: the mechanism of every linear op. No [N, V] tensor exists.

A chunk's raw logits come from vendor GEMMs in the hidden states' dtype (float32 outputs on CUDA, where torch offers
them, since rounding logits to 16 bits costs several percent of the gradient). The gradient in the logits is stored
unscaled in the hidden states' dtype; upstream factors such as 1/N come afterwards, in float32. Weight gradients are
summed in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mskd_kernels import _rows
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._rows import Coefficients, RowOp

CHUNK_BYTES = 256 * 1024**2
_MOST_TOKENS = 4096
_MOST_TOKENS_CPU = 256  # beyond, GEMMs gain nothing and memory traffic grows

# (value, log q(y)) [n] of a chunk of valid tokens, and which -> (the loss a token, flags a token) [n]
Objective = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
# hidden [N, H], weight [V, H], bias [V] or None
Head = tuple[Tensor, Tensor, Tensor | None]


def head_statistics(
    student: Head,
    teacher: Head | None,
    tokens: Tensor | None,
    rows: Tensor | None,
    op: RowOp,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, log q(token), log p(token), entropy), each [N], 0 outside `rows`; logits are made again in backward."""
    return _HeadStatistics.apply(*student, *(teacher or (None, None, None)), tokens, rows, op, chunk_bytes)


def head_loss(
    student: Head,
    teacher: Head,
    tokens: Tensor | None,
    rows: Tensor | None,
    op: RowOp,
    chunk_bytes: int,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the objective over valid tokens, statistics [N, 9], flags [N]); the gradient is made here and now."""
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in student)
    return _HeadLoss.apply(*student, *teacher, tokens, rows, op, chunk_bytes, objective, needs)


def valid_rows(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The indices of valid tokens on `device`; None where all are. Synchronises if the mask lies on a GPU."""
    return None if mask is None else mask.nonzero().squeeze(1).to(device, non_blocking=True)


class _HeadStatistics(torch.autograd.Function):
    """Any upstream gradient a token: backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, t_hidden, t_weight, t_bias, tokens, rows, op, chunk_bytes):
        heads = _Heads((hidden, weight, bias), (t_hidden, t_weight, t_bias), tokens, rows, op, chunk_bytes)
        stats = hidden.new_zeros(heads.count, _rows.COLUMNS, dtype=heads.dtype)
        with _no_autocast(hidden):
            for part in heads.parts():
                stats[part] = heads.statistics(part, *heads.logits(part))
        ctx.save_for_backward(hidden, weight, bias, t_hidden, t_weight, t_bias, tokens, rows, stats)
        ctx.op, ctx.chunk_bytes = op, chunk_bytes
        ctx.set_materialize_grads(False)
        outputs = tuple(x.clone() for x in _scatter(stats, rows, hidden.shape[0])[:, :4].unbind(1))
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, g_value, g_logprob, _, g_entropy):
        _rows.refuse_second_derivative()
        student, teacher = ctx.saved_tensors[:3], ctx.saved_tensors[3:6]
        tokens, rows, stats = ctx.saved_tensors[6:]
        upstream = [g if g is None or rows is None else g[rows] for g in (g_value, g_logprob, g_entropy)]
        if all(g is None for g in upstream):
            return (None,) * 10
        heads = _Heads(student, teacher, tokens, rows, ctx.op, ctx.chunk_bytes)
        sums = _GradientSums(heads, student, ctx.needs_input_grad[:3])
        scale = _largest(upstream, like=stats)
        with _no_autocast(stats):
            for part in heads.parts():
                coefficients = Coefficients(*(None if g is None else g[part] / scale for g in upstream))
                sums.add(part, *heads.logits(part), stats[part], coefficients)
        return *_scaled(sums.result(rows, student[0].shape[0]), scale, student), *(None,) * 7


class _HeadLoss(torch.autograd.Function):
    """The upstream gradient is one scalar: the gradient is made in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, t_hidden, t_weight, t_bias, tokens, rows, op, chunk_bytes, objective, needs):
        student = (hidden, weight, bias)
        heads = _Heads(student, (t_hidden, t_weight, t_bias), tokens, rows, op, chunk_bytes)
        sums = _GradientSums(heads, student, needs)
        stats = hidden.new_zeros(heads.count, _rows.COLUMNS, dtype=heads.dtype)
        losses = hidden.new_zeros(heads.count, dtype=heads.dtype)
        flags = hidden.new_zeros(heads.count, dtype=torch.bool)
        with _no_autocast(hidden):
            for part in heads.parts():
                s, t = heads.logits(part)
                stats[part] = heads.statistics(part, s, t)
                losses[part], flags[part], coefficients = _evaluate(objective, stats[part], part)
                if any(needs):
                    sums.add(part, s, t, stats[part], coefficients)
        ctx.save_for_backward(*sums.result(rows, hidden.shape[0]))
        ctx.student = tuple(None if x is None else x.dtype for x in student)
        outputs = losses.sum(), *(_scatter(x, rows, hidden.shape[0]) for x in (stats, flags))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, upstream, *_):
        _rows.refuse_second_derivative()
        return *_scaled(ctx.saved_tensors, upstream, ctx.student), *(None,) * 9


class _Heads:
    """The raw logits of both sides, chunk by chunk, of the valid tokens; weights are cast once."""

    def __init__(self, student, teacher, tokens, rows, op: RowOp, chunk_bytes: int):
        self.op = op
        self.vocabulary = min(x[1].shape[0] for x in (student, teacher) if x[1] is not None)
        self.student = self._prepare(student, rows)
        self.teacher = self._prepare(teacher, rows) if teacher[0] is not None else None
        self.tokens = tokens if tokens is None or rows is None else tokens[rows]
        self.dtype = accumulate_dtype(student[0], teacher[0])
        self.count = self.student[0].shape[0]
        self.chunk = self._tokens_per_chunk(chunk_bytes)
        self.buffers: dict[str, Tensor] = {}

    def _prepare(self, head: Head, rows: Tensor | None) -> Head:
        hidden, weight, bias = head
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        weight = weight[: self.vocabulary].to(hidden.dtype)
        return hidden, weight, None if bias is None else bias[: self.vocabulary].to(hidden.dtype)

    def _tokens_per_chunk(self, chunk_bytes: int) -> int:
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        a_token = sum(_output_dtype(hidden).itemsize for hidden, _, _ in sides)
        if _output_dtype(self.student[0]) != self.student[0].dtype:
            a_token += self.student[0].dtype.itemsize  # the gradient in the logits cannot take their place
        most = _MOST_TOKENS_CPU if self.student[0].device.type == "cpu" else _MOST_TOKENS
        most = max(1, min(most, chunk_bytes // (a_token * self.vocabulary)))
        chunks = -(-self.count // most)
        return -(-self.count // chunks) if chunks else 1  # equal chunks: no small last one

    def parts(self) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, self.count)) for i in range(0, self.count, self.chunk))

    def buffer(self, name: str, tokens: int, dtype: torch.dtype) -> Tensor:
        """[tokens, V], the same memory for every chunk."""
        if name not in self.buffers:
            self.buffers[name] = self.student[0].new_empty(self.chunk, self.vocabulary, dtype=dtype)
        return self.buffers[name][:tokens]

    def logits(self, part: slice) -> tuple[Tensor, Tensor | None]:
        return self._project("student", self.student, part), (
            None if self.teacher is None else self._project("teacher", self.teacher, part)
        )

    def _project(self, name: str, head: Head, part: slice) -> Tensor:
        hidden, weight, bias = head[0][part], head[1], head[2]
        out = _output_dtype(hidden)
        if out != hidden.dtype:
            logits = torch.mm(hidden, weight.t(), out_dtype=out)
            return logits if bias is None else logits.add_(bias)
        logits = self.buffer(name, hidden.shape[0], out)
        return (
            torch.mm(hidden, weight.t(), out=logits)
            if bias is None
            else torch.addmm(bias, hidden, weight.t(), out=logits)
        )

    def statistics(self, part: slice, s: Tensor, t: Tensor | None) -> Tensor:
        return _rows.statistics(self.op, s, t, None if self.tokens is None else self.tokens[part])

    def gradient(self, part: slice, s: Tensor, t: Tensor | None, stats: Tensor, coefficients: Coefficients) -> Tensor:
        """Gradient in the raw student logits, in the hidden states' dtype; takes the place of `s` where it can."""
        dtype = self.student[0].dtype
        out = s if s.dtype == dtype else self.buffer("gradient", s.shape[0], dtype)
        _rows.gradient(self.op, s, t, None if self.tokens is None else self.tokens[part], stats, coefficients, out)
        return out


class _GradientSums:
    """Gradients in the student's hidden states, weight and bias, summed over chunks in float32 or float64."""

    def __init__(self, heads: _Heads, student: Any, needs: Any):
        self.heads = heads
        dtype = accumulate_dtype(heads.student[0])
        (hidden, _, _), (_, weight, bias) = heads.student, student
        self.hidden = torch.empty_like(hidden, dtype=dtype) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs[2] else None

    def add(self, part: slice, s: Tensor, t: Tensor | None, stats: Tensor, coefficients: Coefficients) -> None:
        grad = self.heads.gradient(part, s, t, stats, coefficients)
        hidden, weight, _ = self.heads.student
        vocabulary = self.heads.vocabulary
        if self.hidden is not None:
            _add_product(grad, weight, self.hidden[part], first=True)
        if self.weight is not None:
            _add_product(grad.t(), hidden[part], self.weight[:vocabulary])
        if self.bias is not None:
            self.bias[:vocabulary] += grad.sum(0, dtype=self.bias.dtype)

    def result(self, rows: Tensor | None, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return None if self.hidden is None else _scatter(self.hidden, rows, tokens), self.weight, self.bias


def _output_dtype(x: Tensor) -> torch.dtype:
    """Of a GEMM of x: float32 for 16-bit inputs on CUDA, the only place where torch offers it."""
    return torch.float32 if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _add_product(a: Tensor, b: Tensor, out: Tensor, first: bool = False) -> None:
    """out += a @ b, or out = a @ b; `out` may be wider than a and b, and nothing is rounded to their dtype."""
    if _output_dtype(a) != a.dtype:
        product = torch.mm(a, b, out_dtype=_output_dtype(a))
        (out.copy_ if first else out.add_)(product)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=0 if first else 1)


def _evaluate(objective: Objective, stats: Tensor, part: slice) -> tuple[Tensor, Tensor, Coefficients]:
    """The loss a token, flags, and the loss's derivatives by value and log-probability: autograd on [n] scalars."""
    with torch.enable_grad():
        value, logprob = (stats[:, i].clone().requires_grad_() for i in (_rows.VALUE, _rows.LOGPROB))
        losses, flags = objective(value, logprob, part)
        gk, gy = torch.autograd.grad(losses.sum(), (value, logprob), allow_unused=True)
    return losses.detach(), flags, Coefficients(gk, gy)


def _largest(upstream: list[Tensor | None], like: Tensor) -> Tensor:
    """The largest coefficient, by which all are divided: 1/N in 16 bits would flush part of the gradient to zero."""
    found = [g.abs().max() for g in upstream if g is not None and g.numel()]
    largest = torch.stack(found).max() if found else like.new_ones(())
    return largest.masked_fill(~largest.isfinite() | (largest == 0), 1.0)


def _scaled(grads: Any, scale: Tensor, student: Any) -> Iterator[Tensor | None]:
    dtypes = (x.dtype if isinstance(x, Tensor) else x for x in student)
    return (None if g is None else (g * scale).to(d) for g, d in zip(grads, dtypes, strict=True))


def _scatter(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """x of the valid tokens -> of all tokens, 0 elsewhere."""
    if rows is None:
        return x
    out = x.new_zeros(tokens, *x.shape[1:])
    out[rows] = x
    return out


def _no_autocast(x: Tensor) -> Any:
    """The ops choose their dtypes themselves."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
