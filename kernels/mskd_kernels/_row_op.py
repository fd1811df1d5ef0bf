"""The row op as data, the one mechanism of this package: logits of tokens -> scalars a token -> gradient in the logits.

N tokens (rows), V vocabulary, T temperature. With s and t the student's and the teacher's logits over T, Ls and Lt
their log-sum-exp, log q = s - Ls, log p = t - Lt, y the token, and f, w the terms of the kind (`Divergence`):

    K = sum_v f      c = sum_v w      lq = log q(y)      lp = log p(y)      H = - sum_v q log q

and for any coefficients gK, gy, gH a token (what the loss passes back for K, lq and H):

    d/ds_v = gK (w - q c)  + gy (1[v = y] - q)  - gH q (log q + H)

Both sides are held in a frame of their own: a constant near the row's maximum is subtracted before anything is
summed, and Ls, Lt stay in that frame; else K loses its digits where student and teacher are close but offset. The
raw logits z of a side pass through `softcap * tanh(scale * z / softcap)` first (scale * z without soft-cap).

Here: the op's settings, the columns of its statistics, and the loss. `_torch_rows` and `_triton_rows` do the work,
`_rows` chooses between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns of the statistics. Frames are in units of the soft-capped logits (of the raw ones without a soft-cap).
VALUE, LOGPROB, TEACHER_LOGPROB, ENTROPY, FRAME, LSE, TEACHER_FRAME, TEACHER_LSE, CENTER = range(9)
COLUMNS = 9


class Divergence(NamedTuple):
    """A kind of divergence: its terms f and w (see the top), elementwise, and where they come from.

    `reference(lq, lp, beta)` -> f by its definition, for autograd. `terms(lq, lp, q, beta)` -> (f, w) in torch,
    fresh memory; `triton_terms(lq, lp, q, p, beta)` -> (f, w) as a Triton function. All get logarithms that are
    finite: a mass of 0 comes as -1e30. w may differ from the slope by a multiple of q, which c takes away again.
    """

    name: str
    source: str
    reference: Callable[[Tensor, Tensor, Any], Tensor]
    terms: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
    triton_terms: Any
    expectation: str | None = None  # of log q - log p: of the "student", or of the "teacher" (negated). In one pass.
    beta: float | None = None  # the kind's number: in the table its default, in a RowOp the one in use
    at_zero: str | None = None  # the kind that it is at beta = 0; None: 0 is not allowed


@dataclass(frozen=True)
class Side:
    """How the raw logits of one side become logits."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class RowOp:
    """The settings of a row op. `kind` None: there is no teacher."""

    kind: Divergence | None
    backend: str
    temperature: float = 1.0
    student: Side = Side()
    teacher: Side = Side()
    entropy: bool = False


class Coefficients(NamedTuple):
    """What the loss passes back a token, each [N] or None: of K, of log q(y), of the entropy."""

    value: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None


class Policy(NamedTuple):
    """The constants of a clipped policy gradient, each [N] in the dtype of the statistics, and its settings."""

    old_logprobs: Tensor
    advantages: Tensor
    importance_weights: Tensor
    clip: float
    weight_single_step: bool
    clip_weighted_ratio: bool


class Objective(NamedTuple):
    """A loss a token as data: value * [w if weight_single_step] * K - nll * log q(y) + the policy's term.

    With A the advantage, r = q(y) / q_old(y), w the importance weight and c(.) the clamp to [1 - clip, 1 + clip] that
    term is max(-A w r, -A c(w r)) with clip_weighted_ratio, else w max(-A r, -A c(r)) (MiniLLM, Gu et al. 2024).
    All of it times the token's weight, where there are weights: one of 0 makes 0 of +inf too.
    """

    value: float = 1.0
    nll: float = 0.0
    policy: Policy | None = None
    divisor: Tensor | None = None  # [] in the dtype of the statistics, any device: of the gradient, not of the losses
    weights: Tensor | None = None  # [N] in the dtype of the statistics

    def each(self, function: Callable[[Tensor], Tensor]) -> "Objective":
        """The same with what it holds of every token passed through a function."""
        policy = self.policy
        if policy is not None:
            old_logprobs, advantages, importance_weights = (function(x) for x in policy[:3])
            policy = policy._replace(
                old_logprobs=old_logprobs, advantages=advantages, importance_weights=importance_weights
            )
        return self._replace(policy=policy, weights=None if self.weights is None else function(self.weights))

    def at(self, rows: slice | Tensor) -> "Objective":
        """The same for some tokens."""
        return self.each(lambda x: x[rows])


def evaluate(objective: Objective, stats: Tensor) -> tuple[Tensor, Tensor, Coefficients]:
    """Statistics [N, COLUMNS] -> losses [N], clip flags [N] (bool: it took effect), derivatives over the divisor."""
    losses, logprob_slope = torch.zeros_like(stats[:, VALUE]), None
    clipped = torch.zeros_like(losses, dtype=torch.bool)
    value_slope = torch.full_like(losses, objective.value) if objective.value else None
    if objective.nll:
        losses = losses - objective.nll * stats[:, LOGPROB]
        logprob_slope = torch.full_like(losses, -objective.nll)
    if objective.policy is not None:
        policy, slope, clipped = _policy_terms(objective.policy, stats[:, LOGPROB])
        losses = losses + policy
        logprob_slope = slope if logprob_slope is None else logprob_slope + slope
        if value_slope is not None and objective.policy.weight_single_step:
            value_slope = value_slope * objective.policy.importance_weights
    if value_slope is not None:
        losses = losses + value_slope * stats[:, VALUE]
    slopes = Coefficients(value_slope, logprob_slope)
    if (weights := objective.weights) is not None:
        losses = (losses * weights).masked_fill(weights == 0, 0.0)
        slopes = Coefficients(*(None if c is None else c * weights for c in slopes))
    if objective.divisor is not None:
        slopes = Coefficients(*(None if c is None else c / objective.divisor for c in slopes))
    return losses, clipped, slopes


def _policy_terms(policy: Policy, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The policy's term, its derivative in log q(y), and whether the clip took effect, each [N]."""
    old_logprobs, a, w, clip, _, clip_weighted_ratio = policy
    ratio = (logprobs - old_logprobs).exp()
    x = w * ratio if clip_weighted_ratio else ratio
    free, limited = -a * x, -a * x.clamp(1 - clip, 1 + clip)
    term, clipped = torch.maximum(free, limited), limited > free
    slope = free.masked_fill(clipped, 0.0)  # d/dlq of x is x
    return (term, slope, clipped) if clip_weighted_ratio else (w * term, w * slope, clipped)


def in_effect(coefficients: Coefficients, stats: Tensor, live: Tensor | None) -> Coefficients:
    """The coefficients, 0 for tokens that are not live and for those with a value of +inf."""
    dead = stats[:, VALUE] == torch.inf
    if live is not None:
        dead |= ~live
    return Coefficients(*(None if c is None else c.masked_fill(dead, 0.0) for c in coefficients))
