"""From a Rollout, or from data, to the loss of one forward: rewards, returns, advantages, and the losses of all phases.

    advantages = objective.advantages(rollout, phase)                          # once a round
    loss = objective.minillm_loss(part, advantages[part_tokens], teacher_hidden, teacher.head, phase)
    value, stats = student(batch, loss.over(denominator))                      # the loss runs inside Student.forward

The formulas are those of MiniLLM (Gu et al., ICLR 2024) with each term a field of MinillmPhase; the losses themselves
are mskd_kernels' and never hold [N, V]. Every loss is a sum over tokens divided by a given denominator, and every
statistic a sum, so that gradients and means are exact over micro-batches and processes. `options` of a function are
`backend` and `chunk_bytes` of mskd_kernels.

B sequences, T response positions, N response tokens, V vocabulary, H hidden. p teacher, q student, q_old the student
that sampled; reverse KL = KL(q || p) = KL(student || teacher), forward KL = KL(p || q) = KL(teacher || student).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from mskd_kernels import (
    linear_cross_entropy,
    linear_divergence,
    linear_kd_loss,
    linear_logprobs,
    linear_minillm_loss,
)
from torch import Tensor

from mskd.config.phases import DistillmPhase, KdPhase, MinillmPhase, Mixed
from mskd.models import Head
from mskd.models.batch import SequenceBatch
from mskd.sampling.rollout import Rollout

Stats = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over processes


# -- rewards, returns, advantages -----------------------------------------------------------------


def rewards(teacher_logprobs: Tensor, old_logprobs: Tensor, *, scaling: float = 1.0, clip: float = 0.0) -> Tensor:
    """(log p(y) - log q_old(y)) / scaling, then clipped to +- clip (0: not clipped). Any shape."""
    values = (teacher_logprobs - old_logprobs) / scaling
    return values.clamp(-clip, clip) if clip else values


def returns(rewards: Tensor, mask: Tensor, *, gamma: float, include_current: bool) -> Tensor:
    """Length-normalised return of every position [B, T] from rewards [B, T]; 0 where the mask [B, T] is 0.

    With n valid positions from t on, t included:
    include_current:  R_t = (sum over t' >= t of gamma^(t' - t) reward_t') / n, as the released code of MiniLLM;
    otherwise         R_t = (sum over t' > t of gamma^(t' - t - 1) reward_t') / (n - 1), the return of the future, and 0
    for the last one. The paper prints 1 / (T - t - 1) there, which is undefined one token before the end: corrected.
    """
    valid = mask.bool()
    values = rewards.masked_fill(~valid, 0)  # whatever padding holds, NaN too
    total, count = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    columns = []
    for t in range(values.shape[1] - 1, -1, -1):
        now = valid[:, t]
        if include_current:
            total = torch.where(now, values[:, t] + gamma * total, total)
            count = count + now
            columns.append(total / count.clamp(min=1))
        else:
            columns.append(total / count.clamp(min=1))
            total = torch.where(now, values[:, t] + gamma * total, total)
            count = count + now
    return torch.stack(columns[::-1], 1).masked_fill(~valid, 0)


def whiten(x: Tensor, mask: Tensor | None = None, *, reduce: Reduce | None = None, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the valid values of all processes; 0 where the mask is 0.

    Population statistics (divided by the count, not by the count less one), in float64 and in two passes. `reduce` sums
    a small float64 tensor over processes; every process must call, also one without valid values.
    """
    total = reduce if reduce is not None else lambda t: t
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    values = x.double().masked_fill(~valid, 0)
    count, sum_ = total(torch.stack([valid.sum().double(), values.sum()])).unbind()
    centred = (values - sum_ / count.clamp(min=1)).masked_fill(~valid, 0)
    variance = total(centred.square().sum()[None])[0] / count.clamp(min=1)
    return (centred * torch.rsqrt(variance + eps)).to(x.dtype)


