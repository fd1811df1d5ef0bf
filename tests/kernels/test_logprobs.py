"""linear_logprobs: log-probability and entropy of tokens from hidden states."""

import pytest
import torch
from mskd_kernels import linear_logprobs, linear_logprobs_reference


def head(n, v, h, device, dtype=torch.float64):
    g = torch.Generator().manual_seed(n + v)
    made = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, h), (v, h), (v,))]
    tokens = torch.randint(0, v, (n,), generator=g).to(device)
    return [x.to(device, dtype).requires_grad_() for x in made], tokens


@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.6}], ids=["plain", "scaled"]
)
def test_equals_reference(backend, device, extra):
    leaves, tokens = head(20, 75, 10, device)
    mask = torch.arange(20, device=device) % 3 != 0
    noisy = tokens.masked_fill(~mask, -100)
    settings = {"bias": leaves[2], "mask": mask, **extra}
    ours = linear_logprobs(*leaves[:2], noisy, **settings, backend=backend, chunk_bytes=6 * 75 * 8)
    plain = linear_logprobs_reference(*leaves[:2], tokens, **settings)
    upstream = [torch.linspace(0.5, 2, 20, dtype=torch.float64, device=device), torch.full_like(plain[1], -0.3)]
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(plain, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_gradcheck(backend, device):
    leaves, tokens = head(3, 5, 2, device)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, tokens, bias=b, softcap=2.0, backend=backend), leaves, fast_mode=True
    )


def test_is_the_cross_entropy_of_torch(device):
    leaves, tokens = head(70, 300, 16, device, torch.float32)
    ours = -linear_logprobs(*leaves[:2], tokens)[0].mean()
    plain = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), tokens)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves[:2]), torch.autograd.grad(plain, leaves[:2]))


def test_infinite_bias_and_shapes(backend, device):
    leaves, tokens = head(6, 40, 4, device)
    bias = leaves[2].detach().clone()
    bias[3] = -torch.inf
    tokens = tokens.clone()
    tokens[0], tokens[1:] = 3, tokens[1:].clamp(min=4)
    hidden = leaves[0].view(2, 3, 4)
    logprobs, entropy = linear_logprobs(hidden, leaves[1], tokens.view(2, 3), bias=bias, backend=backend)
    assert logprobs.shape == entropy.shape == (2, 3)
    assert logprobs[0, 0] == -torch.inf and logprobs.flatten()[1:].isfinite().all() and entropy.isfinite().all()
    keep = [v for v in range(40) if v != 3]
    wanted = (hidden @ leaves[1][keep].t() + bias[keep]).log_softmax(-1)
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1))
    grads = torch.autograd.grad(logprobs.flatten()[1:].sum() + entropy.sum(), leaves[:2])
    assert all(g.isfinite().all() for g in grads) and (grads[1][3] == 0).all()


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_no_tokens(device, name):
    leaves, tokens = head(0, 40, 4, device)
    for x in linear_logprobs(*leaves[:2], tokens, backend=name):
        assert x.shape == (0,)
        assert all((g == 0).all() for g in torch.autograd.grad(x.sum(), leaves[:2], retain_graph=True))
