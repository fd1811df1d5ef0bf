"""Divergences between student and teacher, a value a token, from logits. reverse_kl = KL(student || teacher).

Use: `loss = reverse_kl(student_logits, teacher_logits, mask=mask, reduction="mean"); loss.backward()`
"""

import torch
from torch import Tensor

from mskd_kernels import _inputs, _rows
from mskd_kernels._backend import resolve_backend
from mskd_kernels._rows import KINDS, Coefficients, Kind, RowOp


def divergence_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Kind = "reverse_kl",
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """`divergence` in plain torch with autograd: the formula, and the truth of the tests."""
    lq, lp = reference_logprobs(student_logits, teacher_logits, mask, temperature)
    values = reference_values(lq, lp, kind)
    return reduce(values, mask, reduction, denominator)


def reference_logprobs(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., V] of both sides on their common vocabulary; masked tokens: a uniform distribution."""
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    dtype = _inputs.accumulate_dtype(student, teacher)
    s, t = student[..., :vocabulary].to(dtype), teacher[..., :vocabulary].to(dtype)
    if mask is not None:
        s, t = (x.masked_fill(~(mask != 0)[..., None], 0.0) for x in (s, t))
    lq, lp = ((x / temperature).log_softmax(-1) for x in (s, t))
    return lq.masked_fill(s == -torch.inf, -torch.inf), lp.masked_fill(t == -torch.inf, -torch.inf)


def reference_values(lq: Tensor, lp: Tensor, kind: Kind) -> Tensor:
    """Divergence of log-probabilities [..., V] -> [...]: 0 * log 0 is 0; an infinite value has a gradient of 0.

    Where the first distribution has no mass at all it is NaN.
    """
    first, second = (lq, lp) if kind == "reverse_kl" else (lp, lq)
    infinite = ((second == -torch.inf) & (first > -torch.inf)).any(-1, keepdim=True)
    nothing = infinite | (first == -torch.inf)
    first, second = first.masked_fill(nothing, 0.0), second.masked_fill(nothing, 0.0)
    terms = (first.exp() * (first - second)).masked_fill(nothing, 0.0)
    nowhere = (nothing & ~infinite).all(-1)
    return terms.sum(-1).masked_fill(infinite[..., 0], torch.inf).masked_fill(nowhere, torch.nan)


def reduce(values: Tensor, mask: Tensor | None, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """Per-token values [...] -> themselves with 0 where masked, their sum, or their sum over `denominator`."""
    if mask is not None:
        values = values.masked_fill(mask.to(values.device) == 0, 0.0)
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / _inputs.count(mask, values.numel(), denominator, total)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Kind = "reverse_kl",
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of student and teacher, differentiable in the student's logits.

    student_logits [..., Vs], teacher_logits [..., Vt] (float16 to float64, dtypes may differ); compared on the common
    min(Vs, Vt) columns, the student's padding columns get zero gradient. mask [...]: 1 = counts; masked tokens are 0
    whatever their logits hold. kind: "reverse_kl" = KL(student || teacher), "forward_kl" = KL(teacher || student).
    reduction: "none" -> [...], "sum", or "mean" (over `denominator`, default the valid tokens). No factor T^2.
    Returns nats, float64 for float64 inputs, else float32. An infinite value has a gradient of 0. Raises ValueError.
    """
    shape = _inputs.check_logits(student_logits, teacher_logits)
    check_kind(kind)
    _inputs.check_settings(temperature, reduction)
    flat = _inputs.flat_mask(mask, shape, student_logits.device)
    op = RowOp(kind, resolve_backend(backend, student_logits.device), temperature)
    values = token_statistics(op, student_logits, teacher_logits, None, flat)[0]
    return reduce(values.reshape(shape), mask, reduction, denominator)


def reverse_kl_reference(student_logits: Tensor, teacher_logits: Tensor, **settings) -> Tensor:
    """`reverse_kl` in plain torch."""
    return divergence_reference(student_logits, teacher_logits, "reverse_kl", **settings)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(student || teacher) in nats: `divergence` with kind="reverse_kl"."""
    return divergence(
        student_logits,
        teacher_logits,
        "reverse_kl",
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        denominator=denominator,
        backend=backend,
    )


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; allowed: {', '.join(KINDS)}")


def token_statistics(
    op: RowOp, student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, log q(token), log p(token), entropy), each [N], of logits [..., V]; log p has no gradient."""
    student, teacher = (_as_rows(x) for x in (student_logits, teacher_logits))
    return _TokenStatistics.apply(student, teacher, tokens, mask, op)


def _as_rows(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _TokenStatistics(torch.autograd.Function):
    """The row op on logits that are given: statistics forward, gradient in backward."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, tokens: Tensor | None, mask: Tensor | None, op: RowOp):
        s, t = _common(student, teacher)
        stats = _rows.statistics(op, s, t, tokens, mask)
        ctx.save_for_backward(student, teacher, tokens, mask, stats)
        ctx.op = op
        ctx.set_materialize_grads(False)
        outputs = tuple(x.clone() for x in stats[:, :4].unbind(1))
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, g_value: Tensor | None, g_logprob: Tensor | None, _: None, g_entropy: Tensor | None):
        _rows.refuse_second_derivative()
        coefficients = Coefficients(g_value, g_logprob, g_entropy)
        if all(c is None for c in coefficients):
            return (None,) * 5
        student, teacher, tokens, mask, stats = ctx.saved_tensors
        s, t = _common(student, teacher)
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        grad[:, s.shape[1] :] = 0
        _rows.gradient(ctx.op, s, t, tokens, stats, coefficients, grad[:, : s.shape[1]], mask)
        return grad, *(None,) * 4


def _common(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that both have: beyond, one of the vocabularies is padding."""
    vocabulary = min(student.shape[1], teacher.shape[1])
    return student[:, :vocabulary], teacher[:, :vocabulary]
