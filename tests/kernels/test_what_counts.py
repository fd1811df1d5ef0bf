"""What counts, and how much: masks of 0 and 1 only, labels with an ignored index, a weight a token."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import logits, oracle_divergence, token_constants
from mskd_kernels import (
    divergence,
    divergence_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_divergence,
    linear_divergence_reference,
    linear_kd_loss,
    linear_kd_loss_reference,
    linear_logprobs,
    linear_logprobs_reference,
    linear_minillm_loss,
    linear_minillm_loss_reference,
    linear_reverse_kl,
    linear_reverse_kl_reference,
    minillm_loss,
    minillm_loss_reference,
    reverse_kl,
    reverse_kl_reference,
)
from torch.nn import functional as F

N, V, H = 8, 30, 6
LABELS = torch.tensor([3, -100, 7, 29, -100, 0, 5, 1])
COUNTS = LABELS != -100
WEIGHTS = torch.tensor([0.5, 9.0, 1.0, 0.0, 9.0, 2.0, 0.25, 1.5], dtype=torch.float64)


def inputs(device="cpu", dtype=torch.float64):
    """Logits of both sides; (hidden, weight) of both, with the student's first, as leaves."""
    both = logits(N, V, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(0)
    heads = [torch.randn(*shape, generator=g, dtype=dtype).to(device) for shape in ((N, H), (V, H)) * 2]
    return both, (heads[0].requires_grad_(), heads[1].requires_grad_(), heads[2], heads[3])


def calls(device="cpu", dtype=torch.float64):
    """Every function of the package that takes a mask, as one of its keywords."""
    both, heads = inputs(device, dtype)
    constants = token_constants(N, V, dtype, device)
    tokens, one = constants["tokens"], heads[:2]
    found = {}
    for pair, args in {
        (divergence, divergence_reference): both,
        (reverse_kl, reverse_kl_reference): both,
        (minillm_loss, minillm_loss_reference): (*both, *constants.values()),
        (linear_divergence, linear_divergence_reference): heads,
        (linear_reverse_kl, linear_reverse_kl_reference): heads,
        (linear_minillm_loss, linear_minillm_loss_reference): (*heads, *constants.values()),
        (linear_logprobs, linear_logprobs_reference): (*one, tokens),
        (linear_cross_entropy, linear_cross_entropy_reference): (*one, tokens),
        (linear_kd_loss, linear_kd_loss_reference): (*heads, tokens),
    }.items():
        for function in pair:
            found[function.__name__] = lambda f=function, a=args, **settings: f(*a, **settings)
    return found


def first(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [LABELS, WEIGHTS, COUNTS * 2, COUNTS.double() * torch.nan], ids=str)
@pytest.mark.parametrize("name", calls())
def test_a_mask_of_other_values_is_refused(name, mask):
    with pytest.raises(ValueError, match="mask holds other values than 0 and 1: for labels give labels=, or"):
        calls()[name](mask=mask)


@pytest.mark.parametrize("name", calls())
def test_zeros_and_ones_of_every_dtype_are_one_mask(name):
    wanted = first(calls()[name](mask=COUNTS))
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64):
        assert torch.equal(first(calls()[name](mask=COUNTS.to(dtype))), wanted)


@pytest.mark.parametrize("name", [n for n in calls() if not n.endswith("reference")])
def test_a_mask_on_a_gpu_is_judged_without_waiting_for_it(name, monkeypatch):
    """Of tensors on meta every look at a value raises. Integers are asserted there, floats refused by dtype."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda good, message: asserted.append((good.shape, message)))
    call, mask = calls("meta", torch.float32)[name], COUNTS.to("meta")
    settings = {"reduction": "none"} if "linear" not in name and "minillm" not in name else {}
    if "linear" not in name:  # the linear ops count what is valid, on a GPU by the synchronisation that is documented
        call(mask=mask, **settings)
        assert not asserted
        call(mask=mask.long(), **settings)
        assert asserted == [(torch.Size(), asserted[0][1])] and "other values than 0 and 1" in asserted[0][1]
    with pytest.raises(ValueError, match="mask must be bool or integer on meta, got torch.float32: give mask != 0, or"):
        call(mask=mask.float(), **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an assertion on a GPU ends the process")
def test_a_gpu_asserts_that_labels_are_no_mask():
    code = """
