"""The row op below the public functions: the objective as data, and statistics and gradient in one go."""

import pytest
import torch
from kernel_cases import logits, token_constants
from mskd_kernels import _torch_rows
from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._row_op import COLUMNS, LOGPROB, VALUE, Objective, Policy, RowOp, Side, evaluate
from mskd_kernels._rows import fused, in_steps, statistics

N, V = 13, 301
OBJECTIVES = ["value", "value and nll", "policy", "nll"]


def make_objective(name, dtype=torch.float64, weighted=True, clip_weighted=True):
    if name != "policy":
        return {"value": Objective(), "value and nll": Objective(0.4, 0.6), "nll": Objective(0.0, 1.0)}[name]
    constants = token_constants(N, V, dtype)
    named = (constants[k] for k in ("old_logprobs", "advantages", "importance_weights"))
    return Objective(policy=Policy(*named, 0.2, weighted, clip_weighted))


def inputs(dtype):
    s, t = logits(N, V, dtype=torch.float64)
    s[2, 5], t[3, 6], s[4, 7], t[4, 7] = (-torch.inf,) * 4  # no mass; infinite for the reverse KL; neither
    tokens = token_constants(N, V)["tokens"].clamp(min=8)
    return s.to(dtype), t.to(dtype), tokens


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("clip_weighted", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluate_agrees_with_autograd(name, weighted, clip_weighted):
    """The loss of the docstring, differentiated by autograd; ratios inside, outside and exactly on the clip."""
    objective = make_objective(name, weighted=weighted, clip_weighted=clip_weighted)
    stats = torch.rand(N, COLUMNS, dtype=torch.float64)
    stats[:, LOGPROB] = -6 * torch.rand(N, dtype=torch.float64)
    if objective.policy is not None:
        stats[0, LOGPROB] = objective.policy.old_logprobs[0]
        objective.policy.importance_weights[0] = 1.2
        objective.policy.advantages[1] = 0.0
    value, logprob = (stats[:, i].clone().requires_grad_() for i in (VALUE, LOGPROB))
    expected = objective.value * value - objective.nll * logprob
    clipped = torch.zeros(N, dtype=torch.bool)
    if objective.policy is not None:
        old, a, w = objective.policy[:3]
        r = (logprob - old).exp()
        x = w * r if clip_weighted else r
        free, limited = -a * x, -a * x.clamp(0.8, 1.2)
        clipped = limited > free
        expected = (w if weighted else 1) * value + (1 if clip_weighted else w) * torch.maximum(free, limited)
    wanted = torch.autograd.grad(expected.sum(), (value, logprob), allow_unused=True)
    losses, flags, coefficients = evaluate(objective, stats)
    torch.testing.assert_close(losses, expected.detach())
    assert torch.equal(flags, clipped) and (name != "policy" or 0 < int(flags.sum()) < N)
    for ours, theirs in zip(coefficients[:2], wanted, strict=True):
        ours, theirs = (torch.zeros(N, dtype=torch.float64) if x is None else x for x in (ours, theirs))
        torch.testing.assert_close(ours, theirs)
    assert coefficients.entropy is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", [*DIVERGENCES, None])
def test_in_one_go_as_in_steps(kind, name, dtype):
    """`out` poisoned, or in the place of the logits; with and without dead rows and soft-caps."""
    row = None if kind is None else DIVERGENCES[kind]
    objective = make_objective(name, torch.float64 if dtype == torch.float64 else torch.float32)
    objective = objective if row is not None else objective._replace(value=0.0)
    limits = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-6), torch.bfloat16: (1e-2, 1e-4)}[dtype]
    for live in (None, torch.arange(N) % 4 != 1):
        for cap in (None, 20.0):
            s, t, tokens = inputs(dtype)
            if live is not None:
                s[~live], t[~live] = torch.nan, torch.nan
            teacher = None if row is None else t
            op = RowOp(row, "torch", 1.3, Side(0.9, cap), Side(1.1), entropy=True)
            apart = torch.full_like(s, torch.nan)
            wanted = in_steps(op, s, teacher, tokens, objective, apart, live)
            ours = fused(op, s, teacher, tokens, objective, s, live)
            for x, y in zip((*ours, s), (*wanted, apart), strict=True):
                torch.testing.assert_close(x, y, rtol=limits[0], atol=limits[1])
            assert s.isfinite().all() and (live is None or (s[~live] == 0).all())
            assert live is None or ((ours[0][~live] == 0).all() and (ours[1][~live] == 0).all())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_blocks_of_rows_change_nothing(kind, monkeypatch):
    s, t, tokens = inputs(torch.float32)
    op = RowOp(DIVERGENCES[kind], "torch", entropy=True)
    objective = make_objective("policy", torch.float32)
    results = []
    for elements in (1, 4 * V, 10**9):
        monkeypatch.setattr(_torch_rows, "_CPU_BLOCK", elements)
        out = torch.full_like(s, torch.nan)
        results.append((*fused(op, s, t, tokens, objective, out), out))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    again = torch.full_like(s, torch.nan)
    repeated = (*fused(op, s, t, tokens, objective, again), again)
    assert all(torch.equal(x, y) for x, y in zip(repeated, results[-1], strict=True))


def test_statistics_of_strided_rows():
    """Rows of wider buffers, as those of aligned memory are. What lies between them is NaN: reading it is seen."""
    s, t, tokens = inputs(torch.float32)
    op = RowOp(DIVERGENCES["jsd"], "torch", entropy=True)
    wide = torch.full((2, N, V + 19), torch.nan)
    wide[0, :, :V], wide[1, :, :V] = s, t
    x, u = wide[0, :, :V], wide[1, :, :V]
    near = {"rtol": 1e-5, "atol": 1e-6}  # other strides: other elements at the ends of torch's vectors
    torch.testing.assert_close(statistics(op, x, u, tokens), statistics(op, s, t, tokens), **near)
    out = torch.full((N, V), torch.nan)
    wanted = fused(op, s, t, tokens, Objective(), out)
    ours = fused(op, x, u, tokens, Objective(), x)
    torch.testing.assert_close((*ours, x), (*wanted, out), **near)
    assert wide[:, :, V:].isnan().all()


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_no_rows(name):
    s, t = torch.empty(0, V), torch.empty(0, V)
    results = fused(RowOp(DIVERGENCES["jsd"], name), s, t, None, Objective(), s)
    assert [tuple(x.shape) for x in results] == [(0, COLUMNS), (0,), (0,)] and results[2].dtype == torch.bool
