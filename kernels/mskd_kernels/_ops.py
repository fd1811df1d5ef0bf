"""The ops of torch.library (namespace `mskd`): what autograd, torch.compile and export see of this package.

    row_statistics, row_gradient     logits given: statistics forward, the gradient in backward
    row_loss                         logits given: a scalar, its gradient made in forward, scaled in backward
    head_statistics, head_gradient   from hidden states: the logits are made again in backward
    head_loss                        from hidden states: a scalar, its gradient made in forward, scaled in backward

Masks go in as they are and valid rows are gathered inside, so that no shape outside depends on data. Settings are
numbers and names (a divergence goes by its name), since that is all a schema can hold. Backward calls an op too, and
refuses a second derivative.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mskd_kernels import _rows
from mskd_kernels._chunks import Gradients, Head, Heads, head_gradient, head_loss, head_statistics, times
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._kinds import resolve_kind
from mskd_kernels._row_op import (
    COLUMNS,
    ENTROPY,
    LOGPROB,
    TEACHER_LOGPROB,
    VALUE,
    Coefficients,
    Objective,
    Policy,
    RowOp,
    Side,
)


class Settings(NamedTuple):
    """A RowOp in the terms of a schema. kind None: there is no teacher; beta None: the kind has none."""

    kind: str | None
    beta: float | None
    backend: str
    temperature: float
    entropy: bool
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None

    def op(self) -> RowOp:
        kind = None if self.kind is None else resolve_kind(self.kind, self.beta)
        sides = Side(self.scale, self.softcap), Side(self.teacher_scale, self.teacher_softcap)
        return RowOp(kind, self.backend, self.temperature, *sides, self.entropy)


class Rows(NamedTuple):
    """student, teacher [N, V] with columns beside each other; tokens int64 [N]; mask bool [N]."""

    student: Tensor
    teacher: Tensor
    tokens: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, tokens: Tensor | None, mask: Tensor | None) -> "Rows":
        """From logits [..., V] of any strides; tokens and mask are flat already."""
        return cls(_as_rows(student), _as_rows(teacher), tokens, mask)

    def common(self) -> tuple[Tensor, Tensor]:
        """The columns that both have: beyond, one of the vocabularies is padding."""
        vocabulary = min(self.student.shape[1], self.teacher.shape[1])
        return self.student[:, :vocabulary], self.teacher[:, :vocabulary]


def _refuse_probabilities(rows: Rows) -> None:
    """ValueError where a side's first row sums to 1 and holds nothing below 0: what F.kl_div takes is no logits.

    On the CPU alone; here, within the op, there is a value to look at under torch.compile and vmap too.
    """
    for name, x in (("student_logits", rows.student), ("teacher_logits", rows.teacher)):
        if x.device.type == "cpu" and x.shape[0] and x.shape[1] >= _FEWEST_PROBABILITIES:
            rounding = 1e-2 if x.element_size() == 2 else 1e-4
            if float(x[0].amin()) >= 0 and abs(float(x[0].sum(dtype=torch.float64)) - 1) < rounding:
                raise ValueError(f"{name} are probabilities: give logits or log-probabilities, as from log_softmax")


def _as_rows(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class Batch(NamedTuple):
    """hidden [N, H], weight [V, H], bias [V] of both sides; tokens int64 [N]; mask bool [N], also one on the CPU."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def heads(self, op: RowOp, chunk_bytes: int) -> Heads:
        student, teacher = Head(self.hidden, self.weight, self.bias), None
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            teacher = Head(self.teacher_hidden, self.teacher_weight, self.teacher_bias)
        return Heads(student, teacher, self.tokens, self.mask, op, chunk_bytes)

    def dtype(self) -> torch.dtype:
        return accumulate_dtype(self.hidden, self.teacher_hidden)


class Fields(NamedTuple):
    """What the row op says of each token, [N] each; teacher_logprob has no gradient."""

    value: Tensor
    logprob: Tensor
    teacher_logprob: Tensor
    entropy: Tensor