def advantages(rollout: Rollout, phase: MinillmPhase, *, reduce: Reduce | None = None) -> Tensor:
    """The advantage A of every response token [N], CPU, the dtype of the rollout's log-probabilities.

    Returns of the scaled and clipped rewards; whitened over all valid tokens of the round where the phase says so.
    `reduce`: see whiten. Raises ValueError where the teacher has not scored the rollout yet (see score).
    """
    if rollout.teacher_logprobs is None:
        raise ValueError("the rollout has no teacher_logprobs; fill them with objective.score first")
    flat = rewards(
        rollout.teacher_logprobs.double(),
        rollout.old_logprobs.double(),
        scaling=phase.reward_scaling,
        clip=phase.reward_clip,
    )
    padded, mask = rollout.padded(flat)
    result = flat
    if padded.numel():
        result = returns(padded, mask, gamma=phase.gamma, include_current=phase.include_current)[mask]
    if phase.whiten:
        result = whiten(result, reduce=reduce)
    return result.to(rollout.old_logprobs.dtype)


@torch.no_grad()
def score(
    rollout: Rollout,
    teacher_hidden: Tensor,
    teacher_head: Head,
    phase: MinillmPhase,
    **options: Any,
) -> Rollout:
    """The rollout with teacher_logprobs = log p(y) at the phase's temperature, over the common vocabulary.

    For rollouts of which the teacher did not decode every token; mixture_logprobs = log(a p(y) + (1 - a) q_old(y)), a
    the phase's mix_alpha, are filled too where they are missing. teacher_hidden [N, H]: of one prefill, in the order of
    the rollout's tokens (`Teacher.hidden(rollout.to_batch(pad_id))`).
    """
    _check_rows(teacher_hidden, rollout.old_logprobs)
    common = int(rollout.vocab_size)
    logprobs, _ = linear_logprobs(
        teacher_hidden,
        teacher_head.weight[:common],
        rollout.response_tokens.to(teacher_hidden.device),
        temperature=phase.temperature,
        **options,
        **_side(teacher_head, common),
    )
    scored = logprobs.to("cpu", rollout.old_logprobs.dtype)
    mixture = rollout.mixture_logprobs
    if mixture is None:
        mixture = _mix(scored, rollout.old_logprobs, phase.mix_alpha)
    return replace(rollout, teacher_logprobs=scored, mixture_logprobs=mixture)


def _mix(teacher_logprobs: Tensor, student_logprobs: Tensor, alpha: float) -> Tensor:
    """log(alpha p + (1 - alpha) q) of log p and log q, any shape, in float64; 0 < alpha < 1."""
    p, q = teacher_logprobs.double() + math.log(alpha), student_logprobs.double() + math.log1p(-alpha)
    return torch.logaddexp(p, q).to(student_logprobs.dtype)


# -- losses ---------------------------------------------------------------------------------------

LM = "lm"  # the plain-text term beside minillm or distillm: its statistics carry the prefix "lm_"


@dataclass(frozen=True)
class Loss:
    """One term of the objective for the tokens of one forward. Terms of one name share a denominator.

    `over(denominator)` is what Student.forward calls with (hidden [N, H], head): it returns the scalar
    sum over the tokens / denominator, and detached sums over the tokens: "tokens" and the statistics of the term.
    """

    term: str
    compute: Callable[[Tensor, Head, float], tuple[Tensor, Stats]]

    def over(self, denominator: float) -> Callable[[Tensor, Head], tuple[Tensor, Stats]]:
        return lambda hidden, head: self.compute(hidden, head, denominator)


def means(totals: Mapping[str, float], denominators: Mapping[str, float]) -> dict[str, float]:
    """Sums over forwards and processes, each divided by the tokens of its term; the loss and the counts as they are.

    denominators: tokens of each term of the optimizer batch, at most one besides "lm".
    """
    main = next((term for term in denominators if term != LM), LM)

    def mean(name: str, total: float) -> float:
        if name == "loss" or name.endswith("tokens"):
            return total
        return total / max(denominators[LM if name.startswith(f"{LM}_") else main], 1)

    return {name: mean(name, total) for name, total in totals.items()}


