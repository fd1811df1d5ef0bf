"""One exact draw from a row of the vocabulary, with random numbers that belong to a place and not to a moment.

    u = uniforms(seed, sequence_ids[:, None], positions[None])
    tokens, old, mixture, teacher = draw(student_logits, teacher_logits, u[:, t], mix_alpha=0.2, top_p=1.0, top_k=0)

b rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# -- random numbers -------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in wrapping int64 arithmetic


def signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def uniforms(seed: int, sequence_ids: Tensor, positions: Tensor) -> Tensor:
    """One number in the open interval (0, 1) for each (seed, sequence id, position), the same on every device.

    sequence_ids and positions int64, broadcast against each other; returns float64. Each stage seeds a splitmix64
    stream with the value drawn from the one before: seed, then sequence, then position. The upper 52 bits and a half.
    """
    key = torch.tensor(signed(seed), dtype=torch.int64, device=sequence_ids.device)
    for counter in (0, sequence_ids, positions):
        key = _mix(key + (counter + 1) * signed(_GOLDEN))
    return (_shift_right(key, 12).double() + 0.5) * 2.0**-52


# -- one draw from a row of the vocabulary ----------------------------------------------------------

_BLOCK = 256


def _inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [b] int64, totals [b] float64): token v with probability weights[v] / total, total = sum of its row.

    weights [b, V] >= 0, u [b] float64 in (0, 1). Cumulative sums are float64, over blocks and then within the chosen
    block, because one over the whole row costs several times more. A weight of 0 is never drawn.
    """
    b, V = weights.shape
    full = V // _BLOCK * _BLOCK
    sums = weights[:, :full].view(b, -1, _BLOCK).sum(-1, dtype=torch.float64)
    if full < V:
        sums = torch.cat([sums, weights[:, full:].sum(-1, keepdim=True, dtype=torch.float64)], 1)
    cumulative = sums.cumsum(1)
    totals = cumulative[:, -1]
    block, rest = _search(cumulative, u * totals)
    # What is left of u within its block, as a share of it; below 1, so that rounding never leads past the block's end.
    share = (rest / sums.gather(1, block[:, None])[:, 0]).clamp(0, 1 - 2.0**-53)
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=V - 1)).double().masked_fill(columns >= V, 0)
    cumulative = inside.cumsum(1)
    token, _ = _search(cumulative, share * cumulative[:, -1])
    return (block * _BLOCK + token).clamp(max=V - 1), totals


def _search(cumulative: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(first index whose cumulative sum exceeds x, x minus the sum before that index)."""
    index = torch.searchsorted(cumulative, x[:, None], right=True).clamp(max=cumulative.shape[1] - 1)
    before = cumulative.gather(1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0)
    return index[:, 0], x - before[:, 0]


def _truncate(weights: Tensor, top_p: float, top_k: int) -> Tensor:
    """Weights outside the top_k, then outside the smallest set with top_p of what is left, set to 0. Ties stay in."""
    if 0 < top_k < weights.shape[1]:
        weights = weights.masked_fill(weights < weights.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ranked = weights.sort(descending=True).values
        mass = ranked.cumsum(1, dtype=torch.float64)
        kept = (mass - ranked < top_p * mass[:, -1:]).sum(1, keepdim=True)
        weights = weights.masked_fill(weights < ranked.gather(1, (kept - 1).clamp(min=0)), 0)
    return weights


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(shifted logits, their exponentials, log of the float64 sum of those): logprobs = shifted - log_sum."""
    shifted = logits - logits.amax(1, keepdim=True)
    exponentials = shifted.exp()
    return shifted, exponentials, exponentials.sum(1, dtype=torch.float64).log()


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log-softmax of logits [b, V] at tokens [b], float64 [b]."""
    shifted, _, log_sum = _exponentials(logits)
    return shifted.gather(1, tokens[:, None])[:, 0].double() - log_sum


def draw(
    student_logits: Tensor, teacher_logits: Tensor | None, u: Tensor, *, mix_alpha: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One token a row from p~, and its log-probabilities under student, p~ and teacher, each [b], float64.

    p~ = mix_alpha p + (1 - mix_alpha) q, then cut to its own top_k and top_p and renormalised. The *mixture* is cut,
    not each part: so p~(y) >= (1 - mix_alpha) q(y) wherever p~(y) > 0, and the bound 1 / (1 - mix_alpha) of the
    importance weight holds with truncation too. (Tokens that only the teacher's cut keeps would have no bound.)
    The mean weight under p~ is the student's mass on the kept tokens: 1 without truncation.
    Logits [b, V] fp32 or fp64, already divided by the temperature; u [b] float64. The draw is exact: an inverse
    CDF over float64 sums. A row without a finite total gives NaN log-probabilities.
    """
    shifted, weights, log_sum = _exponentials(student_logits)
    if teacher_logits is not None:
        teacher_shifted, teacher_weights, teacher_log_sum = _exponentials(teacher_logits)
        weights = weights * ((1 - mix_alpha) * (-log_sum).exp()).to(weights.dtype)[:, None]
        weights = weights.addcmul_(teacher_weights, (mix_alpha * (-teacher_log_sum).exp()).to(weights.dtype)[:, None])
    weights = _truncate(weights, top_p, top_k)
    token, total = _inverse_cdf(weights, u)

    def at(x: Tensor) -> Tensor:
        return x.gather(1, token[:, None])[:, 0].double()

    old = at(shifted) - log_sum
    if teacher_logits is None:
        # log(weight / total) up to the rounding of exp; written so, the weight q_old / p~ is 1 without a cut.
        return token, old, old + (log_sum - total.log()), None
    return token, old, at(weights).log() - total.log(), at(teacher_shifted) - teacher_log_sum
