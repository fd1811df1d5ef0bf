"""The losses from hidden states and lm_heads: chunks of tokens, vendor GEMMs, no [N, V] tensor.

Each side: logits = softcap * tanh(z / softcap), z = logit_scale * (hidden weight^T + bias); without soft-cap logits =
z. A chunk of tokens (`chunk_bytes`: the logits of both sides) goes through two GEMMs and the row op. `gradient` says
when the gradient is made:

    "forward"     with the loss, chunk by chunk; backward only scales it: 6 Hs V + 2 Ht V FLOPs a token. For scalars
    "recompute"   in backward, for any upstream gradient a token; logits are made again: 8 Hs V + 4 Ht V
    None          "forward" where the result is a scalar, "recompute" for reduction="none"

Both give the same gradient; recompute keeps no gradient between forward and backward. Masked tokens enter nothing.

A mask on a GPU costs one synchronisation (the number of valid tokens sizes the GEMMs): gather the hidden states
yourself, or pass the mask on the CPU, to have none. Labels on a GPU are such a mask.

A weight may be given as the lm_head itself, an nn.Linear, whose bias comes along; any other module is refused by name,
since an adapter, a hook or a quantisation would be left out unseen.
"""

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from mskd_kernels import _inputs
from mskd_kernels._backend import check_backend
from mskd_kernels._chunks import Head
from mskd_kernels._kinds import resolve_kind
from mskd_kernels._ops import Batch, Settings, hidden_fields, hidden_loss
from mskd_kernels._row_op import Objective
from mskd_kernels.divergence import divergence_reference, reduce
from mskd_kernels.minillm import MiniLLMLoss, assemble, masked, minillm_loss_reference, policy_of, token_losses


class TwoHeads(TypedDict, total=False):
    """What two heads do to their logits besides the weight: the keywords that every op of two sides takes."""

    student_bias: Tensor | None
    student_logit_scale: float
    student_softcap: float | None
    teacher_bias: Tensor | None
    teacher_logit_scale: float
    teacher_softcap: float | None


class ReferenceSettings(TwoHeads, total=False):
    """The keywords of `linear_reverse_kl_reference`."""

    temperature: float
    mask: Tensor | None
    labels: Tensor | None
    ignore_index: int
    weights: Tensor | None
    reduction: str
    denominator: float | Tensor | None


class LinearSettings(ReferenceSettings, total=False):
    """The keywords of `linear_reverse_kl`."""

    gradient: str | None
    backend: str
    chunk_bytes: int | None


def project_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """hidden [..., H], weight [V, H], bias [V] -> logits [..., V] in plain torch, in the wider of the dtypes."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_divergence_reference(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    kind: str = "reverse_kl",
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    **settings: Any,
) -> Tensor:
    """`linear_divergence` in plain torch, all logits at once; the keywords of TwoHeads and of `divergence`."""
    counts = _inputs.counted(mask, student_hidden, labels, ignore_index)
    logits, rest = two_logits((student_hidden, student_weight), (teacher_hidden, teacher_weight), counts, settings)
    return divergence_reference(*logits, kind, mask=counts, **rest)


def two_logits(
    student: tuple[Tensor, Tensor | nn.Linear],
    teacher: tuple[Tensor, Tensor | nn.Linear],
    mask: Tensor | None,
    settings: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Logits of both sides in plain torch, and the settings that are not of a head."""
    rest = dict(settings)

    def project(side: str, hidden: Tensor, weight: Tensor | nn.Linear) -> Tensor:
        own = {k: rest.pop(f"{side}_{k}") for k in ("logit_scale", "softcap") if f"{side}_{k}" in rest}
        head = head_of(f"{side}_", drop_masked(mask, hidden), weight, rest.pop(f"{side}_bias", None))
        return project_reference(*head, **own)

    return (project("student", *student), project("teacher", *teacher)), rest