def sft_loss(batch: SequenceBatch, **options: Any) -> Loss:
    """Cross-entropy of the batch's targets. Statistics: nll."""
    return Loss("sft", _supervised(batch, None, None, options))


def kd_loss(
    batch: SequenceBatch,
    teacher_hidden: Tensor,
    teacher_head: Head,
    phase: KdPhase,
    **options: Any,
) -> Loss:
    """(1 - kd_ratio) CE + kd_ratio T^2 KL(teacher || student) at temperature T; the cross-entropy at temperature 1.

    teacher_hidden [N, H] at the batch's positions. Statistics: forward_kl (at T, without T^2) where kd_ratio > 0, nll
    where kd_ratio < 1.
    """
    parts: dict[str, Any] = {"kd_ratio": phase.kd_ratio, "temperature": phase.temperature}
    return Loss("kd", _supervised(batch, teacher_hidden, teacher_head, options, **parts))


def divergence_loss(
    batch: SequenceBatch, teacher_hidden: Tensor, teacher_head: Head, phase: Mixed, **options: Any
) -> Loss:
    """The divergence `phase.kind` of student and teacher at phase.temperature, on whichever responses; no factor T^2.

    teacher_hidden [N, H] at the batch's positions. Statistic: the value, under the kind's name.
    """
    _check_rows(teacher_hidden, batch.targets)
    kind, number = phase.kind

    def compute(hidden: Tensor, head: Head, denominator: float) -> tuple[Tensor, Stats]:
        loss = linear_divergence(
            hidden,
            head.weight,
            teacher_hidden.to(hidden.device),
            teacher_head.weight,
            kind,
            beta=number,
            temperature=phase.temperature,
            reduction="mean",
            denominator=denominator,
            **options,
            **_sides(head, teacher_head),
        )
        tokens = torch.tensor(float(len(batch.targets)), device=hidden.device)
        return loss, {"tokens": tokens, kind: (loss * denominator).detach()}

    return Loss("divergence", compute)


def lm_loss(
    batch: SequenceBatch,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    phase: MinillmPhase | DistillmPhase,
    **options: Any,
) -> Loss:
    """The plain-text term: lm_weight ((1 - kd_ratio) CE + kd_ratio soft CE toward the teacher), at temperature 1.

    The soft cross-entropy -sum_v p(v) log q(v) is KL(teacher || student) plus the teacher's entropy. That is constant
    in the student and would cost a teacher's pass over the vocabulary: the loss is reported without it, the gradient is
    the same. Statistics: lm_forward_kl where kd_ratio > 0 (which needs teacher_hidden and teacher_head), lm_nll where
    kd_ratio < 1.
    """
    parts: dict[str, Any] = {"kd_ratio": phase.kd_ratio, "weight": phase.lm_weight, "prefix": f"{LM}_"}
    return Loss(LM, _supervised(batch, teacher_hidden, teacher_head, options, **parts))