import torch
from mskd_kernels import divergence
x = torch.randn(4, 9, device="cuda")
divergence(x, x + 1, mask=torch.tensor([3, -100, 1, 1], device="cuda"))
torch.cuda.synchronize()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def test_compiled_code_asserts_it_too():
    compiled = torch.compile(divergence, fullgraph=True, backend="eager")
    (s, t), _ = inputs()
    torch.testing.assert_close(compiled(s, t, mask=COUNTS.long()), divergence(s, t, mask=COUNTS))
    with pytest.raises(RuntimeError, match="other values than 0 and 1"):
        compiled(s, t, mask=LABELS)


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in calls() if "divergence" in n or "reverse_kl" in n])
def test_labels_say_what_counts(name):
    call = calls()[name]
    for settings in ({"reduction": "none"}, {"reduction": "mean"}):
        wanted = call(mask=COUNTS, **settings)
        for labels in (LABELS, LABELS.int()):
            assert torch.equal(call(labels=labels, **settings), wanted)
        assert torch.equal(call(labels=LABELS.masked_fill(~COUNTS, -1), ignore_index=-1, **settings), wanted)
        more = torch.arange(N) < 4
        assert torch.equal(call(labels=LABELS, mask=more, **settings), call(mask=COUNTS & more, **settings))
    with pytest.raises(ValueError, match="labels must be int64 or int32, got torch.float32"):
        call(labels=LABELS.float())
    with pytest.raises(ValueError, match="labels has shape"):
        call(labels=LABELS[:3])
    with pytest.raises(ValueError, match="ignore_index must be a whole number"):
        call(labels=LABELS, ignore_index=-100.0)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_reference])
def test_cross_entropy_of_labels_is_that_of_torch(function):
    _, (hidden, weight, *_) = inputs()
    for labels in (LABELS, LABELS.masked_fill(~COUNTS, 40)):
        index = int(labels[1])
        for reduction in ("none", "sum", "mean"):
            wanted = F.cross_entropy(hidden @ weight.T, labels, ignore_index=index, reduction=reduction)
            ours = function(hidden, weight, labels, ignore_index=index, reduction=reduction)
            torch.testing.assert_close(ours, wanted)
            leaves = (hidden, weight)
            grads = (torch.autograd.grad(x.sum(), leaves) for x in (ours, wanted))
            torch.testing.assert_close(*grads)
    assert function(hidden, weight, torch.full((N,), -100), ignore_index=-100) == 0  # torch: NaN


def test_kd_of_labels_leaves_the_ignored_out():
    _, heads = inputs()
    for temperature in (1.0, 2.0):
        for function in (linear_kd_loss, linear_kd_loss_reference):
            ours = function(*heads, LABELS, ignore_index=-100, temperature=temperature)
            wanted = function(*heads, LABELS.clamp(min=0), mask=COUNTS, temperature=temperature)
            for x, y in zip(ours, wanted, strict=True):
                torch.testing.assert_close(x, y)


