"""The token objective of MiniLLM (Gu et al. 2024) from logits: single-step reverse KL plus a clipped policy gradient.

With K = KL(student || teacher) of a token, A its advantage, r = q(y) / q_old(y), c(.) the clamp to [1 - clip, 1 +
clip] and w the importance weight (a constant), a token's loss is

    (w if weight_single_step else 1) K + max(-A w r, -A c(w r))          with clip_weighted_ratio, else
    (w if weight_single_step else 1) K + w max(-A r, -A c(r))

The loss is the sum over valid tokens over `denominator`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mskd_kernels import _inputs
from mskd_kernels._backend import resolve_backend
from mskd_kernels._rows import RowOp
from mskd_kernels.divergence import DIVERGENCES, reference_logprobs, reference_values, token_statistics


class MiniLLMLoss(NamedTuple):
    """`loss` (scalar, differentiable); detached: four fields a token [...] in nats, 0 where masked, and a scalar."""

    loss: Tensor
    reverse_kl: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    entropy: Tensor
    clipped_fraction: Tensor


@dataclass(frozen=True)
class TokenObjective:
    """The formula and its constants [3, N]: old_logprobs, advantages, importance_weights (0 where masked)."""

    constants: Tensor
    clip: float
    weight_single_step: bool
    clip_weighted_ratio: bool

    def __call__(self, reverse_kl: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Reverse KL and log q(y) [N] -> the loss a token, and whether the clip took effect there (bool), each [N]."""
        old_logprobs, a, w = self.constants.unbind(0)
        ratio = (logprobs - old_logprobs).exp()
        x = w * ratio if self.clip_weighted_ratio else ratio
        free, clipped = -a * x, -a * x.clamp(1 - self.clip, 1 + self.clip)
        policy = torch.maximum(free, clipped)
        if not self.clip_weighted_ratio:
            policy = w * policy
        single_step = w * reverse_kl if self.weight_single_step else reverse_kl
        return single_step + policy, clipped > free

    def select(self, rows: slice | Tensor) -> "TokenObjective":
        """The same for some tokens."""
        return replace(self, constants=self.constants[:, rows])


def token_objective(
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    mask: Tensor | None,
    *,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    clip: float,
    weight_single_step: bool,
    clip_weighted_ratio: bool,
) -> TokenObjective:
    """Checks and flattens the constants of the loss."""
    if not 0 <= clip < float("inf"):
        raise ValueError(f"clip must be at least 0 and finite, got {clip}")
    named = {"old_logprobs": old_logprobs, "advantages": advantages, "importance_weights": importance_weights}
    constants = torch.stack([_inputs.constant(name, x, shape, device, dtype) for name, x in named.items()])
    if mask is not None:
        constants = constants.masked_fill(~mask, 0.0)
    return TokenObjective(constants, clip, weight_single_step, clip_weighted_ratio)


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
    lq, lp = reference_logprobs(student_logits, teacher_logits, mask, temperature)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    index = tokens.long().masked_fill(~valid, 0)[..., None]
    value = reference_values(lq, lp, "reverse_kl")
    logprobs, teacher_logprobs = lq.gather(-1, index)[..., 0], lp.gather(-1, index)[..., 0]
    entropy = -(lq.exp() * lq.masked_fill(lq == -torch.inf, 0.0)).sum(-1)
    logprobs = torch.where(value == torch.inf, logprobs.detach(), logprobs)  # such a token has a gradient of 0
    constants = torch.stack([x.to(lq.dtype) for x in (old_logprobs, advantages, importance_weights)])
    objective = TokenObjective(constants.masked_fill(~valid, 0.0), clip, weight_single_step, clip_weighted_ratio)
    losses, clipped = objective(value, logprobs)
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
    backend: str = "auto",
) -> MiniLLMLoss:
    """MiniLLM's loss of sampled tokens (formula at the top of this file), differentiable in the student's logits.

    student_logits [..., Vs], teacher_logits [..., Vt] as in `divergence`; tokens [...] int, the sampled ones;
    old_logprobs [...] = log q_old(token), advantages [...], importance_weights [...]: float constants; mask [...].
    denominator: default the valid tokens. clipped_fraction is over the valid tokens. A token whose reverse KL is
    +inf gets a gradient of 0. Raises ValueError.
    """
    shape = _inputs.check_logits(student_logits, teacher_logits)
    _inputs.check_settings(temperature)
    device, dtype = student_logits.device, _inputs.accumulate_dtype(student_logits, teacher_logits)
    flat = _inputs.flat_mask(mask, shape, device)
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    token = _inputs.flat_tokens(tokens, flat, vocabulary, shape, device)
    objective = token_objective(
        old_logprobs,
        advantages,
        importance_weights,
        flat,
        shape=shape,
        device=device,
        dtype=dtype,
        clip=clip,
        weight_single_step=weight_single_step,
        clip_weighted_ratio=clip_weighted_ratio,
    )
    op = RowOp(DIVERGENCES["reverse_kl"], resolve_backend(backend, device), temperature, entropy=True)
    fields = token_statistics(op, student_logits, teacher_logits, token, flat)
    losses, clipped = objective(fields[0], fields[1])
    if flat is not None:
        losses, clipped = losses.masked_fill(~flat, 0.0), clipped & flat
    return assemble(losses.sum(), clipped, fields, flat, shape, denominator)


def assemble(
    total: Tensor,
    clipped: Tensor,
    fields: tuple[Tensor, ...],
    mask: Tensor | None,
    shape: tuple[int, ...],
    denominator: float | Tensor | None,
) -> MiniLLMLoss:
    """The sum of the loss, clip flags [N] and per-token fields [N] (0 where masked) -> the result."""
    valid = _inputs.count(mask, clipped.numel(), None, total)
    loss = total / (valid if denominator is None else _inputs.count(mask, clipped.numel(), denominator, total))
    value, logprobs, teacher_logprobs, entropy = (x.detach().reshape(shape) for x in fields)
    return MiniLLMLoss(loss, value, logprobs, teacher_logprobs, entropy, clipped.sum().to(total.dtype) / valid)
