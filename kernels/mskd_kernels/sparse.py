"""A divergence to a teacher that is known in its likeliest tokens only: stored log-probabilities, or an API's.

    logprobs, ids = teacher_logits.log_softmax(-1).topk(64)           # what was kept, at temperature 1
    loss = sparse_divergence(student_logits, logprobs, ids, "reverse_kl", reduction="mean")

All other tokens are one outcome, the tail: both sides become distributions of K + 1 outcomes, whose divergence is at
most that of the whole vocabulary, and 0 where those agree. Were the others left out, the sum over K tokens would be no
divergence (a forward KL goes below 0); with -inf for them a reverse KL is +inf and has no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from mskd_kernels import _inputs
from mskd_kernels.divergence import divergence

_LEAST_TAIL = 1e-6  # of the teacher: rounding leaves it none where the student still has some, an infinite reverse KL
_EXCESS = 0.02  # over 1, of the sum of given probabilities: rounding in 16 bits


def sparse_divergence(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    kind: str = "reverse_kl",
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    **settings: Any,
) -> Tensor:
    """`divergence` over the teacher's K given tokens and one outcome for all others; the other keywords are its own.

    student_logits [..., V]; teacher_logprobs [..., K] float, of the whole vocabulary, at the same temperature as the
    student is taken; teacher_ids [..., K] int, distinct; an entry of -inf is none, its id may be any. What the teacher
    has left for the tail is at least 1e-6. Plain torch around `divergence`, with a few copies of the student's logits.
    Raises ValueError.
    """
    temperature = _inputs.check_settings(temperature)
    shape, device = student_logits.shape[:-1], student_logits.device
    _inputs.check_float("student_logits", student_logits)
    _inputs.check_teacher("teacher_logprobs", teacher_logprobs, student_logits)
    ids = _inputs.per_token("teacher_ids", teacher_ids, teacher_logprobs.shape, device).reshape(teacher_ids.shape)
    if ids.dtype not in (torch.int64, torch.int32) or teacher_logprobs.shape[:-1] != shape:
        raise ValueError(
            "teacher_ids must be int64 or int32 [..., K] beside teacher_logprobs [..., K] and student_logits [..., V], "
            f"got {ids.dtype} {tuple(ids.shape)}, {tuple(teacher_logprobs.shape)} and {tuple(student_logits.shape)}"
        )
    dtype = _inputs.accumulate_dtype(student_logits)
    counts = _inputs.counted(mask, student_logits, labels, ignore_index)
    student, logprobs = student_logits.to(dtype), teacher_logprobs.double()
    if counts is not None:
        student = student.masked_fill(~counts[..., None], 0.0)
        logprobs = logprobs.masked_fill(~counts[..., None], -torch.inf)
    there = logprobs > -torch.inf
    ids = _checked(logprobs, ids.long(), there, student.shape[-1])
    covered = torch.zeros_like(student, dtype=torch.int32).scatter_add_(-1, ids, there.int())
    _inputs.require((covered <= 1).all(), "teacher_ids name a token twice; an entry that is none has a logprob of -inf")
    sides = _student(student / temperature, ids, there, covered > 0), _teacher(logprobs, (covered == 0).any(-1))
    return divergence(sides[0], sides[1].to(dtype), kind, mask=counts, **settings)


def _checked(logprobs: Tensor, ids: Tensor, there: Tensor, vocabulary: int) -> Tensor:
    """The ids, 0 where there is none."""
    ids = ids.masked_fill(~there, 0)
    _inputs.require(
        ((ids >= 0) & (ids < vocabulary)).all(), f"teacher_ids must lie in the student's vocabulary of {vocabulary}"
    )
    _inputs.require(
        logprobs.exp().sum(-1).le(1 + _EXCESS).all(),
        "teacher_logprobs must be log-probabilities of the whole vocabulary: those of some token sum to more than 1",
    )
    return ids


def _student(logits: Tensor, ids: Tensor, there: Tensor, covered: Tensor) -> Tensor:
    """Log-probabilities [..., K + 1]; the tail by its own log-sum-exp, since 1 - sum would lose its digits."""
    whole = logits.logsumexp(-1, keepdim=True)
    given = (logits.gather(-1, ids) - whole).masked_fill(~there, -torch.inf)
    tail = logits.masked_fill(covered, -1e30).logsumexp(-1, keepdim=True) - whole
    return torch.cat([given, tail.masked_fill(covered.all(-1, keepdim=True), -torch.inf)], -1)


def _teacher(logprobs: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities [..., K + 1] in float64, but for a common factor; no tail where no token is left for it."""
    tail = (1 - logprobs.exp().sum(-1)).clamp(min=_LEAST_TAIL).log().masked_fill(~rest, -torch.inf)
    return torch.cat([logprobs, tail[..., None]], -1)
