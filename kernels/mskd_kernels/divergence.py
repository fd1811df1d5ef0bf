"""Divergences between student and teacher, a value a token, from logits. reverse_kl = KL(student || teacher).

Use: `loss = reverse_kl(student_logits, teacher_logits, mask=mask, reduction="mean"); loss.backward()`
"""

import torch
from torch import Tensor

from mskd_kernels import _inputs
from mskd_kernels._backend import check_backend
from mskd_kernels._kinds import resolve_kind
from mskd_kernels._ops import Rows, Settings, logits_fields, logits_loss
from mskd_kernels._row_op import Objective


def divergence_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "reverse_kl",
    *,
    beta: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """`divergence` in plain torch with autograd: the formula, and the truth of the tests."""
    counts = _inputs.counted(mask, student_logits, labels, ignore_index)
    lq, lp = reference_logprobs(student_logits, teacher_logits, counts, temperature)
    values = reference_values(lq, lp, kind, beta)
    return reduce(values, counts, reduction, denominator, weights)


def reference_logprobs(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., V] of both sides on their common vocabulary; where mask (bool) is not: uniform."""
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    dtype = _inputs.accumulate_dtype(student, teacher)
    s, t = student[..., :vocabulary].to(dtype), teacher[..., :vocabulary].to(dtype)
    if mask is not None:
        s, t = (x.masked_fill(~mask[..., None], 0.0) for x in (s, t))
    lq, lp = ((x / temperature).log_softmax(-1) for x in (s, t))
    return lq.masked_fill(s == -torch.inf, -torch.inf), lp.masked_fill(t == -torch.inf, -torch.inf)


def reference_values(lq: Tensor, lp: Tensor, kind: str, beta: float | None = None) -> Tensor:
    """Divergence of log-probabilities [..., V] -> [...]: 0 * log 0 is 0; an infinite value has a gradient of 0.

    NaN where a side has no mass at all (+inf for a KL whose second side is that one).
    """
    row = resolve_kind(kind, beta)
    values = row.reference(lq.clamp(min=-1e30), lp.clamp(min=-1e30), row.beta).sum(-1)
    if row.expectation is None:
        return values.masked_fill(((lq == -torch.inf) | (lp == -torch.inf)).all(-1), torch.nan)
    first, second = (lq, lp) if row.expectation == "student" else (lp, lq)
    infinite = ((second == -torch.inf) & (first > -torch.inf)).any(-1)
    nowhere = (first == -torch.inf).all(-1)
    return values.masked_fill(infinite, torch.inf).masked_fill(nowhere, torch.nan)


def reduce(
    values: Tensor,
    mask: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Per-token values [...] times weights [...], 0 where mask (bool) is not; their sum; or it over `denominator`."""
    if mask is not None:
        mask = mask.to(values.device)
        values = values.masked_fill(~mask, 0.0)
    if weights is not None:
        flat = None if mask is None else mask.reshape(-1)
        known = _inputs.flat_weights(weights, flat, values.shape, values.device, values.dtype)
        assert known is not None
        weights = known.reshape(values.shape)
        values = (values * weights).masked_fill(weights == 0, 0.0)
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    return total / _inputs.count(mask, values.numel(), denominator, total, weights)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "reverse_kl",
    *,
    beta: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
    gradient: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of student and teacher, differentiable in the student's logits.

    student_logits [..., Vs], teacher_logits [..., Vt] (float16 to float64, dtypes may differ; log-probabilities are
    logits too, probabilities are not); compared on the common min(Vs, Vt) columns, the student's padding columns get
    zero gradient. kind: a row of DIVERGENCES, "reverse_kl" = KL(student || teacher); beta: the number of jsd, skew_kl
    and skew_reverse_kl, None for their defaults (0.5, 0.1, 0.1).

    What counts: mask [...] of 0 and 1 (1 = counts); labels [...] int, of which those equal to ignore_index do not.
    A label stands beside the logits that predict it: labels[:, 1:] beside logits[:, :-1]. Tokens that do not count are
    0 whatever their logits hold. weights [...] float, at least 0, constants: each value is multiplied by its own.

    reduction: "none" -> [...], "sum", or "mean" (over `denominator`, default the sum of the weights, which without any
    is the number of tokens that count). gradient: "forward" makes it with the loss (scalars), "recompute" in backward;
    None is "forward" for scalars, but "recompute" for float16. There is no factor T^2. -inf is a mass of 0: a KL whose
    second side alone has none is +inf, with a gradient of 0; the other kinds stay finite (a teacher that is known in
    its likeliest tokens only: `sparse_divergence`). Returns nats (tvd: a share of the mass), float64 for float64
    inputs, else float32. Raises ValueError.
    """
    shape = _inputs.check_logits(student_logits, teacher_logits)
    row, device = resolve_kind(kind, beta), student_logits.device
    temperature = _inputs.check_settings(temperature, reduction)
    flat = _inputs.flat_mask(mask, shape, device, labels=labels, ignore_index=ignore_index)
    settings = Settings(row.name, row.beta, check_backend(backend, device), temperature, False)
    rows = Rows.of(student_logits, teacher_logits, None, flat)
    if _inputs.logits_in_forward(gradient, reduction, student_logits):
        dtype = _inputs.accumulate_dtype(student_logits, teacher_logits)
        known = _inputs.flat_weights(weights, flat, shape, device, dtype)
        mean, count = reduction == "mean", rows.student.shape[0]
        divisor = _inputs.divisor(flat, count, denominator, dtype, known) if mean else None
        return logits_loss(rows, settings, Objective(weights=known), divisor)[0]
    values = logits_fields(rows, settings).value.reshape(shape)
    return reduce(values, None if flat is None else flat.reshape(shape), reduction, denominator, weights)


def reverse_kl_reference(student_logits: Tensor, teacher_logits: Tensor, **settings) -> Tensor:
    """`reverse_kl` in plain torch."""
    return divergence_reference(student_logits, teacher_logits, "reverse_kl", **settings)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
    gradient: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(student || teacher) in nats: `divergence` with kind="reverse_kl"."""
    return divergence(
        student_logits,
        teacher_logits,
        "reverse_kl",
        temperature=temperature,
        mask=mask,
        labels=labels,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        gradient=gradient,
        backend=backend,
    )
