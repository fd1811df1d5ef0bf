"""Every kind of divergence by its own properties: definition, slope, zeros, bounds, limits, invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import logits, oracle_divergence, relative_error
from mskd_kernels import divergence, divergence_reference
from mskd_kernels._kinds import DIVERGENCES

KINDS = list(DIVERGENCES)
# kind, beta: the defaults and numbers near both ends
NUMBERED = [(k, None) for k in KINDS] + [(k, b) for k in ("jsd", "skew_kl", "skew_reverse_kl") for b in (0.01, 0.9)]


def value_and_gradient(function, s, t, kind, **arguments):
    s = s.detach().clone().requires_grad_()
    value = function(s, t, kind, **arguments)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize(("kind", "beta"), NUMBERED)
def test_value_is_the_definition_and_gradient_its_slope(kind, beta, close):
    """Central differences of the definition in float64, so that no formula of ours judges itself."""
    s, t = logits(6, 37, close=close, dtype=torch.float64)
    value, gradient = value_and_gradient(divergence, s, t, kind, beta=beta, temperature=1.3)
    torch.testing.assert_close(value, oracle_divergence(s, t, kind, 1.3, beta), rtol=1e-10, atol=1e-14)
    step = 1e-6
    for column in range(37):
        up, down = s.clone(), s.clone()
        up[:, column] += step
        down[:, column] -= step
        slope = (oracle_divergence(up, t, kind, 1.3, beta) - oracle_divergence(down, t, kind, 1.3, beta)) / (2 * step)
        torch.testing.assert_close(gradient[:, column], slope, rtol=1e-4, atol=2e-9)


@pytest.mark.parametrize("v", [999, 50257])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_near_the_teacher(kind, v):
    """Reverse KL 4e-4: the first-order terms of value and gradient cancel, and must not take the digits along."""
    s, t = logits(8, v, close=True, offset=100.0, dtype=torch.float32)
    truth = value_and_gradient(divergence_reference, s.double(), t.double(), kind)
    ours, plain = (value_and_gradient(f, s, t, kind) for f in (divergence, divergence_reference))
    for x, y, z in zip(ours, plain, truth, strict=True):
        assert relative_error(x, z) <= 1.1 * relative_error(y, z) + 1e-6
    limit = 2.5e-4 if DIVERGENCES[kind].expectation else 5e-5
    assert relative_error(ours[0], truth[0]) <= limit and relative_error(ours[1], truth[1]) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "beta"), [x for x in NUMBERED if DIVERGENCES[x[0]].expectation is None])
def test_infinite_logits(kind, beta, dtype):
    """No mass on one side, the other, or both: the value is finite and that of the definition, its slope too."""
    s, t = logits(5, 41, dtype=dtype)
    s[1, 3:9] = -torch.inf
    t[2, 5:30] = -torch.inf
    s[3, 7:20], t[3, 12:25] = -torch.inf, -torch.inf
    s[4, ::2], t[4, 1::2] = -torch.inf, -torch.inf  # nothing in common
    value, gradient = value_and_gradient(divergence, s, t, kind, beta=beta)
    rough = {"rtol": 1e-4, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(value.double(), oracle_divergence(s, t, kind, beta=beta), **rough)
    plain = value_and_gradient(divergence_reference, s.double(), t.double(), kind, beta=beta)
    torch.testing.assert_close(gradient.double(), plain[1], **rough)
    assert (gradient[s == -torch.inf] == 0).all() and gradient.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [k for k in KINDS if DIVERGENCES[k].expectation is None])
def test_a_side_without_any_mass_is_no_distribution(kind):
    s, t = logits(3, 12, dtype=torch.float64)
    s[0], t[1] = -torch.inf, -torch.inf
    for function in (divergence, divergence_reference):
        assert function(s, t, kind).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("kind", "beta"), [x for x in NUMBERED if DIVERGENCES[x[0]].expectation is None])
def test_triton_terms(backend, device, kind, beta):
    """Written a second time for the kernels: value and slope of far and close logits, zeros included."""
    for close in (False, True):
        s, t = logits(5, 150, close=close, dtype=torch.float64, device=device)
        s[1, 3:9], t[2, 5:30], s[3, 7:9], t[3, 8:12] = (-torch.inf,) * 4
        ours = value_and_gradient(divergence, s, t, kind, beta=beta, backend=backend)
        plain = value_and_gradient(divergence_reference, s, t, kind, beta=beta)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-13)


def test_bounds_are_reached_where_nothing_is_shared():
    s, t = logits(2, 30, dtype=torch.float64)
    s[0, ::2], t[0, 1::2] = -torch.inf, -torch.inf
    bounds = {("tvd", None): 1.0, ("skew_kl", 0.3): -math.log(0.3), ("skew_reverse_kl", 0.2): -math.log(0.2)}
    for b in (0.5, 0.2):
        bounds["jsd", b] = -b * math.log(b) - (1 - b) * math.log(1 - b)
    for (kind, beta), bound in bounds.items():
        value = divergence(s, t, kind, beta=beta)
        assert float(value[0]) == pytest.approx(bound, rel=1e-12) and 0 < float(value[1]) < bound


def test_limits_of_jsd():
    """JSD / beta -> forward KL (beta -> 0), JSD / (1 - beta) -> reverse KL (beta -> 1), an order of beta away."""
    s, t = logits(4, 50, dtype=torch.float64)
    for kind, near in (("forward_kl", lambda b: b), ("reverse_kl", lambda b: 1 - b)):
        limit = value_and_gradient(divergence, s, t, kind)
        errors = []
        for b in (1e-3, 1e-6):
            ours = value_and_gradient(divergence, s, t, "jsd", beta=near(b))
            errors.append([relative_error(x / b, y) for x, y in zip(ours, limit, strict=True)])
        assert max(errors[0]) < 0.3 and max(errors[1]) < 1e-3


@pytest.mark.parametrize(("kind", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skew_starts_at_the_plain_kl(kind, plain):
    s, t = logits(4, 50)
    s[0] *= 1e3  # ratios of masses beyond what float32 holds
    at_zero, limit = value_and_gradient(divergence, s, t, kind, beta=0.0), value_and_gradient(divergence, s, t, plain)
    assert all(torch.equal(x, y) for x, y in zip(at_zero, limit, strict=True))
    torch.testing.assert_close(divergence_reference(s, t, kind, beta=0), divergence_reference(s, t, plain))
    near = value_and_gradient(divergence, s[1:].double(), t[1:].double(), kind, beta=1e-9)
    for x, y in zip(near, limit, strict=True):
        torch.testing.assert_close(x, y[1:].double(), rtol=1e-4, atol=1e-6)


def test_symmetries():
    s, t = logits(4, 50, dtype=torch.float64)
    for kind, other, beta in (("tvd", "tvd", None), ("jsd", "jsd", 0.5), ("skew_kl", "skew_reverse_kl", 0.3)):
        torch.testing.assert_close(divergence(s, t, kind, beta=beta), divergence(t, s, other, beta=beta))
    torch.testing.assert_close(divergence(s, t, "jsd", beta=0.2), divergence(t, s, "jsd", beta=0.8))


@st.composite
def cases(draw):
    """Logits of every sort: close, far, offset, one-hot, equal, with -inf anywhere, in any dtype."""
    n, v = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    s, noise = (torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    s = s * draw(st.sampled_from([0.0, 1.0, 5.0, 1e4]))
    t = s + noise * draw(st.sampled_from([0.0, 0.03, 3.0, 1e4]))
    s, t = (x + draw(st.sampled_from([0.0, 100.0, -1e4])) for x in (s, t))
    hole = draw(st.sampled_from([0.0, 0.3]))
    for x in (s, t):
        x[:, 1:].masked_fill_(torch.rand(n, v - 1, generator=generator) < hole, -torch.inf)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    kind = draw(st.sampled_from(KINDS))
    beta = None if DIVERGENCES[kind].beta is None else draw(st.floats(0.01, 0.99))
    mask = torch.rand(n, generator=generator) < 0.8 if draw(st.booleans()) else None
    return s.to(dtype), t.to(dtype), kind, beta, draw(st.sampled_from([0.5, 1.0, 3.0])), mask


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_properties(case):
    s, t, kind, beta, temperature, mask = case
    arguments = {"beta": beta, "temperature": temperature, "mask": mask}
    value, gradient = value_and_gradient(divergence, s, t, kind, **arguments)
    truth, slope = value_and_gradient(divergence_reference, s.double(), t.double(), kind, **arguments)
    exact = value.dtype == torch.float64
    assert (value >= (-1e-12 if exact else -1e-5)).all() and torch.equal(value.isinf(), truth.isinf())
    size = max(1.0, float(torch.cat([s, t]).double().masked_fill(torch.cat([s, t]) == -torch.inf, 0).abs().max()))
    unit = (1e-12 if exact else 1e-6) * size / temperature  # logits carry a rounding of their own size
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=unit)
    assert gradient.isfinite().all()
    # at equal masses tvd has a corner: where rounding chooses its side, so does the slope
    if kind != "tvd":
        unit = 4e-3 * float(slope.abs().max()) + unit if s.dtype == torch.bfloat16 else unit
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=unit)
    if s.dtype != torch.bfloat16:
        assert (gradient.double().sum(1).abs() <= (1e-12 if exact else 2e-6) * (1 + size)).all()
    if mask is not None:
        assert (value[~mask] == 0).all() and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_shift_invariance(kind):
    s, t = (x.round(decimals=2) for x in logits(5, 300, dtype=torch.float64))
    value, gradient = value_and_gradient(divergence, s, t, kind)
    for a, b in ((1024.0, 0.0), (0.0, -512.0), (64.0, 2048.0)):
        moved = value_and_gradient(divergence, s + a, t + b, kind)
        torch.testing.assert_close(moved, (value, gradient), rtol=1e-9, atol=1e-12)


BAD = {
    "takes no beta, got 0.5; those that do: jsd, skew_kl, skew_reverse_kl": ("tvd", 0.5),
    "kind='reverse_kl' takes no beta": ("reverse_kl", 0.1),
    "0 < beta < 1, got 0; the ends are kind='forward_kl'": ("jsd", 0),
    "0 < beta < 1, got 1.0; the ends": ("jsd", 1.0),
    "0 <= beta < 1, got 1": ("skew_kl", 1),
    "0 <= beta < 1, got -0.1": ("skew_reverse_kl", -0.1),
    "0 <= beta < 1, got nan": ("skew_kl", math.nan),
}


@pytest.mark.parametrize("message", BAD)
def test_refused_numbers(message):
    kind, beta = BAD[message]
    s, t = logits(2, 5)
    for function in (divergence, divergence_reference):
        with pytest.raises(ValueError, match=message) as error:
            function(s, t, kind, beta=beta)
        assert "\n" not in str(error.value)