_FEWEST_PROBABILITIES = 16  # columns: fewer logits could be such by chance
_ROWS = "Tensor student, Tensor teacher, Tensor? tokens, Tensor? mask"
_BATCH = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? tokens, Tensor? mask"
)
_SETTINGS = (
    "str? kind, float? beta, str backend, float temperature, bool entropy, float scale, float? softcap, "
    "float teacher_scale, float? teacher_softcap"
)
_UPSTREAM = "Tensor? of_value, Tensor? of_logprob, Tensor? of_entropy"
_OBJECTIVE = (
    "float value, float nll, Tensor? old_logprobs, Tensor? advantages, Tensor? importance_weights, float clip, "
    "bool weight_single_step, bool clip_weighted_ratio"
)
_DIVISOR = "Tensor? divisor, Tensor? weights"
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"
_NO_POLICY = (None, None, None, 0.0, False, False)
_STATISTICS = "(Tensor value, Tensor logprob, Tensor teacher_logprob, Tensor entropy, Tensor statistics)"


class _Loss(NamedTuple):
    """An Objective with its divisor and weights, in the terms of a schema."""

    value: float
    nll: float
    old_logprobs: Tensor | None
    advantages: Tensor | None
    importance_weights: Tensor | None
    clip: float
    weight_single_step: bool
    clip_weighted_ratio: bool
    divisor: Tensor | None
    weights: Tensor | None

    @classmethod
    def of(cls, objective: Objective, divisor: Tensor | None) -> "_Loss":
        policy = _NO_POLICY if objective.policy is None else objective.policy
        return cls._make((*objective[:2], *policy, divisor, objective.weights))

    def objective(self) -> Objective:
        constants: Any = self[2:8]
        policy = None if self.old_logprobs is None else Policy(*constants)
        return Objective(self.value, self.nll, policy, weights=self.weights)


def _split(args: Any, tensors: Any) -> Any:
    """An op's arguments -> (Rows or Batch, Settings, the rest)."""
    first = len(tensors._fields)
    second = first + len(Settings._fields)
    return tensors(*args[:first]), Settings(*args[first:second]), args[second:]


def _op(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"mskd::{name}", mutates_args=(), schema=schema)


# Logits given ---------------------------------------------------------------------------------------------------------


def logits_fields(rows: Rows, settings: Settings) -> Fields:
    """Differentiable in the student's logits."""
    return Fields(*row_statistics(*rows, *settings)[:4])


@_op("row_statistics", f"({_ROWS}, {_SETTINGS}) -> {_STATISTICS}")
def row_statistics(*args: Any) -> tuple[Tensor, ...]:
    rows, settings, _ = _split(args, Rows)
    _refuse_probabilities(rows)
    s, t = rows.common()
    stats = _rows.statistics(settings.op(), s, t, rows.tokens, rows.mask)
    return (*_columns(stats), stats)


@row_statistics.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _fake_statistics(student, accumulate_dtype(student, teacher))


@_op("row_gradient", f"({_ROWS}, {_SETTINGS}, Tensor statistics, {_UPSTREAM}) -> Tensor")
def row_gradient(*args: Any) -> Tensor:
    rows, settings, (stats, *upstream) = _split(args, Rows)
    s, t = rows.common()
    grad = _empty_gradient(rows.student, rows.student.dtype)
    grad[:, s.shape[1] :] = 0
    _rows.gradient(settings.op(), s, t, rows.tokens, stats, Coefficients(*upstream), grad[:, : s.shape[1]], rows.mask)
    return grad


@row_gradient.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return _empty_gradient(student, student.dtype)


