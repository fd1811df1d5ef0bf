"""The losses from hidden states and lm_heads: chunks of tokens, vendor GEMMs, no [N, V] tensor.

Each side: logits = softcap * tanh(z / softcap), z = logit_scale * (hidden weight^T + bias); without soft-cap logits =
z. A chunk of tokens (`chunk_bytes`: the logits of both sides) goes through two GEMMs and the row op. Where the result
is a scalar the gradient is made at once and only scaled in backward: 6 Hs V + 2 Ht V FLOPs a token. With reduction
"none" the upstream gradient is not known yet and the logits are made again in backward: 8 Hs V + 4 Ht V. Masked
tokens enter nothing.

A mask on a GPU costs one synchronisation (the number of valid tokens sizes the GEMMs): gather the hidden states
yourself, or pass the mask on the CPU, to have none.
"""

from typing import Any

import torch
from torch import Tensor

from mskd_kernels import _inputs
from mskd_kernels._backend import resolve_backend
from mskd_kernels._chunks import CHUNK_BYTES, Head, head_loss, head_statistics, valid_rows
from mskd_kernels._rows import RowOp, Side
from mskd_kernels.divergence import DIVERGENCES, divergence_reference, resolve_kind
from mskd_kernels.minillm import MiniLLMLoss, assemble, minillm_loss_reference, token_objective


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
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: str = "reverse_kl",
    *,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    **settings: Any,
) -> Tensor:
    """`linear_divergence` in plain torch, all logits at once; `settings` as in `divergence`."""
    student_hidden, teacher_hidden = _drop_masked(mask, student_hidden, teacher_hidden)
    return divergence_reference(
        project_reference(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        project_reference(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        kind,
        mask=mask,
        **settings,
    )


def _drop_masked(mask: Tensor | None, *hidden: Tensor) -> tuple[Tensor, ...]:
    """Zeros in place of masked hidden states: NaN times a gradient of 0 would reach the weight."""
    return hidden if mask is None else tuple(h.masked_fill((mask == 0)[..., None], 0.0) for h in hidden)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: str = "reverse_kl",
    *,
    beta: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    denominator: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    backend: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`divergence` from hidden states; gradients to the student's hidden states, weight and bias.

    student_hidden [..., Hs], student_weight [Vs, Hs], student_bias [Vs], teacher_hidden [..., Ht], teacher_weight
    [Vt, Ht], teacher_bias [Vt]; compared on the first min(Vs, Vt) rows. A weight may be wider than its hidden states
    (float32 beside 16-bit): the GEMM runs in the hidden states' dtype, the weight's gradient is summed in float32.
    The rest as `divergence`.
    """
    row = resolve_kind(kind, beta)
    student: Head = (student_hidden, student_weight, student_bias)
    teacher: Head = (teacher_hidden, teacher_weight, teacher_bias)
    shape, device = _check_heads(student, teacher)
    _inputs.check_settings(temperature, reduction, chunk_bytes)
    rows = valid_rows(_inputs.flat_mask(mask, shape, device, host=True), device)
    sides = _sides((student_logit_scale, student_softcap), (teacher_logit_scale, teacher_softcap))
    op = RowOp(row, resolve_backend(backend, device), temperature, *sides)
    student, teacher = _flat(student), _flat(teacher)
    if reduction == "none":
        return head_statistics(student, teacher, None, rows, op, chunk_bytes)[0].reshape(shape)
    total = head_loss(student, teacher, None, rows, op, chunk_bytes, lambda value, _, part: (value, value > 0))[0]
    return total if reduction == "sum" else total / _inputs.count(mask, shape.numel(), denominator, total)


def linear_reverse_kl_reference(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **settings: Any
) -> Tensor:
    """`linear_reverse_kl` in plain torch."""
    return linear_divergence_reference(student_hidden, student_weight, teacher_hidden, teacher_weight, **settings)


def linear_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **settings: Any
) -> Tensor:
    """KL(student || teacher) from hidden states: `linear_divergence` with kind="reverse_kl", same keyword arguments."""
    return linear_divergence(student_hidden, student_weight, teacher_hidden, teacher_weight, "reverse_kl", **settings)


def linear_minillm_loss_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    *,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    **settings: Any,
) -> MiniLLMLoss:
    """`linear_minillm_loss` in plain torch, all logits at once; `settings` as in `minillm_loss`."""
    student_hidden, teacher_hidden = _drop_masked(mask, student_hidden, teacher_hidden)
    return minillm_loss_reference(
        project_reference(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        project_reference(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        tokens,
        old_logprobs,
        advantages,
        importance_weights,
        mask=mask,
        **settings,
    )


def linear_minillm_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
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
    backend: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> MiniLLMLoss:
    """`minillm_loss` from hidden states; gradients to the student's hidden states, weight and bias, made in forward.

    Heads as in `linear_divergence`, the rest as in `minillm_loss`.
    """
    student: Head = (student_hidden, student_weight, student_bias)
    teacher: Head = (teacher_hidden, teacher_weight, teacher_bias)
    shape, device = _check_heads(student, teacher)
    _inputs.check_settings(temperature, chunk_bytes=chunk_bytes)
    host_mask = _inputs.flat_mask(mask, shape, device, host=True)
    rows = valid_rows(host_mask, device)
    vocabulary = min(student_weight.shape[0], teacher_weight.shape[0])
    token = _inputs.flat_tokens(tokens, host_mask, vocabulary, shape, device)
    objective = token_objective(
        old_logprobs,
        advantages,
        importance_weights,
        None,
        shape=shape,
        device=device,
        dtype=_inputs.accumulate_dtype(student_hidden, teacher_hidden),
        clip=clip,
        weight_single_step=weight_single_step,
        clip_weighted_ratio=clip_weighted_ratio,
    )
    objective = objective if rows is None else objective.select(rows)
    sides = _sides((student_logit_scale, student_softcap), (teacher_logit_scale, teacher_softcap))
    op = RowOp(DIVERGENCES["reverse_kl"], resolve_backend(backend, device), temperature, *sides, entropy=True)
    total, stats, clipped = head_loss(
        _flat(student),
        _flat(teacher),
        token,
        rows,
        op,
        chunk_bytes,
        lambda value, logprobs, part: objective.select(part)(value, logprobs),
    )
    return assemble(total, clipped, stats[:, :4].unbind(1), host_mask, shape, denominator)


def _check_heads(student: Head, teacher: Head) -> tuple[torch.Size, torch.device]:
    """Checks both sides; returns the leading shape and the device."""
    _inputs.check_head("student_", *student)
    for name, x in zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True):
        _inputs.check_teacher(name, x, student[0])
    _inputs.check_head("teacher_", *teacher, like=student[0])
    if student[0].shape[:-1] != teacher[0].shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student[0].shape)} and teacher_hidden {tuple(teacher[0].shape)} must agree in all "
            "dimensions but the last"
        )
    return student[0].shape[:-1], student[0].device


def _sides(student: tuple[float, float | None], teacher: tuple[float, float | None]) -> tuple[Side, Side]:
    _inputs.check_side("student_", *student)
    _inputs.check_side("teacher_", *teacher)
    return Side(*student), Side(*teacher)


def _flat(head: Head) -> Head:
    return head[0].reshape(-1, head[0].shape[-1]), head[1], head[2]
