"""divergence and reverse_kl on logits: exactness, edges, semantics, on both backends."""

import pytest
import torch
from kernel_cases import FLOATS, ROWS, assert_as_exact, logits, oracle_divergence
from mskd_kernels import divergence, divergence_reference, reverse_kl, reverse_kl_reference
from mskd_kernels._kinds import DIVERGENCES

KINDS = list(DIVERGENCES)
KLS = ["reverse_kl", "forward_kl"]
MIXED = [("jsd", 0.5), ("jsd", 0.9), ("skew_kl", 0.1), ("skew_kl", 0.7), ("skew_reverse_kl", 0.1), ("tvd", None)]
TRIED = {"torch": KINDS, "triton": KLS}  # the interpreter is slow: the others in test_kinds.py
every_kind = pytest.mark.parametrize(
    ("backend", "kind"), [(b, k) for b, kinds in TRIED.items() for k in kinds], indirect=["backend"]
)


def value_and_gradient(function, student, teacher, *args, upstream=None, **settings):
    student = student.detach().clone().requires_grad_()
    value = function(student, teacher, *args, **settings)
    (gradient,) = torch.autograd.grad(value, student, torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), gradient


@pytest.mark.parametrize(("close", "dtype"), [(True, x) for x in FLOATS] + [(False, x) for x in FLOATS[::2]])
@every_kind
def test_error_is_at_most_twice_that_of_torch(backend, device, kind, close, dtype):
    s, t = logits(ROWS[backend], 2100, close=close, dtype=dtype, device=device)
    upstream = torch.rand(len(s), dtype=torch.float64, device=device) + 0.5
    truth = value_and_gradient(oracle_divergence, s.double(), t.double(), kind, upstream=upstream)
    if close and dtype in (torch.float32, torch.float64) and kind == "reverse_kl":
        assert 3e-4 < float(truth[0].mean()) < 7e-4
    out = torch.float64 if dtype == torch.float64 else torch.float32
    ours = value_and_gradient(divergence, s, t, kind, upstream=upstream.to(out), backend=backend)
    plain = value_and_gradient(divergence_reference, s, t, kind, upstream=upstream.to(out))
    assert ours[0].dtype == out and ours[1].dtype == dtype
    for x, y, z in zip(ours, plain, truth, strict=True):
        assert_as_exact(x, y, z)


@pytest.mark.parametrize("offset", [10.0, 100.0, -1000.0])
def test_an_offset_between_the_sides_costs_no_digits(backend, device, offset):
    s, t = logits(ROWS[backend], 2500, close=True, device=device, offset=offset)
    truth = value_and_gradient(oracle_divergence, s.double(), t.double(), "reverse_kl")
    ours = value_and_gradient(reverse_kl, s, t, backend=backend)
    plain = value_and_gradient(reverse_kl_reference, s, t)
    for x, y, z in zip(ours, plain, truth, strict=True):
        assert_as_exact(x, y, z)


@pytest.mark.parametrize("v", [1, 2, 127, 129, 1023, 2048, 2049, 4100])
def test_ragged_vocabularies(backend, device, v):
    s, t = logits(5, v, dtype=torch.float64, device=device)
    for kind in TRIED[backend]:
        ours = value_and_gradient(divergence, s, t, kind, temperature=0.7, backend=backend)
        truth = value_and_gradient(oracle_divergence, s, t, kind, temperature=0.7)
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-10)


@every_kind
def test_gradcheck(backend, device, kind):
    s, t = logits(3, 6, dtype=torch.float64, device=device)
    s.requires_grad_()
    mask = torch.tensor([True, False, True], device=device)
    assert torch.autograd.gradcheck(
        lambda x: divergence(x, t, kind, temperature=1.5, mask=mask, backend=backend), (s,), fast_mode=True
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@every_kind
def test_leading_dimensions_masks_and_reductions(backend, device, kind, reduction):
    s, t = (x.view(3, 4, 70) for x in logits(12, 70, dtype=torch.float64, device=device))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], device=device)
    bad_s, bad_t = s.clone(), t.clone()
    bad_s[0, 2], bad_t[1, 1], bad_s[2, 1] = torch.nan, torch.nan, torch.inf
    truth = oracle_divergence(s, t, kind) * mask
    expected = {"none": truth, "sum": truth.sum(), "mean": truth.sum() / 6}[reduction]
    value, gradient = value_and_gradient(
        divergence, bad_s, bad_t, kind, mask=mask, reduction=reduction, backend=backend
    )
    torch.testing.assert_close(value, expected)
    _, wanted = value_and_gradient(divergence_reference, s, t, kind, mask=mask, reduction=reduction)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1] != 0).any(-1).all()


def test_denominator_and_thin_name(backend, device):
    s, t = logits(6, 33, device=device)
    total = divergence(s, t, reduction="sum", backend=backend)
    for denominator in (17, torch.tensor(17.0, device=device), torch.tensor(17, device=device)):
        value, gradient = value_and_gradient(
            reverse_kl, s, t, reduction="mean", denominator=denominator, backend=backend
        )
        torch.testing.assert_close(value, total / 17)
        torch.testing.assert_close(gradient, value_and_gradient(reverse_kl_reference, s, t)[1] / 17)


def test_padding_of_the_vocabulary_gets_no_gradient(backend, device):
    s, t = logits(4, 60, dtype=torch.float64, device=device)
    for student, teacher in ((s, t[:, :50]), (s[:, :50], t)):
        value, gradient = value_and_gradient(divergence, student, teacher, backend=backend)
        common = value_and_gradient(oracle_divergence, s[:, :50], t[:, :50], "reverse_kl")
        torch.testing.assert_close(value, common[0])
        torch.testing.assert_close(gradient[:, :50], common[1])
        assert (gradient[:, 50:] == 0).all()


