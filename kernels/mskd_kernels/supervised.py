"""Losses on given tokens from hidden states: cross-entropy, and the two-part loss of knowledge distillation.

Chunks, modes of the gradient and masks as in `linear`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mskd_kernels import _inputs
from mskd_kernels._backend import check_backend
from mskd_kernels._kinds import resolve_kind
from mskd_kernels._ops import Batch, Fields, Settings, hidden_fields, hidden_loss
from mskd_kernels._row_op import Objective
from mskd_kernels.divergence import divergence_reference, reduce
from mskd_kernels.linear import (
    batch_of,
    check_sides,
    chunk_budget,
    divisor_of,
    head_of,
    reduced,
    two_logits,
    weights_of,
)
from mskd_kernels.logprobs import linear_logprobs_reference


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor | nn.Linear,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """`linear_cross_entropy` in plain torch; `settings` as in `linear_logprobs`."""
    mask = _inputs.counted(mask, hidden, targets, ignore_index)
    logprobs, _ = linear_logprobs_reference(hidden, weight, targets, mask=mask, **settings)
    return reduce(-logprobs, mask, reduction, denominator, weights)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | nn.Linear,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    gradient: str | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """-log q(target) in nats, the loss of supervised fine-tuning; gradients to hidden, weight and bias.

    hidden [..., H], weight [V, H] (or the lm_head itself, a plain nn.Linear), bias [V], targets int [...], already
    shifted: each beside the hidden state that predicts it. What counts: mask [...] (1 = counts), and targets other than
    ignore_index: -100 for labels as transformers makes them; None, the default, ignores none and refuses a target that
    is no token (on a GPU its loss is NaN), and is spared the mask's synchronisation there. weights [...] float, at
    least 0: a factor a token. reduction: "none" -> [...], "sum", or "mean" (over `denominator`, default the sum of the
    weights, which without any is the number of tokens that count). float64 for float64 hidden states, else float32.
    `gradient` as in `linear_divergence`: made in forward it costs 6 H V FLOPs a token. A target of probability 0 gives
    +inf and a gradient of its other logits. Raises ValueError.
    """
    batch, shape = batch_of(
        head_of("", hidden, weight, bias), tokens=targets, mask=mask, labels=targets, ignore_index=ignore_index
    )
    temperature, side = _inputs.check_settings(temperature, reduction), _inputs.check_side("", logit_scale, softcap)
    budget, backend = chunk_budget(chunk_bytes, hidden.device), check_backend(backend, hidden.device)
    settings = Settings(None, None, backend, temperature, False, *side)
    if not _inputs.made_in_forward(gradient, reduction):
        return reduced(-hidden_fields(batch, settings, budget).logprob, batch, shape, reduction, denominator, weights)
    known = weights_of(batch, weights, shape)
    divisor = None if reduction == "sum" else divisor_of(batch, denominator, known)
    return hidden_loss(batch, settings, budget, Objective(value=0.0, nll=1.0, weights=known), divisor)[0]


class KDLoss(NamedTuple):
    """`loss` (scalar, differentiable); detached, a token [...] in nats, 0 where masked: divergence and nll."""

    loss: Tensor
    divergence: Tensor
    nll: Tensor


def linear_kd_loss_reference(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    targets: Tensor,
    kind: str = "forward_kl",
    *,
    kd_ratio: float = 0.5,
    beta: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **settings: Any,
) -> KDLoss:
    """`linear_kd_loss` in plain torch, all logits at once; `settings` are those of TwoHeads."""
    mask = _inputs.counted(mask, student_hidden, targets, ignore_index)
    logits, _ = two_logits((student_hidden, student_weight), (teacher_hidden, teacher_weight), mask, settings)
    values = divergence_reference(*logits, kind, beta=beta, temperature=temperature, mask=mask)
    valid = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    index = targets.long().masked_fill(~valid, 0)[..., None]
    nll = -logits[0].to(values.dtype).log_softmax(-1).gather(-1, index)[..., 0].masked_fill(~valid, 0.0)
    losses = (1 - kd_ratio) * nll + kd_ratio * temperature**2 * values
    return KDLoss(reduce(losses, mask, "mean", denominator, weights), values.detach(), nll.detach())


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    targets: Tensor,
    kind: str = "forward_kl",
    *,
    kd_ratio: float = 0.5,
    beta: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    gradient: str | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> KDLoss:
    """(1 - kd_ratio) CE + kd_ratio T^2 D: the loss of knowledge distillation (Hinton et al. 2015), 0 < kd_ratio < 1.

    CE is -log q(target) at temperature 1 over the student's whole vocabulary, D the divergence `kind` (with `beta`) at
    temperature T on the common one, both summed over the tokens that count, each times its weight, over `denominator`
    (default: the sum of the weights, which without any is the number of tokens). targets, mask, ignore_index and
    weights as in `linear_cross_entropy`; the fields of the result are not weighted.
    At T = 1 both come from one pass through the heads; at another T, or where the student's vocabulary is the wider
    one, the student's head runs twice. The rest as `linear_divergence`. Raises ValueError.
    """
    if not 0 < _inputs.number("kd_ratio", kd_ratio) < 1:
        raise ValueError(
            f"kd_ratio must lie between 0 and 1, got {kd_ratio}; at the ends use linear_cross_entropy (0) or "
            "linear_divergence (1)"
        )
    row = resolve_kind(kind, beta)
    student = head_of("student_", student_hidden, student_weight, student_bias)
    teacher = head_of("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    batch, shape = batch_of(student, teacher, mask=mask, labels=targets, ignore_index=ignore_index)
    one, _ = batch_of(student, tokens=targets, mask=mask, labels=targets, ignore_index=ignore_index)
    temperature = _inputs.check_settings(temperature)
    sides = check_sides((student_logit_scale, student_softcap), (teacher_logit_scale, teacher_softcap))
    backend = check_backend(backend, student_hidden.device)
    settings = Settings(row.name, row.beta, backend, temperature, False, *sides)
    known = weights_of(batch, weights, shape)
    in_forward, divisor = _inputs.made_in_forward(gradient, "sum"), divisor_of(batch, denominator, known)
    budget = chunk_budget(chunk_bytes, student_hidden.device)

    def run(batch: Batch, settings: Settings, objective: Objective) -> tuple[Tensor, Fields]:
        return _loss(batch, settings, budget, objective, divisor, in_forward)

    share = float(kd_ratio)
    parts = Objective(share * temperature**2, 1 - share, weights=known)
    if temperature == 1 and student.weight.shape[0] <= teacher.weight.shape[0]:
        loss, fields = run(batch._replace(tokens=one.tokens), settings, parts)
        logprob = fields.logprob
    else:
        first, fields = run(batch, settings, parts._replace(nll=0.0))
        plain = Settings(None, None, backend, 1.0, False, *sides[:2])
        second, others = run(one, plain, parts._replace(value=0.0))
        loss, logprob = first + second, others.logprob
    return KDLoss(loss, fields.value.detach().reshape(shape), -logprob.detach().reshape(shape))


def _loss(
    batch: Batch, settings: Settings, chunk_bytes: int, objective: Objective, divisor: Tensor, in_forward: bool
) -> tuple[Tensor, Fields]:
    """An objective without policy: its scalar, and the fields of each token."""
    if in_forward:
        return hidden_loss(batch, settings, chunk_bytes, objective, divisor)[:2]
    fields = hidden_fields(batch, settings, chunk_bytes)
    parts = [weight * x for weight, x in ((objective.value, fields.value), (-objective.nll, fields.logprob)) if weight]
    losses = sum(parts[1:], parts[0])
    if (weights := objective.weights) is not None:
        losses = (losses * weights).masked_fill(weights == 0, 0.0)
    return losses.sum() / divisor, fields
