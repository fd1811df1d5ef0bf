"""Log-probability and entropy of given tokens from hidden states and an lm_head: what sft and perplexity need."""

import torch
from torch import Tensor

from mskd_kernels import _inputs
from mskd_kernels._backend import resolve_backend
from mskd_kernels._chunks import CHUNK_BYTES, head_statistics, valid_rows
from mskd_kernels._rows import RowOp, Side
from mskd_kernels.linear import project_reference


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` in plain torch, all logits at once."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    logits = project_reference(hidden.masked_fill(~valid[..., None], 0.0), weight, bias, logit_scale, softcap)
    lq = (logits.to(_inputs.accumulate_dtype(logits)) / temperature).log_softmax(-1)
    logprobs = lq.gather(-1, tokens.long().masked_fill(~valid, 0)[..., None])[..., 0]
    finite = lq.masked_fill(lq == -torch.inf, 0.0)
    entropy = -(lq.exp() * finite).sum(-1)
    return logprobs.masked_fill(~valid, 0.0), entropy.masked_fill(~valid, 0.0)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `tokens` and entropy of the distribution at each place, both [...] in nats and differentiable.

    hidden [..., H], weight [V, H], bias [V], tokens int [...], mask [...] (1 = counts; masked tokens are 0). float64
    for float64 hidden states, else float32. Logits are made again in backward: 8 H V FLOPs a token with it. Raises
    ValueError.
    """
    _inputs.check_head("", hidden, weight, bias)
    _inputs.check_settings(temperature, chunk_bytes=chunk_bytes)
    _inputs.check_side("", logit_scale, softcap)
    shape, device = hidden.shape[:-1], hidden.device
    host_mask = _inputs.flat_mask(mask, shape, device, host=True)
    token = _inputs.flat_tokens(tokens, host_mask, weight.shape[0], shape, device)
    op = RowOp(None, resolve_backend(backend, device), temperature, Side(logit_scale, softcap), entropy=True)
    head = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    _, logprobs, _, entropy = head_statistics(head, None, token, valid_rows(host_mask, device), op, chunk_bytes)
    return logprobs.reshape(shape), entropy.reshape(shape)