def _empty_gradient(student: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(student, dtype=dtype, memory_format=torch.contiguous_format)


def _row_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    coefficients, saved = _coefficients(ctx, upstream), ctx.saved_tensors  # a checkpoint unpacks only once
    grad = None
    if any(c is not None for c in coefficients):
        grad = row_gradient(*saved[:4], *ctx.rest, saved[4], *coefficients)
    return grad, *(None,) * (3 + len(ctx.rest))


# Logits given, the gradient made in forward ---------------------------------------------------------------------------


def logits_loss(
    rows: Rows, settings: Settings, objective: Objective, divisor: Tensor | None
) -> tuple[Tensor, Fields, Tensor]:
    """(sum of the objective over valid tokens / divisor, detached fields, clip flags bool [N])."""
    loss, stats, clipped, _ = row_loss(*rows, *settings, *_Loss.of(objective, divisor))
    return loss, Fields(*stats[:, :4].unbind(1)), clipped


@_op(
    "row_loss",
    f"({_ROWS}, {_SETTINGS}, {_OBJECTIVE}, {_DIVISOR}) -> "
    "(Tensor loss, Tensor statistics, Tensor clipped, Tensor of_student)",
)
def row_loss(*args: Any) -> tuple[Tensor, ...]:
    rows, settings, rest = _split(args, Rows)
    given = _Loss(*rest)
    _refuse_probabilities(rows)
    s, t = rows.common()
    grad = _empty_gradient(rows.student, _stored(rows.student.dtype))
    grad[:, s.shape[1] :] = 0
    objective = given.objective()._replace(divisor=given.divisor)
    stats, losses, clipped = _rows.fused(settings.op(), s, t, rows.tokens, objective, grad[:, : s.shape[1]], rows.mask)
    total = losses.sum()
    return total if given.divisor is None else total / given.divisor, stats, clipped, grad


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient whose last factor is not known yet: float16 has too few exponents to be scaled later."""
    return torch.float32 if dtype == torch.float16 else dtype


@row_loss.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, ...]:
    stats = _fake_statistics(student, accumulate_dtype(student, teacher))[4]
    clipped = stats.new_empty(stats.shape[0], dtype=torch.bool)
    return stats.new_empty(()), stats, clipped, _empty_gradient(student, _stored(student.dtype))


def _row_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, settings, _ = _split(inputs, Rows)
    ctx.dtype, ctx.backend = rows.student.dtype, settings.backend
    ctx.save_for_backward(output[3])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _row_loss_backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    (grad,) = ctx.saved_tensors
    made = None if upstream is None else _scaled(grad, upstream, ctx.dtype, ctx.backend)
    return made, *(None,) * (len(ctx.needs_input_grad) - 1)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    keep = _graph_is_kept()
    if grad.dtype == dtype and type(grad) is Tensor and _rows.scales(backend, grad):  # a tracer's is no memory
        return _rows.scale(grad.clone() if keep else grad, factor)
    return times(grad, factor, dtype, keep)


# From hidden states, logits made again --------------------------------------------------------------------------------


def hidden_fields(batch: Batch, settings: Settings, chunk_bytes: int) -> Fields:
    """Differentiable in the student's hidden states, weight and bias, for any upstream gradient a token."""
    return Fields(*hidden_statistics(*batch, *settings, chunk_bytes)[:4])


@_op("head_statistics", f"({_BATCH}, {_SETTINGS}, int chunk_bytes) -> {_STATISTICS}")
def hidden_statistics(*args: Any) -> tuple[Tensor, ...]:
    batch, settings, (chunk_bytes,) = _split(args, Batch)
    stats = head_statistics(batch.heads(settings.op(), chunk_bytes))
    return (*_columns(stats), stats)


@hidden_statistics.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    batch, *_ = _split(args, Batch)
    return _fake_statistics(batch.hidden, batch.dtype())


@_op(
    "head_gradient",
    f"({_BATCH}, {_SETTINGS}, int chunk_bytes, Tensor statistics, {_UPSTREAM}, {_WANTED}) -> (Tensor, Tensor, Tensor)",
)
def hidden_gradient(*args: Any) -> tuple[Tensor, ...]:
    batch, settings, (chunk_bytes, stats, value, logprob, entropy, *wanted) = _split(args, Batch)
    heads = batch.heads(settings.op(), chunk_bytes)
    return _filled(batch, head_gradient(heads, stats, Coefficients(value, logprob, entropy), wanted))


@hidden_gradient.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    batch, _, rest = _split(args, Batch)
    return _fake_gradients(batch, rest[-3:])


def _hidden_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    coefficients, wanted, saved = _coefficients(ctx, upstream), ctx.needs_input_grad[:3], ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None,) * 3
    if any(c is not None for c in coefficients) and any(wanted):
        grads = hidden_gradient(*saved[:8], *ctx.rest, saved[8], *coefficients, *wanted)
        grads = tuple(g if want else None for g, want in zip(grads, wanted, strict=True))
    return *grads, *(None,) * (5 + len(ctx.rest))


# From hidden states, the gradient made in forward ---------------------------------------------------------------------


def hidden_loss(
    batch: Batch, settings: Settings, chunk_bytes: int, objective: Objective, divisor: Tensor | None
) -> tuple[Tensor, Fields, Tensor]:
    """(sum of the objective over valid tokens / divisor, detached fields, clip flags bool [N])."""
    wanted = (x is not None and x.requires_grad and torch.is_grad_enabled() for x in batch[:3])
    out = summed_loss(*batch, *settings, *_Loss.of(objective, divisor), chunk_bytes, *wanted)
    return out[0], Fields(*out[1][:, :4].unbind(1)), out[2]