def minillm_loss(
    rollout: Rollout,
    advantages: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head,
    phase: MinillmPhase,
    **options: Any,
) -> Loss:
    """Single-step reverse KL over the whole vocabulary plus the clipped policy gradient, for a rollout's N tokens.

    advantages [N] and teacher_hidden [N, H] in the order of the rollout's tokens. The formula is
    mskd_kernels.minillm_loss's; one temperature, the phase's, for both models.
    Statistics: reverse_kl = KL(student || teacher), entropy (of the student), clipped (tokens in whose policy term the
    clip holds), student_logprobs, teacher_logprobs and ratio = q / q_old (all three of the sampled tokens).
    """
    _check_rows(teacher_hidden, rollout.old_logprobs)
    _check_rows(advantages, rollout.old_logprobs)

    def compute(hidden: Tensor, head: Head, denominator: float) -> tuple[Tensor, Stats]:
        old = rollout.old_logprobs.to(hidden.device)
        result = linear_minillm_loss(
            hidden,
            head.weight,
            teacher_hidden.to(hidden.device),
            teacher_head.weight,
            rollout.response_tokens.to(hidden.device),
            old,
            advantages.to(hidden.device),
            rollout.importance_weights.to(hidden.device),
            clip=phase.clip,
            temperature=phase.temperature,
            weight_single_step=phase.weight_single_step,
            clip_weighted_ratio=phase.clip_weighted_ratio,
            denominator=denominator,
            **options,
            **_sides(head, teacher_head),
        )
        tokens = torch.tensor(float(len(old)), device=hidden.device)
        return result.loss, {
            "tokens": tokens,
            "reverse_kl": result.reverse_kl.sum(),
            "entropy": result.entropy.sum(),
            "clipped": result.clipped_fraction * tokens,
            "student_logprobs": result.student_logprobs.sum(),
            "teacher_logprobs": result.teacher_logprobs.sum(),
            "ratio": (result.student_logprobs - old).exp().sum(),
        }

    return Loss("minillm", compute)


def _supervised(
    batch: SequenceBatch,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    options: dict[str, Any],
    *,
    kd_ratio: float = 0.0,
    temperature: float = 1.0,
    weight: float = 1.0,
    prefix: str = "",
) -> Callable[[Tensor, Head, float], tuple[Tensor, Stats]]:
    """weight ((1 - kd_ratio) CE + kd_ratio T^2 forward KL); a part whose share is 0 is not computed.

    Factors of the loss go into the denominator: the gradient is made with the loss, and what comes after would cost a
    pass over that of the weight.
    """
    if kd_ratio > 0:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError(f"kd_ratio is {kd_ratio}, which needs the teacher's hidden states and head")
        _check_rows(teacher_hidden, batch.targets)

    def compute(hidden: Tensor, head: Head, denominator: float) -> tuple[Tensor, Stats]:
        targets = batch.targets.to(hidden.device)
        loss, sums = parts(hidden, head, targets, denominator)
        tokens = torch.tensor(float(len(targets)), device=hidden.device)
        named = {"tokens": tokens, **{name: x.detach() for name, x in sums.items()}}
        return loss if weight == 1 else loss * weight, {f"{prefix}{name}": x for name, x in named.items()}

    def parts(hidden: Tensor, head: Head, targets: Tensor, denominator: float) -> tuple[Tensor, Stats]:
        if teacher_hidden is None or teacher_head is None or kd_ratio == 0:
            loss = linear_cross_entropy(hidden, head.weight, targets, denominator=denominator, **options, **_side(head))
            return loss, {"nll": loss * denominator}
        both = hidden, head.weight, teacher_hidden.to(hidden.device), teacher_head.weight
        settings = {"temperature": temperature, **options, **_sides(head, teacher_head)}
        if kd_ratio == 1:
            share = denominator / temperature**2
            loss = linear_divergence(*both, "forward_kl", reduction="mean", denominator=share, **settings)
            return loss, {"forward_kl": loss * share}
        result = linear_kd_loss(*both, targets, kd_ratio=kd_ratio, denominator=denominator, **settings)
        return result.loss, {"nll": result.nll.sum(), "forward_kl": result.divergence.sum()}

    return compute


def _side(head: Head, vocab_size: int | None = None) -> dict[str, Any]:
    """What a head does to its logits besides the weight, as the keywords of mskd_kernels."""
    bias = None if head.bias is None else head.bias[:vocab_size]
    return {"bias": bias, "logit_scale": head.scale, "softcap": head.softcap}


def _sides(student: Head, teacher: Head) -> dict[str, Any]:
    both = {"student": _side(student), "teacher": _side(teacher)}
    return {f"{name}_{key}": value for name, side in both.items() for key, value in side.items()}


def _check_rows(given: Tensor, tokens: Tensor) -> None:
    if given.shape[0] != tokens.shape[0]:
        raise ValueError(f"{given.shape[0]} rows given for {tokens.shape[0]} tokens")
