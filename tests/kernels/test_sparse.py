"""A teacher of top-k log-probabilities: K + 1 outcomes, against the definition in float64."""

import pytest
import torch
from kernel_cases import logits, oracle_divergence
from mskd_kernels import divergence, sparse_divergence
from mskd_kernels._kinds import DIVERGENCES

N, V, K = 7, 40, 5


def case(dtype=torch.float64, k=K):
    s, t = logits(N, V, dtype=torch.float64)
    logprobs, ids = t.log_softmax(-1).topk(k)
    return s.to(dtype).requires_grad_(), logprobs.to(dtype), ids, t


def buckets(logits, ids):
    """Logarithms of the probabilities of the given tokens and of all others together, from the definition."""
    p = logits.double().softmax(-1)
    given = p.gather(-1, ids)
    rest = p.masked_fill(torch.zeros_like(p).scatter(-1, ids, 1.0) > 0, 0.0).sum(-1, keepdim=True)
    return torch.cat([given, rest], -1).log()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_value_and_gradient_are_those_of_k_plus_one_outcomes(kind):
    s, logprobs, ids, t = case()
    for temperature in (1.0, 2.0):
        truth = oracle_divergence(buckets(s / temperature, ids), buckets(t, ids), kind)
        ours = sparse_divergence(s, logprobs, ids, kind, temperature=temperature)
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
        grads = (torch.autograd.grad(x.sum(), s) for x in (ours, truth))
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)
        assert (ours <= oracle_divergence(s / temperature, t, kind) + 1e-12).all()


def test_it_is_the_divergence_where_every_token_is_given_and_where_none_of_them_differ():
    s, logprobs, ids, t = case(k=V)
    for kind in DIVERGENCES:
        ours = sparse_divergence(s, logprobs, ids, kind, reduction="mean")
        truth = divergence(s, t, kind, reduction="mean")
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(*(torch.autograd.grad(x, s) for x in (ours, truth)))
    logprobs, ids = s.detach().log_softmax(-1).topk(K)
    torch.testing.assert_close(sparse_divergence(s, logprobs, ids), torch.zeros(N, dtype=torch.float64))


def test_with_infinite_logits_instead_there_is_no_gradient_and_here_there_is():
    s, logprobs, ids, t = case()
    cut = torch.full_like(t, -torch.inf).scatter(-1, ids, t.gather(-1, ids))
    blind = divergence(s, cut)
    assert blind.isinf().all() and (torch.autograd.grad(blind.sum(), s)[0] == 0).all()
    ours = sparse_divergence(s, logprobs, ids)
    assert ours.isfinite().all() and (torch.autograd.grad(ours.sum(), s)[0].abs().sum(-1) > 0.01).all()


def test_entries_that_are_none_and_rows_of_other_lengths():
    s, logprobs, ids, t = case()
    logprobs[2, 3:], ids[2, 3:] = -torch.inf, -1
    ours = sparse_divergence(s, logprobs, ids)
    full = case()[1:3]
    torch.testing.assert_close(ours[[0, 6]], sparse_divergence(s, *full)[[0, 6]])
    truth = oracle_divergence(buckets(s[2:3], full[1][2:3, :3]), buckets(t[2:3], full[1][2:3, :3]), "reverse_kl")
    torch.testing.assert_close(ours[2:3], truth)
    assert torch.autograd.grad(ours.sum(), s)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_rounding_left_no_tail_stays_finite(dtype):
    s, *_ = case(dtype)
    logprobs = torch.zeros(N, 1, dtype=dtype)  # a probability of 1: API's round, and the student has the rest
    for kind in DIVERGENCES:
        ours = sparse_divergence(s, logprobs, torch.zeros(N, 1, dtype=torch.int64), kind, reduction="mean")
        assert ours.isfinite() and ours.dtype == torch.float32
        grad = torch.autograd.grad(ours, s)[0]
        assert grad.isfinite().all() and grad.dtype == dtype and grad.abs().sum() > 0


def test_what_counts_is_that_of_divergence():
    s, logprobs, ids, t = case()
    labels = torch.arange(N).masked_fill(torch.arange(N) % 3 == 0, -100)
    counts = labels != -100
    plain = sparse_divergence(s, logprobs, ids)
    with torch.no_grad():
        s[0], logprobs[3], ids[6] = torch.nan, 7.0, 10_000  # where nothing counts anything may stand
    for settings in ({"labels": labels}, {"mask": counts}):
        mean = sparse_divergence(s, logprobs, ids, reduction="mean", **settings)
        torch.testing.assert_close(mean, plain[counts].mean())
        assert (torch.autograd.grad(mean, s)[0][~counts] == 0).all()
    weights = torch.rand(N, dtype=torch.float64)
    ours = sparse_divergence(s, logprobs, ids, mask=counts, weights=weights, reduction="mean")
    torch.testing.assert_close(ours, (plain * weights)[counts].sum() / weights[counts].sum())


def test_refused():
    s, logprobs, ids, t = case()
    top = t.topk(K).values
    for message, call in {
        "must be log-probabilities of the whole vocabulary": lambda: sparse_divergence(s, top, ids),
        "teacher_ids name a token twice": lambda: sparse_divergence(s, logprobs, ids * 0),
        "teacher_ids must lie in the student's vocabulary of 40": lambda: sparse_divergence(s, logprobs, ids + 30),
        "teacher_ids must be int64 or int32": lambda: sparse_divergence(s, logprobs, ids.float()),
        "teacher_ids has shape": lambda: sparse_divergence(s, logprobs, ids[:, :2]),
        "beside teacher_logprobs": lambda: sparse_divergence(s, logprobs[:3], ids[:3]),
        "teacher_logprobs requires grad": lambda: sparse_divergence(s, logprobs.clone().requires_grad_(), ids),
        "kind='kl' is not known": lambda: sparse_divergence(s, logprobs, ids, "kl"),
        "mask holds other values": lambda: sparse_divergence(s, logprobs, ids, mask=torch.arange(N)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
