"""Log-probability and entropy of given tokens from hidden states and an lm_head: what perplexity and scores need."""

import torch
from torch import Tensor, nn

from mskd_kernels import _inputs
from mskd_kernels._backend import check_backend
from mskd_kernels._ops import Settings, hidden_fields
from mskd_kernels.linear import batch_of, chunk_budget, drop_masked, head_of, project_reference


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor | nn.Linear,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` in plain torch, all logits at once."""
    hidden, weight, bias = head_of("", hidden, weight, bias)
    mask = _inputs.counted(mask, hidden)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    logits = project_reference(drop_masked(mask, hidden), weight, bias, logit_scale, softcap)
    lq = (logits.to(_inputs.accumulate_dtype(logits)) / temperature).log_softmax(-1)
    logprobs = lq.gather(-1, tokens.long().masked_fill(~valid, 0)[..., None])[..., 0]
    finite = lq.masked_fill(lq == -torch.inf, 0.0)
    entropy = -(lq.exp() * finite).sum(-1)
    return logprobs.masked_fill(~valid, 0.0), entropy.masked_fill(~valid, 0.0)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | nn.Linear,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `tokens` and entropy of the distribution at each place, both [...] in nats and differentiable.

    hidden [..., H], weight [V, H] (or the nn.Linear), bias [V], tokens int [...], mask [...] (1 = counts; masked tokens
    are 0; of labels with -100: mask=labels != -100). float64
    for float64 hidden states, else float32. For any upstream gradient a token: logits are made again in backward, 8 H V
    FLOPs a token with it; `linear_cross_entropy` needs 6. Raises ValueError.
    """
    batch, shape = batch_of(head_of("", hidden, weight, bias), tokens=tokens, mask=mask)
    temperature, side = _inputs.check_settings(temperature), _inputs.check_side("", logit_scale, softcap)
    backend = check_backend(backend, hidden.device)
    settings = Settings(None, None, backend, temperature, True, *side)
    fields = hidden_fields(batch, settings, chunk_budget(chunk_bytes, hidden.device))
    return fields.logprob.reshape(shape), fields.entropy.reshape(shape)
