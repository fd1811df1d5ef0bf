"""The token objective of MiniLLM (Gu et al. 2024) from logits: single-step reverse KL plus a clipped policy gradient.

With K = KL(student || teacher) of a token, A its advantage, r = q(y) / q_old(y), c(.) the clamp to [1 - clip, 1 +
clip] and w the importance weight (a constant), a token's loss is

    (w if weight_single_step else 1) K + max(-A w r, -A c(w r))          with clip_weighted_ratio, else
    (w if weight_single_step else 1) K + w max(-A r, -A c(r))

The loss is the sum over valid tokens over `denominator`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mskd_kernels import _inputs
from mskd_kernels._backend import check_backend
from mskd_kernels._ops import Fields, Rows, Settings, logits_fields, logits_loss
from mskd_kernels._row_op import Objective, Policy
from mskd_kernels.divergence import reference_logprobs, reference_values


class MiniLLMLoss(NamedTuple):
    """`loss` (scalar, differentiable); detached: four fields a token [...] in nats, 0 where masked, and a scalar."""

    loss: Tensor
    reverse_kl: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    entropy: Tensor
    clipped_fraction: Tensor


def token_losses(policy: Policy, reverse_kl: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL and log q(y) [N] -> the loss a token, and whether the clip took effect there (bool), each [N].

    In plain torch, for autograd; `_row_op.evaluate` has the same with its derivatives.
    """
    old_logprobs, a, w, clip, weight_single_step, clip_weighted_ratio = policy
    ratio = (logprobs - old_logprobs).exp()
    x = w * ratio if clip_weighted_ratio else ratio
    free, clipped = -a * x, -a * x.clamp(1 - clip, 1 + clip)
    term = torch.maximum(free, clipped)
    if not clip_weighted_ratio:
        term = w * term
    single_step = w * reverse_kl if weight_single_step else reverse_kl
    return single_step + term, clipped > free


def policy_of(
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    *,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    clip: float,
    weight_single_step: bool,
    clip_weighted_ratio: bool,
) -> Policy:
    """Checks and flattens the constants of the loss."""
    if not 0 <= _inputs.number("clip", clip) < float("inf"):
        raise ValueError(f"clip must be at least 0 and finite, got {clip}")
    named = {"old_logprobs": old_logprobs, "advantages": advantages, "importance_weights": importance_weights}
    old, a, w = (_inputs.constant(name, x, shape, device, dtype) for name, x in named.items())
    return Policy(old, a, w, float(clip), weight_single_step, clip_weighted_ratio)


def masked(values: tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses and flags [N], 0 where masked, whatever the constants hold there."""
    losses, flags = values
    return (losses, flags) if mask is None else (losses.masked_fill(~mask, 0.0), flags & mask)


def minillm_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
) -> MiniLLMLoss:
    """`minillm_loss` in plain torch with autograd."""
    mask = _inputs.counted(mask, student_logits)
    lq, lp = reference_logprobs(student_logits, teacher_logits, mask, temperature)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    index = tokens.long().masked_fill(~valid, 0)[..., None]
    value = reference_values(lq, lp, "reverse_kl")
    logprobs, teacher_logprobs = lq.gather(-1, index)[..., 0], lp.gather(-1, index)[..., 0]
    entropy = -(lq.exp() * lq.masked_fill(lq == -torch.inf, 0.0)).sum(-1)
    logprobs = torch.where(value == torch.inf, logprobs.detach(), logprobs)  # such a token has a gradient of 0
    constants = (old_logprobs, advantages, importance_weights)
    old, a, w = (x.to(lq.dtype).masked_fill(~valid, 0.0) for x in constants)
    policy = Policy(old, a, w, clip, weight_single_step, clip_weighted_ratio)
    losses, clipped = token_losses(policy, value, logprobs)
    tokens_valid = valid.sum().clamp(min=1)
    loss = losses.masked_fill(~valid, 0.0).sum() / (tokens_valid if denominator is None else denominator)
    fields = [x.detach().masked_fill(~valid, 0.0) for x in (value, logprobs, teacher_logprobs, entropy)]
    return MiniLLMLoss(loss, *fields, (clipped & valid).sum().to(lq.dtype) / tokens_valid)  # type: ignore[call-arg]


def minillm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    gradient: str | None = None,
    backend: str = "auto",
) -> MiniLLMLoss:
    """MiniLLM's loss of sampled tokens (formula at the top of this file), differentiable in the student's logits.

    student_logits [..., Vs], teacher_logits [..., Vt] as in `divergence`; tokens [...] int, the sampled ones;
    old_logprobs [...] = log q_old(token), advantages [...], importance_weights [...]: float constants; mask [...].
    denominator: default the valid tokens. gradient: as in `divergence` for a scalar. clipped_fraction is over the valid
    tokens. A token whose reverse KL is +inf gets a gradient of 0. Raises ValueError.
    """
    shape = _inputs.check_logits(student_logits, teacher_logits)
    temperature = _inputs.check_settings(temperature)
    device, dtype = student_logits.device, _inputs.accumulate_dtype(student_logits, teacher_logits)
    flat = _inputs.flat_mask(mask, shape, device)
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    token = _inputs.flat_tokens(tokens, flat, vocabulary, shape, device)
    policy = policy_of(
        old_logprobs,
        advantages,
        importance_weights,
        shape=shape,
        device=device,
        dtype=dtype,
        clip=clip,
        weight_single_step=weight_single_step,
        clip_weighted_ratio=clip_weighted_ratio,
    )
    settings = Settings("reverse_kl", None, check_backend(backend, device), temperature, True)
    rows = Rows.of(student_logits, teacher_logits, token, flat)
    divisor = _inputs.divisor(flat, rows.student.shape[0], denominator, dtype)
    if _inputs.logits_in_forward(gradient, "mean", student_logits):
        loss, fields, clipped = logits_loss(rows, settings, Objective(policy=policy), divisor)
    else:
        fields = logits_fields(rows, settings)
        losses, clipped = masked(token_losses(policy, fields.value, fields.logprob), flat)
        loss = losses.sum() / divisor
    return assemble(loss, clipped, fields, flat, shape)


def assemble(loss: Tensor, clipped: Tensor, fields: Fields, mask: Tensor | None, shape: tuple[int, ...]) -> MiniLLMLoss:
    """The loss, clip flags [N] and per-token fields [N] (0 where masked) -> the result."""
    valid = _inputs.count(mask, clipped.numel(), None, loss)
    value, logprobs, teacher_logprobs, entropy = (x.detach().reshape(shape) for x in fields)
    return MiniLLMLoss(loss, value, logprobs, teacher_logprobs, entropy, clipped.sum().to(loss.dtype) / valid)
