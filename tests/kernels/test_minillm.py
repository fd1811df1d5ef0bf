"""minillm_loss on logits against an oracle that goes token by token."""

import itertools

import pytest
import torch
from kernel_cases import FLOATS, ROWS, assert_as_exact, logits, oracle_divergence, oracle_minillm, token_constants
from mskd_kernels import minillm_loss, minillm_loss_reference

VARIANTS = list(itertools.product([True, False], [True, False]))


@pytest.mark.parametrize(("weight_single_step", "clip_weighted_ratio"), VARIANTS)
def test_formula(backend, device, weight_single_step, clip_weighted_ratio):
    n, v, temperature = 12, 40, 0.8
    s, t = logits(n, v, dtype=torch.float64, device=device)
    constants = token_constants(n, v, device=device)
    mask = torch.arange(n, device=device) % 5 != 2
    variant = {"weight_single_step": weight_single_step, "clip_weighted_ratio": clip_weighted_ratio}
    x = s.clone().requires_grad_()
    expected = oracle_minillm(x, t, constants, mask.tolist(), 0.2, temperature, **variant) / 7.5
    (wanted,) = torch.autograd.grad(expected, x)
    noisy = {k: c.masked_fill(~mask, torch.nan if c.is_floating_point() else -100) for k, c in constants.items()}
    x = s.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    result = minillm_loss(
        x, t, **noisy, mask=mask, clip=0.2, temperature=temperature, denominator=7.5, backend=backend, **variant
    )
    (gradient,) = torch.autograd.grad(result.loss, x)
    torch.testing.assert_close(result.loss, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-9)


def test_fields(backend, device):
    s, t = (x.view(2, 5, 60) for x in logits(10, 60, dtype=torch.float64, device=device))
    constants = {k: c.view(2, 5) for k, c in token_constants(10, 60, device=device).items()}
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], device=device)
    result = minillm_loss(s.requires_grad_(), t, **constants, mask=mask, backend=backend)
    lq, lp = s.detach().log_softmax(-1), t.log_softmax(-1)
    y = constants["tokens"][..., None]
    torch.testing.assert_close(result.reverse_kl, oracle_divergence(s.detach(), t, "reverse_kl") * mask)
    torch.testing.assert_close(result.student_logprobs, lq.gather(-1, y)[..., 0] * mask)
    torch.testing.assert_close(result.teacher_logprobs, lp.gather(-1, y)[..., 0] * mask)
    torch.testing.assert_close(result.entropy, -(lq.exp() * lq).sum(-1) * mask)
    ratio = constants["importance_weights"] * (result.student_logprobs - constants["old_logprobs"]).exp()
    a = constants["advantages"]
    active = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    torch.testing.assert_close(result.clipped_fraction, (active & (mask == 1)).sum() / mask.sum().double())
    assert 0 < float(result.clipped_fraction) < 1
    assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])
    result.loss.backward()
    plain = minillm_loss_reference(s, t, **constants, mask=mask)
    for x, y in zip(result, plain, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("close", "dtype"), [(True, x) for x in FLOATS] + [(False, torch.float32)])
def test_error_is_at_most_twice_that_of_torch(backend, device, close, dtype):
    n, v = ROWS[backend], 2100
    s, t = logits(n, v, close=close, dtype=dtype, device=device)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    constants = token_constants(n, v, out, device)
    constants["advantages"] *= 0.05 if close else 1.0

    def run(function, s, t, **settings):
        s = s.detach().clone().requires_grad_()
        result = function(s, t, **constants, **settings)
        return (*result[1:5], torch.autograd.grad(result.loss, s)[0])

    truth = run(minillm_loss_reference, s.double(), t.double())
    ours, plain = run(minillm_loss, s, t, backend=backend), run(minillm_loss_reference, s, t)
    for x, y, z in zip(ours, plain, truth, strict=True):
        assert_as_exact(x, y, z)


def test_gradcheck(backend, device):
    s, t = logits(4, 6, dtype=torch.float64, device=device)
    constants = token_constants(4, 6, device=device)
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: minillm_loss(x, t, **constants, backend=backend).loss, (s,), fast_mode=True
    )


def test_infinite_reverse_kl_has_no_gradient(backend, device):
    s, t = logits(3, 30, dtype=torch.float64, device=device)
    t[1, 4] = -torch.inf
    constants = token_constants(3, 30, device=device)
    x = s.clone().requires_grad_()
    result = minillm_loss(x, t, **constants, backend=backend)
    (gradient,) = torch.autograd.grad(result.loss, x)
    assert result.loss.isinf() and result.reverse_kl.isinf().tolist() == [False, True, False]
    x = s.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(minillm_loss_reference(x, t, **constants).loss, x)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_no_tokens_and_all_masked(device):
    for n, mask in ((0, None), (3, torch.zeros(3, device=device))):
        s, t = (torch.full((n, 20), torch.nan, device=device) for _ in range(2))
        constants = {k: c if k == "tokens" else c * torch.nan for k, c in token_constants(n, 20, torch.float32).items()}
        constants = {k: c.to(device) for k, c in constants.items()}
        result = minillm_loss(s.requires_grad_(), t, **constants, mask=mask)
        result.loss.backward()
        assert result.loss == 0 and result.clipped_fraction == 0 and (s.grad == 0).all()
        assert all((field == 0).all() and field.shape == (n,) for field in result[1:5])
