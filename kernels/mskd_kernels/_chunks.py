"""Chunks of tokens through lm_heads and the row op: the mechanism of every linear op. No [N, V] tensor exists.

A part of the tokens at a time: its raw logits by vendor GEMMs in the hidden states' dtype, the row op on them, the
gradient in the logits in their place, two GEMMs from there. All buffers are made once. Logits are never rounded to 16
bits, which costs several percent of the gradient, and most of it where the sides are close: of 16-bit hidden states
CUDA's GEMMs write float32, elsewhere states and weight are cast to float32 first. Where logits are wider than
the hidden states their gradient has a buffer of its own, in the hidden states' dtype and for more tokens than one part
(a group): the gradient of the weight, [V, H] in float32, is then read and written once a group.

The gradient in the logits is stored unscaled; factors such as 1/N come afterwards, in float32. Weight gradients are
summed in float32, in the order of the tokens. Nothing here knows autograd: `_ops` does.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mskd_kernels import _rows
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._row_op import COLUMNS, Coefficients, Objective, RowOp, evaluate

_MOST_TOKENS = 4096
_MOST_TOKENS_CPU = 256  # beyond, GEMMs gain nothing and memory traffic grows
_PRODUCT_BYTES = 256 * 1024**2  # of a product before it is added
_ALIGNMENT = 128  # bytes: rows of our own buffers start on such boundaries


class Head(NamedTuple):
    """hidden [N, H], weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Gradients(NamedTuple):
    """Of a head's three tensors; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Heads:
    """Both sides, of the valid tokens, ready for the GEMMs: weights are cast once, and only where they must be."""

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        op: RowOp,
        chunk_bytes: int,
    ):
        self.op, self.given, self.total = op, student, student.hidden.shape[0]
        self.rows = None if mask is None else mask.nonzero().squeeze(1).to(student.hidden.device, non_blocking=True)
        self.vocabulary = min(x.weight.shape[0] for x in (student, teacher) if x is not None)
        self.student = self._prepare(student)
        self.teacher = None if teacher is None else self._prepare(teacher)
        self.tokens = None if tokens is None else self.gather(tokens)
        self.dtype = accumulate_dtype(student.hidden, None if teacher is None else teacher.hidden)
        self.count = self.student.hidden.shape[0]
        self.part, self.group = self._sizes(chunk_bytes)
        self.buffers: dict[str, Tensor] = {}

    def _prepare(self, head: Head) -> Head:
        dtype = _gemm_dtype(head.hidden)
        bias = None if head.bias is None else head.bias[: self.vocabulary].to(dtype)
        return Head(self.gather(head.hidden).to(dtype), head.weight[: self.vocabulary].to(dtype), bias)

    def gather(self, x: Tensor) -> Tensor:
        """One entry a token -> those of the valid tokens."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def scatter(self, x: Tensor) -> Tensor:
        """One entry a valid token -> all tokens, 0 where they do not count."""
        if self.rows is None:
            return x
        return x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, self.rows, x)

    def new(self, *columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros, one entry a valid token."""
        return self.student.hidden.new_zeros(self.count, *columns, dtype=dtype or self.dtype)

    def _sizes(self, chunk_bytes: int) -> tuple[int, int]:
        """Tokens of a part, whose logits exist at one time, and of a group, whose gradients in the logits do."""
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        logits = sum(_output_dtype(x.hidden).itemsize for x in sides) * self.vocabulary
        most = _MOST_TOKENS_CPU if self.student.hidden.device.type == "cpu" else _MOST_TOKENS
        if not self.separate:
            part = _equal(self.count, min(most, chunk_bytes // logits))
            return part, part
        gradient = self.student.hidden.dtype.itemsize * self.vocabulary
        group = _equal(self.count, min(most, chunk_bytes // 2 // gradient))
        return _equal(group, chunk_bytes // 2 // logits), group

    @property
    def separate(self) -> bool:
        """Whether the gradient in the logits is narrower than they are and cannot take their place."""
        return _output_dtype(self.student.hidden) != self.student.hidden.dtype

    def groups(self) -> Iterator[slice]:
        return _slices(0, self.count, self.group)

    def parts(self, group: slice | None = None) -> Iterator[slice]:
        start, stop = (0, self.count) if group is None else (group.start, group.stop)
        return _slices(start, stop, self.part)

    def logits(self, part: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Raw logits of both sides [n, V], valid until the next part, and the tokens [n]."""
        return (
            self._project("student", self.student, part),
            None if self.teacher is None else self._project("teacher", self.teacher, part),
            None if self.tokens is None else self.tokens[part],
        )

    def _project(self, name: str, head: Head, part: slice) -> Tensor:
        hidden, out = head.hidden[part], _output_dtype(head.hidden)
        logits = self._buffer(name, self.part, out)[: hidden.shape[0]]
        if out != hidden.dtype:
            torch.mm(hidden, head.weight.t(), out_dtype=out, out=logits)
            return logits if head.bias is None else logits.add_(head.bias)
        if head.bias is None:
            return torch.mm(hidden, head.weight.t(), out=logits)
        return torch.addmm(head.bias, hidden, head.weight.t(), out=logits)

    def place(self, group: slice, part: slice, s: Tensor) -> Tensor:
        """Where the gradient in the student's logits s of a part goes: into their place, or into the group's buffer."""
        if not self.separate:
            return s
        return self.gradient(group)[part.start - group.start : part.stop - group.start]

    def gradient(self, group: slice) -> Tensor:
        """The gradients in the student's raw logits of a group, in the dtype of its hidden states."""
        name = "gradient" if self.separate else "student"
        return self._buffer(name, self.group, self.student.hidden.dtype)[: group.stop - group.start]

    def _buffer(self, name: str, tokens: int, dtype: torch.dtype) -> Tensor:
        """[tokens, V] with aligned rows, the same memory every time."""
        if name not in self.buffers:
            unit = _ALIGNMENT // dtype.itemsize
            columns = -(-self.vocabulary // unit) * unit
            self.buffers[name] = self.student.hidden.new_empty(tokens, columns, dtype=dtype)[:, : self.vocabulary]
        return self.buffers[name]


def head_statistics(heads: Heads) -> Tensor:
    """Statistics [N, COLUMNS], 0 where masked."""
    stats = heads.new(COLUMNS)
    with _no_autocast(stats):
        for part in heads.parts():
            stats[part] = _rows.statistics(heads.op, *heads.logits(part))
    return heads.scatter(stats)


def head_gradient(heads: Heads, stats: Tensor, upstream: Coefficients, wanted: tuple[bool, ...]) -> Gradients:
    """Gradients for any coefficients a token, from statistics [N, COLUMNS]; logits are made again."""
    stats, upstream = heads.gather(stats), Coefficients(*(None if g is None else heads.gather(g) for g in upstream))
    scale = _largest(upstream) if heads.student.hidden.dtype == torch.float16 else None
    if scale is not None:
        upstream = Coefficients(*(None if g is None else g / scale for g in upstream))
    sums = _GradientSums(heads, wanted)
    with _no_autocast(stats):
        for group in heads.groups():
            for part in heads.parts(group):
                s, t, tokens = heads.logits(part)
                coefficients = Coefficients(*(None if g is None else g[part] for g in upstream))
                _rows.gradient(heads.op, s, t, tokens, stats[part], coefficients, heads.place(group, part, s))
            sums.add(group)
        made = zip(sums.result(), heads.given, strict=True)
        return Gradients(*(None if g is None or x is None else times(g, scale, x.dtype) for g, x in made))


def head_loss(
    heads: Heads, objective: Objective, divisor: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """The loss of the valid tokens over the divisor, statistics [N, COLUMNS], clip flags [N], and the gradients.

    The gradients, in the dtype that sums are made in, are those of the loss if the divisor lies on the CPU; they lack
    the division if it lies on a GPU, where looking at it would synchronise.
    """
    stats, losses, clipped = heads.new(COLUMNS), heads.new(), heads.new(dtype=torch.bool)
    objective = objective.each(heads.gather)
    sums = _GradientSums(heads, wanted, 1 / float(divisor) if divisor is not None and _on_host(divisor) else 1.0)
    with _no_autocast(stats):
        for group in heads.groups():
            for part in heads.parts(group):
                out = _loss_of(heads, objective.at(part), group, part, any(wanted))
                stats[part], losses[part], clipped[part] = out
            if any(wanted):
                sums.add(group)
        total = losses.sum()
        total = total if divisor is None else total / divisor
        return total, heads.scatter(stats), heads.scatter(clipped), sums.result()


def _loss_of(
    heads: Heads, objective: Objective, group: slice, part: slice, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    s, t, tokens = heads.logits(part)
    if backward:
        return _rows.fused(heads.op, s, t, tokens, objective, heads.place(group, part, s))
    stats = _rows.statistics(heads.op, s, t, tokens)
    losses, clipped, _ = evaluate(objective, stats)
    return stats, losses, clipped


class _GradientSums:
    """Gradients in the student's hidden states, weight and bias, summed over groups in float32 or float64."""

    def __init__(self, heads: Heads, wanted: tuple[bool, ...], scale: float = 1.0):
        self.heads, self.scale = heads, scale
        dtype = accumulate_dtype(heads.student.hidden)
        hidden, (_, weight, bias) = heads.student.hidden, heads.given
        self.hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
        self.weight = torch.empty_like(weight, dtype=dtype) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None
        if self.weight is not None:
            self.weight[heads.vocabulary if heads.count else 0 :] = 0  # the first group overwrites the rest

    def add(self, group: slice) -> None:
        grad, head, vocabulary = self.heads.gradient(group), self.heads.student, self.heads.vocabulary
        if self.hidden is not None:
            _add_product(grad, head.weight, self.hidden[group], self.scale, first=True)
        if self.weight is not None:
            _add_product(grad.t(), head.hidden[group], self.weight[:vocabulary], self.scale, first=group.start == 0)
        if self.bias is not None:
            self.bias[:vocabulary].add_(grad.sum(0, dtype=self.bias.dtype), alpha=self.scale)

    def result(self) -> Gradients:
        return Gradients(None if self.hidden is None else self.heads.scatter(self.hidden), self.weight, self.bias)


def _add_product(a: Tensor, b: Tensor, out: Tensor, scale: float, first: bool) -> None:
    """out = scale a @ b where first, else out += scale a @ b; nothing is rounded to the dtype of a and b."""
    wide = _output_dtype(a)
    if wide == a.dtype:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=0 if first else 1, alpha=scale)
    elif first:
        torch.mm(a, b, out_dtype=wide, out=out)
        if scale != 1.0:
            out.mul_(scale)
    else:  # torch has no 16-bit GEMM that adds to float32: some rows at a time, for their product takes memory
        size = max(128, _PRODUCT_BYTES // (b.shape[1] * wide.itemsize) // 128 * 128)
        for rows in _slices(0, a.shape[0], size):
            out[rows].add_(torch.mm(a[rows], b, out_dtype=wide), alpha=scale)


def times(x: Tensor, scale: Tensor | None, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """x * scale, rounded once to dtype; without `copy` in the memory of x where that can be."""
    if scale is None or (_on_host(scale) and float(scale) == 1.0):
        return x.to(dtype, copy=copy)
    if not copy and x.dtype == dtype and type(x) is Tensor:  # a tracer's is no memory
        return x.mul_(scale)
    return (x * scale).to(dtype)


def _on_host(x: Tensor) -> bool:
    """Whether its value can be had at no cost: a real tensor (no tracer's) on the CPU."""
    return type(x) is Tensor and x.device.type == "cpu"


def _equal(tokens: int, most: int) -> int:
    """The size of chunks of at most so many tokens, equally many in each: no small last one."""
    chunks = -(-tokens // max(1, most))
    return -(-tokens // chunks) if chunks else 1


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _gemm_dtype(x: Tensor) -> torch.dtype:
    """Of a GEMM's inputs, for hidden states x: float32 for 16 bits where no GEMM of theirs writes float32."""
    return torch.float32 if not x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _output_dtype(x: Tensor) -> torch.dtype:
    """Of a GEMM of x: float32 for 16-bit inputs on CUDA, the only place where torch offers it."""
    return torch.float32 if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _largest(upstream: Coefficients) -> Tensor:
    """The largest coefficient, by which all are divided: 1/N in float16 would flush part of the gradient to zero."""
    largest = torch.stack([g.abs().max() for g in upstream if g is not None]).max()
    return largest.masked_fill(~largest.isfinite() | (largest == 0), 1.0)


def _no_autocast(x: Tensor) -> Any:
    """The ops choose their dtypes themselves."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