def test_labels_that_nobody_was_told_of_are_refused_with_the_remedy():
    _, heads = inputs()
    message = r"tokens lie in \[-100, 29\], .*; for labels with -100 give mask=labels != -100, or ignore_index=-100"
    for call in (
        lambda: linear_cross_entropy(*heads[:2], LABELS),
        lambda: linear_kd_loss(*heads, LABELS),
        lambda: linear_logprobs(*heads[:2], LABELS),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_weights_of_logits(kind, gradient):
    (s, t), _ = inputs()
    s.requires_grad_()
    values = oracle_divergence(s, t, kind) * WEIGHTS * COUNTS
    for settings, wanted in weighted(values, WEIGHTS * COUNTS):
        mode = gradient if settings["reduction"] != "none" else None
        close(divergence(s, t, kind, mask=COUNTS, weights=WEIGHTS, **settings, gradient=mode), wanted, s)
        close(divergence(s, t, kind, labels=LABELS, weights=WEIGHTS, **settings, gradient=mode), wanted, s)
        close(divergence_reference(s, t, kind, mask=COUNTS, weights=WEIGHTS, **settings), wanted, s)


def test_weights_on_both_backends(backend, device):
    """The fused Triton kernel knows no weights: it must not run."""
    (s, t), heads = inputs(device)
    s.requires_grad_()
    weights, mask = WEIGHTS.to(device), COUNTS.to(device)
    settings = {"mask": mask, "weights": weights, "reduction": "mean", "backend": backend}
    wanted = (oracle_divergence(s, t, "reverse_kl") * weights * mask).sum() / (weights * mask).sum()
    close(divergence(s, t, gradient="forward", **settings), wanted, s)
    logprobs = (heads[0] @ heads[1].T).log_softmax(-1)[:, 3]
    targets = torch.full((N,), 3, device=device)
    wanted = -(logprobs * weights * mask).sum() / (weights * mask).sum()
    close(linear_cross_entropy(*heads[:2], targets, **settings), wanted, heads[:2])


def weighted(values, weights):
    """Settings and what they make of values that are weighted already."""
    yield {"reduction": "none"}, values
    yield {"reduction": "sum"}, values.sum()
    yield {"reduction": "mean"}, values.sum() / weights.sum()
    yield {"reduction": "mean", "denominator": 11.0}, values.sum() / 11


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_weights_from_hidden_states(gradient):
    _, heads = inputs()
    weights, mask, targets, leaves = WEIGHTS, COUNTS, LABELS, heads[:2]
    s, t = heads[0] @ heads[1].T, heads[2] @ heads[3].T
    nll = F.cross_entropy(s, targets, reduction="none")
    kl = oracle_divergence(s, t, "reverse_kl")
    settings = {"weights": weights, "chunk_bytes": 3 * V * 16}
    for reduction, wanted in weighted(kl * weights * mask, weights * mask):
        mode = gradient if reduction["reduction"] != "none" else None
        close(linear_divergence(*heads, mask=mask, gradient=mode, **reduction, **settings), wanted, leaves)
        close(linear_divergence_reference(*heads, mask=mask, weights=weights, **reduction), wanted, leaves)
    for reduction, wanted in weighted(nll * weights, weights * mask):
        mode = gradient if reduction["reduction"] != "none" else None
        both = {"ignore_index": -100, **reduction}
        close(linear_cross_entropy(*leaves, targets, gradient=mode, **both, **settings), wanted, leaves)
        close(linear_cross_entropy_reference(*leaves, targets, weights=weights, **both), wanted, leaves)
    for temperature in (1.0, 2.0):
        soft = oracle_divergence(s, t, "forward_kl", temperature)
        wanted = ((0.7 * nll + 0.3 * temperature**2 * soft) * weights * mask).sum() / (weights * mask).sum()
        both = {"ignore_index": -100, "kd_ratio": 0.3, "temperature": temperature}
        close(linear_kd_loss(*heads, targets, gradient=gradient, **both, **settings).loss, wanted, leaves)
        close(linear_kd_loss_reference(*heads, targets, weights=weights, **both).loss, wanted, leaves)


def close(ours, wanted, leaves):
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (ours, wanted)))


def test_weights_hold_anything_where_masked_and_zero_beats_infinity():
    (s, t), _ = inputs()
    s.requires_grad_()
    t[3, 4] = -torch.inf  # a reverse KL of +inf, of weight 0
    weights = WEIGHTS.masked_fill(~COUNTS, torch.nan)
    for gradient in ("forward", "recompute"):
        loss = divergence(s, t, mask=COUNTS, weights=weights, reduction="mean", gradient=gradient)
        assert loss.isfinite() and torch.autograd.grad(loss, s)[0].isfinite().all()
    nothing = divergence(s, t, mask=COUNTS, weights=torch.zeros(N), reduction="mean")
    assert nothing == 0 and (torch.autograd.grad(nothing, s)[0] == 0).all()


def test_what_is_no_weight_is_refused():
    (s, t), heads = inputs()
    for call in (lambda **w: divergence(s, t, **w), lambda **w: linear_divergence(*heads, reduction="mean", **w)):
        for wrong in (WEIGHTS - 1, WEIGHTS * torch.nan, WEIGHTS / 0):
            with pytest.raises(ValueError, match="weights of tokens that count must be finite and at least 0"):
                call(weights=wrong)
        with pytest.raises(ValueError, match="weights requires grad, but it is a constant"):
            call(weights=WEIGHTS.clone().requires_grad_())
        with pytest.raises(ValueError, match="weights must be a float tensor, got torch.int64"):
            call(weights=WEIGHTS.long())
        with pytest.raises(ValueError, match="weights has shape"):
            call(weights=WEIGHTS[:3])