def drop_masked(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Zeros in place of hidden states where mask (bool) is not: NaN times a gradient of 0 would reach the weight."""
    return hidden if mask is None else hidden.masked_fill(~mask[..., None], 0.0)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
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
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    gradient: str | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """`divergence` from hidden states; gradients to the student's hidden states, weight and bias.

    student_hidden [..., Hs], student_weight [Vs, Hs], student_bias [Vs], teacher_hidden [..., Ht], teacher_weight
    [Vt, Ht], teacher_bias [Vt]; compared on the first min(Vs, Vt) rows. A weight may be the lm_head itself, a plain
    nn.Linear. It may be wider than its hidden states (float32 beside 16-bit): on CUDA the GEMM runs in the hidden
    states' dtype, elsewhere in float32; the weight's gradient is summed in float32.
    gradient: "forward", "recompute" or None (top of this file). chunk_bytes: None is 256 MiB on a CPU, 1 GiB else.
    The rest as `divergence`.
    """
    row = resolve_kind(kind, beta)
    student = head_of("student_", student_hidden, student_weight, student_bias)
    teacher = head_of("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    batch, shape = batch_of(student, teacher, mask=mask, labels=labels, ignore_index=ignore_index)
    temperature = _inputs.check_settings(temperature, reduction)
    sides = check_sides((student_logit_scale, student_softcap), (teacher_logit_scale, teacher_softcap))
    device = student_hidden.device
    settings = Settings(row.name, row.beta, check_backend(backend, device), temperature, False, *sides)
    budget = chunk_budget(chunk_bytes, device)
    if not _inputs.made_in_forward(gradient, reduction):
        return reduced(hidden_fields(batch, settings, budget).value, batch, shape, reduction, denominator, weights)
    known = weights_of(batch, weights, shape)
    divisor = None if reduction == "sum" else divisor_of(batch, denominator, known)
    return hidden_loss(batch, settings, budget, Objective(weights=known), divisor)[0]


def linear_reverse_kl_reference(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    **settings: Unpack[ReferenceSettings],
) -> Tensor:
    """`linear_reverse_kl` in plain torch."""
    return linear_divergence_reference(student_hidden, student_weight, teacher_hidden, teacher_weight, **settings)


def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    **settings: Unpack[LinearSettings],
) -> Tensor:
    """KL(student || teacher) from hidden states: `linear_divergence` with kind="reverse_kl", same keyword arguments."""
    return linear_divergence(student_hidden, student_weight, teacher_hidden, teacher_weight, "reverse_kl", **settings)


def linear_minillm_loss_reference(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    *,
    mask: Tensor | None = None,
    **settings: Any,
) -> MiniLLMLoss:
    """`linear_minillm_loss` in plain torch, all logits at once; the keywords of TwoHeads and of `minillm_loss`."""
    mask = _inputs.counted(mask, student_hidden)
    logits, rest = two_logits((student_hidden, student_weight), (teacher_hidden, teacher_weight), mask, settings)
    return minillm_loss_reference(*logits, tokens, old_logprobs, advantages, importance_weights, mask=mask, **rest)


def linear_minillm_loss(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    *,
    mask: Tensor | None = None,
    clip: float = 0.2,
    temperature: float = 1.0,
    weight_single_step: bool = True,
    clip_weighted_ratio: bool = True,
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
) -> MiniLLMLoss:
    """`minillm_loss` from hidden states (their shapes and `gradient` as in `linear_divergence`).

    Made in forward (the default), the gradient of `loss` exists when this returns; backward scales it.
    """
    student = head_of("student_", student_hidden, student_weight, student_bias)
    teacher = head_of("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    batch, shape = batch_of(student, teacher, tokens, mask)
    temperature = _inputs.check_settings(temperature)
    sides = check_sides((student_logit_scale, student_softcap), (teacher_logit_scale, teacher_softcap))
    device = student_hidden.device
    policy = policy_of(
        old_logprobs,
        advantages,
        importance_weights,
        shape=shape,
        device=device,
        dtype=batch.dtype(),
        clip=clip,
        weight_single_step=weight_single_step,
        clip_weighted_ratio=clip_weighted_ratio,
    )
    settings = Settings("reverse_kl", None, check_backend(backend, device), temperature, True, *sides)
    budget, divisor = chunk_budget(chunk_bytes, device), divisor_of(batch, denominator)
    if _inputs.made_in_forward(gradient, "sum"):
        loss, fields, clipped = hidden_loss(batch, settings, budget, Objective(policy=policy), divisor)
    else:
        fields = hidden_fields(batch, settings, budget)
        flat = None if batch.mask is None else batch.mask.to(device)
        losses, clipped = masked(token_losses(policy, fields.value, fields.logprob), flat)
        loss = losses.sum() / divisor
    return assemble(loss, clipped, fields, batch.mask, shape)


# What every op from hidden states begins with ------------------------------------------------------------------------


def head_of(side: str, hidden: Tensor, weight: Tensor | nn.Module, bias: Tensor | None) -> Head:
    """A side as given, its weight as a tensor or as the lm_head itself; `side` is the prefix of the names."""
    return Head(*_inputs.plain_head(side, hidden, weight, bias))


def batch_of(
    student: Head,
    teacher: Head | None = None,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int | None = -100,
) -> tuple[Batch, torch.Size]:
    """Checks heads, tokens and what counts, and flattens them; also the leading shape. A mask on the CPU stays."""
    shape, device = check_heads(student, teacher)
    flat = _inputs.flat_mask(mask, shape, device, labels=labels, ignore_index=ignore_index, host=True)
    vocabulary = min(x.weight.shape[0] for x in (student, teacher) if x is not None)
    token = None if tokens is None else _inputs.flat_tokens(tokens, flat, vocabulary, shape, device)
    batch = Batch(_rows_of(student.hidden), student.weight, student.bias, tokens=token, mask=flat)
    if teacher is None:
        return batch, shape
    hidden = _rows_of(teacher.hidden)
    return batch._replace(teacher_hidden=hidden, teacher_weight=teacher.weight, teacher_bias=teacher.bias), shape


def check_heads(student: Head, teacher: Head | None) -> tuple[torch.Size, torch.device]:
    """Checks both sides (one has no prefix); returns the leading shape and the device."""
    _inputs.check_head("" if teacher is None else "student_", *student)
    if teacher is not None:
        for name, x in zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True):
            _inputs.check_teacher(name, x, student.hidden)
        _inputs.check_head("teacher_", *teacher, like=student.hidden)
        if student.hidden.shape[:-1] != teacher.hidden.shape[:-1]:
            raise ValueError(
                f"student_hidden {tuple(student.hidden.shape)} and teacher_hidden {tuple(teacher.hidden.shape)} must "
                "agree in all dimensions but the last"
            )
    return student.hidden.shape[:-1], student.hidden.device


def check_sides(
    student: tuple[float, float | None], teacher: tuple[float, float | None]
) -> tuple[float, float | None, float, float | None]:
    """Checks scale and soft-cap of both sides; returns them flat."""
    return *_inputs.check_side("student_", *student), *_inputs.check_side("teacher_", *teacher)


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    if chunk_bytes is None:
        return (256 if device.type == "cpu" else 1024) * 1024**2
    if not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be a whole number of at least 1, or None, got {chunk_bytes!r}")
    return chunk_bytes


def divisor_of(batch: Batch, denominator: float | Tensor | None, weights: Tensor | None = None) -> Tensor:
    return _inputs.divisor(batch.mask, batch.hidden.shape[0], denominator, batch.dtype(), weights)


def weights_of(batch: Batch, weights: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The weights [...] of the tokens, flattened to [N]."""
    return _inputs.flat_weights(weights, batch.mask, shape, batch.hidden.device, batch.dtype())


def reduced(
    values: Tensor,
    batch: Batch,
    shape: torch.Size,
    reduction: str,
    denominator: float | Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Values [N] of a batch in their leading shape, weighted, summed or averaged."""
    mask = None if batch.mask is None else batch.mask.reshape(shape)
    return reduce(values.reshape(shape), mask, reduction, denominator, weights)


def _rows_of(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