@pytest.mark.parametrize("kind", KLS)
def test_infinite_logits(backend, device, kind):
    """Columns of -inf where the first distribution of the KL has no mass count 0; the second's alone gives +inf."""
    v = 2100
    s, t = logits(6, v, dtype=torch.float64, device=device)
    first, second = (s, t) if kind == "reverse_kl" else (t, s)
    first[1, 5] = first[1, 2090] = -torch.inf  # no mass
    first[2, :2060] = second[2, :2060] = -torch.inf  # both, and the whole first tile
    second[3, 7] = -torch.inf  # infinite
    second[4, :] = -torch.inf  # nothing at all
    if kind == "forward_kl":
        second[4, 1:] = 0.0  # a student without any mass is no distribution
    first[5, 3] = second[5, 3] = -torch.inf
    second[5, 4] = -torch.inf
    first[5, 4] = -800.0  # underflows, yet has mass
    value, gradient = value_and_gradient(divergence, s, t, kind, backend=backend)
    plain, plain_gradient = value_and_gradient(divergence_reference, s, t, kind)
    assert value.isinf().tolist() == [False, False, False, True, True, True]
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradient, plain_gradient)
    assert (gradient[3:] == 0).all() and gradient[:3].isfinite().all()
    keep = first[1] > -torch.inf
    if kind == "reverse_kl":
        log_p = t[1].log_softmax(0)[keep]
        log_q = s[1][keep].log_softmax(0)
        torch.testing.assert_close(value[1], (log_q.exp() * (log_q - log_p)).sum())
    torch.testing.assert_close(value[2], oracle_divergence(s[2, 2060:], t[2, 2060:], kind))


@pytest.mark.skipif(torch.cuda.is_available(), reason="looked at on a CPU alone")
def test_probabilities_are_no_logits():
    """F.kl_div takes them for its target; as logits they would be nearly uniform."""
    s, t = logits(3, 400)
    for name, side in (("student", s), ("teacher", t)):
        for dtype in FLOATS:
            given = [x.softmax(-1).to(dtype) if x is side else x for x in (s, t)]
            for settings in ({}, {"reduction": "mean"}):
                with pytest.raises(ValueError, match=f"{name}_logits are probabilities: give logits or log-prob"):
                    divergence(given[0].requires_grad_(), given[1], **settings)
    compiled = torch.compile(divergence, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="teacher_logits are probabilities"):
        compiled(s, t.softmax(-1))
    torch.testing.assert_close(divergence(s.log_softmax(-1), t.log_softmax(-1)), divergence(s, t))


def test_nan_in_a_valid_token_is_seen_and_stays_there(backend, device):
    s, t = logits(4, 300, device=device)
    s[1, 7], t[2, 9] = torch.nan, torch.nan
    value, gradient = value_and_gradient(divergence, s, t, backend=backend)
    assert value.isnan().tolist() == [False, True, True, False]
    assert gradient[[0, 3]].isfinite().all() and gradient[[1, 2]].isnan().any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(backend, device, dtype):
    s, t = logits(5, 130, dtype=dtype, device=device)
    s[0] *= 1e4
    t[1] *= 1e4
    s[2] = t[2] = 3.0
    s[3] = -1e4
    s[3, 4] = 1e4
    t[4] = s[4]
    value, gradient = value_and_gradient(divergence, s, t, backend=backend)
    truth, wanted = value_and_gradient(divergence_reference, s.double(), t.double())
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    scale = wanted.abs().amax(1, keepdim=True) + 1e-6  # logits of 1e4 carry their own rounding into the gradient
    torch.testing.assert_close(gradient.double() / scale, wanted / scale, rtol=1e-3, atol=1e-5)
    assert (value >= (-1e-5 if dtype == torch.float32 else -1e-12)).all()
    assert (gradient.sum(1).abs() <= 1e-5 * (1 + gradient.abs().sum(1))).all()


def test_strides_and_mixed_dtypes(backend, device):
    s, t = logits(6, 200, dtype=torch.float64, device=device)
    truth = value_and_gradient(oracle_divergence, s[::2], t[1::2], "reverse_kl")
    transposed = s.t().contiguous().t()
    ours = value_and_gradient(divergence, transposed[::2], t[1::2], backend=backend)
    torch.testing.assert_close(ours, truth)
    expanded = divergence(s[:1].expand(6, 200), t, backend=backend)
    torch.testing.assert_close(expanded, oracle_divergence(s[:1].expand(6, 200), t, "reverse_kl"))
    half = s.bfloat16()
    value, gradient = value_and_gradient(divergence, half, t.float(), backend=backend)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), oracle_divergence(half, t.float(), "reverse_kl"), rtol=1e-5, atol=1e-6)
    assert divergence(half, t, backend=backend).dtype == torch.float64


def test_repeats_bit_for_bit(backend, device):
    s, t = logits(9, 2500, device=device)
    first, second = (value_and_gradient(divergence, s, t, backend=backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_no_tokens_and_all_masked(device, name):
    for n, mask in ((0, None), (0, torch.zeros(0, device=device)), (3, torch.zeros(3, device=device))):
        s, t = (torch.full((n, 40), torch.nan, device=device) for _ in range(2))
        for reduction in ("none", "sum", "mean"):
            value, gradient = value_and_gradient(divergence, s, t, mask=mask, reduction=reduction, backend=name)
            assert value.shape == ((n,) if reduction == "none" else ())
            assert (value == 0).all() and (gradient == 0).all() and gradient.shape == s.shape


def test_double_backward_is_refused(device):
    s, t = logits(2, 10, device=device)
    s.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(divergence(s, t, reduction="sum"), s, create_graph=True)
