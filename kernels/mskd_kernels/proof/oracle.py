"""What goes into a case, and what must come out of it: from the definitions, in float64, by autograd in plain torch.

given = inputs_of(case, device); truth = truth_of(given)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._row_op import ENTROPY, LOGPROB, TEACHER_LOGPROB, VALUE, Coefficients, Objective, Policy, RowOp, Side
from mskd_kernels.divergence import reference_values
from mskd_kernels.minillm import token_losses
from mskd_kernels.proof.cases import F16, F32, Case

_MARGIN = 3  # columns after each row
_OF_MASS = 2e-5  # of q and p, weighed like the gradient: its terms cancel
_TIE = 1e-4  # of log q - log p, below which float32 may take the sign of q - p for another
_ENTROPY = 12.0  # about what it and a log-probability are at most


# Inputs ---------------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Raw logits [N, V] within rows that are longer, and a token's constants [N]."""

    op: RowOp
    s: Tensor
    t: Tensor | None
    tokens: Tensor | None
    live: Tensor | None
    objective: Objective
    fields: Coefficients | None  # those of the loss "fields"; else the objective gives them


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """The same numbers on every device."""
    n, v = case.tokens, case.vocabulary
    generator = torch.Generator().manual_seed(n * 7919 + v)
    student, other = (torch.randn(n, v, generator=generator) for _ in range(2))
    teacher = student + 0.016 * other if case.close else 2 * other
    student, teacher = 2 * student, 2 * teacher if case.close else teacher
    tokens = torch.randint(v // 2, v, (n,), generator=generator)
    if case.infinite:
        student[1, : v // 2 : 3] = teacher[1, : v // 2 : 3] = -torch.inf  # neither side has mass there
        teacher[2, 3], student[3, v // 3] = -torch.inf, -torch.inf  # only one has
    live = None
    if case.masked:
        live = torch.arange(n) % 5 != 4
        student[~live], teacher[~live] = torch.nan, torch.nan
    constants = torch.rand(6, n, generator=generator) + 0.25
    old, advantages, weights = -2 * constants[0] - math.log(v), 4 * constants[1] - 3, constants[2]
    old, advantages, weights = (x.to(device, F32) for x in (old, advantages, weights))
    policy = Policy(old, advantages, weights, 0.2, True, case.logits != F16)
    with_tokens = case.loss != "plain"
    fields = None
    if case.loss == "fields":
        fields = Coefficients(*((x - 0.7).to(device, F32) for x in constants[3:]))
        fields = fields._replace(value=None) if case.kind is None else fields
    side = Side(1.1, 20.0) if case.capped else Side()
    kind = None if case.kind is None else DIVERGENCES[case.kind]
    entropy = case.loss in ("policy", "fields")
    student, teacher = (x.to(device, case.logits) for x in (student, teacher))
    apart = case.layout == "apart"
    return Inputs(
        op=RowOp(kind, "triton", 0.7 if case.close else 1.0, side, side, entropy),
        s=laid_out(student, case.layout, torch.nan),
        t=None if kind is None else laid_out(teacher, case.layout, torch.nan, shifted=apart),
        tokens=tokens.to(device) if with_tokens else None,
        live=None if live is None else live.to(device),
        objective=_objective(case.loss, policy, device),
        fields=fields,
    )


def _objective(loss: str, policy: Policy, device: torch.device) -> Objective:
    third = torch.tensor(3.0, device=device)
    return {
        "plain": Objective(divisor=third),
        "kd": Objective(0.6, 0.4),
        "policy": Objective(1.0, 0.0, policy),
        "nll": Objective(0.0, 1.0, None, third),
        "fields": Objective(),
    }[loss]


def laid_out(x: Tensor, layout: str, after: float, shifted: bool = False) -> Tensor:
    """x [N, V] within longer rows that hold `after` beyond their V columns; `shifted`: one element later in memory."""
    n, v = x.shape
    stride = v + _MARGIN
    if layout == "aligned":
        stride = -(-stride // 64) * 64
    start = 1 if shifted else 0
    rows = torch.full((n * stride + start,), after, dtype=x.dtype, device=x.device)[start:].view(n, stride)
    rows[:, :v] = x
    return rows[:, :v]


def beyond(x: Tensor) -> Tensor:
    """What lies after the columns of each row."""
    n, v = x.shape
    return torch.as_strided(x, (n, x.stride(0) - v), x.stride(), x.storage_offset() + v)


# The truth ------------------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """In float64: statistics that are compared, losses and clip flags [N], the gradient [N, V].

    `slack` [N, V]: the error that a gradient may have besides its rounding.
    """

    statistics: dict[int, Tensor]
    losses: Tensor
    clipped: Tensor
    gradient: Tensor
    slack: Tensor


def truth_of(given: Inputs) -> Truth:
    """From the definitions, by autograd in plain torch."""
    op, n = given.op, given.s.shape[0]
    live = torch.ones(n, dtype=torch.bool, device=given.s.device) if given.live is None else given.live
    s = given.s.double().masked_fill(~live[:, None], 0.0).requires_grad_()
    lq = _logprobs(s, op.student, op.temperature)
    q = lq.exp()
    fields: dict[int, Tensor] = {}
    zero = torch.zeros(n, dtype=torch.float64, device=s.device)
    lp = None
    if given.t is not None and op.kind is not None:
        lp = _logprobs(given.t.double().masked_fill(~live[:, None], 0.0), op.teacher, op.temperature)
        fields[VALUE] = reference_values(lq, lp, op.kind.name, op.kind.beta)
    if given.tokens is not None:
        fields[LOGPROB] = lq.gather(1, given.tokens[:, None])[:, 0]
        if lp is not None:
            fields[TEACHER_LOGPROB] = lp.gather(1, given.tokens[:, None])[:, 0]
    if op.entropy:
        fields[ENTROPY] = -(q * lq.clamp(min=-1e30)).sum(1)
    losses, clipped, size = _losses(given, fields, zero)
    dead = ~live | (fields[VALUE].detach().isinf() if VALUE in fields else torch.zeros_like(live))
    total = losses.masked_fill(dead, 0.0).sum()
    divisor = 1.0 if given.objective.divisor is None else given.objective.divisor.double()
    (gradient,) = torch.autograd.grad(total / divisor, s)
    found = {column: x.detach().masked_fill(~live, 0.0) for column, x in fields.items()}
    losses, clipped = losses.detach().masked_fill(~live, 0.0), clipped & live
    gradient = gradient.masked_fill(dead[:, None], 0.0)
    return Truth(found, losses, clipped, gradient, _slack(op, lq.detach(), lp) * size[:, None] / divisor)


def _slack(op: RowOp, lq: Tensor, lp: Tensor | None) -> Tensor:
    if lp is None:
        return _OF_MASS * lq.exp()
    ratio = (lq - lp).nan_to_num(0.0, 0.0, 0.0).abs()
    mass = lq.exp() + lp.exp()
    slack = _OF_MASS * mass * (1 + ratio)
    if op.kind is None or op.kind.name != "tvd":
        return slack
    ties = ratio < _TIE  # where the slope jumps, and with it the sum that all columns hold
    return torch.where(ties, mass, slack) + mass * mass.masked_fill(~ties, 0.0).sum(1, keepdim=True)


def _logprobs(z: Tensor, side: Side, temperature: float) -> Tensor:
    y = z * side.scale if side.softcap is None else side.softcap * torch.tanh(z * side.scale / side.softcap)
    return (y / temperature).log_softmax(-1).masked_fill(z == -torch.inf, -torch.inf)


def _losses(given: Inputs, fields: dict[int, Tensor], zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], clip flags [N], and the size [N] of the coefficients, to which errors are relative."""
    objective, losses, size = given.objective, zero, zero
    nothing = torch.zeros_like(zero, dtype=torch.bool)
    if given.fields is not None:
        for c, column in zip(given.fields, (VALUE, LOGPROB, ENTROPY), strict=True):
            if c is not None:
                losses, size = losses + c.double() * fields[column], size + c.double().abs() * _ENTROPY
        return losses, nothing, size
    if objective.policy is not None:
        old, advantages, weights = (x.double() for x in objective.policy[:3])
        policy = objective.policy._replace(old_logprobs=old, advantages=advantages, importance_weights=weights)
        losses, clipped = token_losses(policy, fields[VALUE], fields[LOGPROB])
        ratio = (fields[LOGPROB].detach() - old).exp()
        return losses, clipped, weights * (1 + ratio * advantages.abs())
    if VALUE in fields:
        losses, size = losses + objective.value * fields[VALUE], size + objective.value
    if objective.nll:
        losses, size = losses - objective.nll * fields[LOGPROB], size + objective.nll
    return losses, nothing, size