@_op(
    "head_loss",
    f"({_BATCH}, {_SETTINGS}, {_OBJECTIVE}, {_DIVISOR}, int chunk_bytes, {_WANTED}) -> "
    "(Tensor loss, Tensor statistics, Tensor clipped, Tensor of_hidden, Tensor of_weight, Tensor of_bias)",
)
def summed_loss(*args: Any) -> tuple[Tensor, ...]:
    batch, settings, rest = _split(args, Batch)
    given, chunk_bytes, wanted = _Loss(*rest[:-4]), rest[-4], rest[-3:]
    heads = batch.heads(settings.op(), chunk_bytes)
    loss, stats, clipped, grads = head_loss(heads, given.objective(), given.divisor, wanted)
    return loss, stats, clipped, *_filled(batch, grads)


@summed_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    batch, _, rest = _split(args, Batch)
    stats = _fake_statistics(batch.hidden, batch.dtype())[4]
    clipped = stats.new_empty(stats.shape[0], dtype=torch.bool)
    return stats.new_empty(()), stats, clipped, *_fake_gradients(batch, rest[-3:], sums=True)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    batch, _, rest = _split(inputs, Batch)
    divisor = _Loss(*rest[:-4]).divisor
    pending = divisor is not None and divisor.device.type != "cpu"  # else the gradients are divided already
    ctx.save_for_backward(*batch[:3], *output[3:], divisor if pending else None)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _loss_backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    saved = ctx.saved_tensors
    student, grads, divisor = saved[:3], saved[3:6], saved[6]
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    scale = upstream if divisor is None else upstream / divisor
    keep = _graph_is_kept()
    wanted = ctx.needs_input_grad[:3]
    made = (times(g, scale, x.dtype, keep) if want else None for g, x, want in zip(grads, student, wanted, strict=True))
    return *made, *(None,) * (len(ctx.needs_input_grad) - 3)


def _graph_is_kept() -> bool:
    """Whether this backward may run again (retain_graph), so that what it hands on must not be what it saved."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


# What they share ------------------------------------------------------------------------------------------------------


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], tensors: Any) -> None:
    given, settings, rest = _split(inputs, tensors)
    ctx.save_for_backward(*given, output[4])
    ctx.tokens, ctx.settings, ctx.rest = given.tokens is not None, settings, (*settings, *rest)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2], output[4])


def _refuse_second_derivative() -> None:
    """Backward runs with gradients enabled only where a second derivative is wanted (create_graph=True)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the losses of mskd_kernels have no second derivative: call backward without create_graph, or use the "
            "plain-torch <op>_reference"
        )


def _coefficients(ctx: Any, upstream: tuple[Tensor | None, ...]) -> Coefficients:
    """Gradients of outputs that hold nothing are dropped: torch.compile fills them in with zeros."""
    value, logprob, _, entropy, _ = upstream
    return Coefficients(
        None if ctx.settings.kind is None else value,
        logprob if ctx.tokens else None,
        entropy if ctx.settings.entropy else None,
    )


row_statistics.register_autograd(_row_backward, setup_context=partial(_context, tensors=Rows))
hidden_statistics.register_autograd(_hidden_backward, setup_context=partial(_context, tensors=Batch))
row_loss.register_autograd(_row_loss_backward, setup_context=_row_loss_context)
summed_loss.register_autograd(_loss_backward, setup_context=_loss_context)


def _columns(stats: Tensor) -> tuple[Tensor, ...]:
    return tuple(stats[:, i].clone() for i in (VALUE, LOGPROB, TEACHER_LOGPROB, ENTROPY))


def _filled(batch: Batch, grads: Gradients) -> tuple[Tensor, ...]:
    """An op returns tensors: an empty one for a gradient that is not wanted."""
    return tuple(batch.hidden.new_empty(0) if g is None else g for g in grads)


def _fake_statistics(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens = like.shape[0]
    fields = (like.new_empty(tokens, dtype=dtype) for _ in range(4))
    return (*fields, like.new_empty(tokens, COLUMNS, dtype=dtype))


def _fake_gradients(batch: Batch, wanted: tuple[bool, ...], sums: bool = False) -> tuple[Tensor, ...]:
    def fake(x: Tensor | None, want: bool) -> Tensor:
        if x is None or not want:
            return batch.hidden.new_empty(0)
        return x.new_empty(x.shape, dtype=accumulate_dtype(batch.hidden) if sums else x.dtype)

    return tuple(fake(x, want) for x, want in zip(batch[:3], wanted, strict=True))
