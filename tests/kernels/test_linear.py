"""The losses from hidden states: against their references, float64, each other, and what they allocate."""

import pytest
import torch
from kernel_cases import Watch, assert_as_exact, relative_error, rounding_unit, token_constants
from mskd_kernels import (
    _chunks,
    linear_divergence,
    linear_divergence_reference,
    linear_minillm_loss,
    linear_minillm_loss_reference,
    linear_reverse_kl,
    linear_reverse_kl_reference,
)

PLAIN: dict = {}
SCALED = {
    "student_logit_scale": 0.7,
    "student_softcap": 6.0,
    "teacher_logit_scale": 1.3,
    "teacher_softcap": 4.0,
    "temperature": 0.8,
}


def heads(n=24, v=90, hs=12, ht=20, *, dtype=torch.float64, device="cpu", extra=0, close=False, teacher_bias=True):
    """student hidden, weight, bias (leaves with gradients), teacher hidden, weight; biases in `settings`."""
    g = torch.Generator().manual_seed(n + v + hs + ht)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    student = [randn(n, hs), randn(v + extra, hs) / hs**0.5 * 2, randn(v + extra) / 2]
    teacher = [randn(n, ht), randn(v, ht) / ht**0.5 * 2, randn(v) / 2]
    if close:
        teacher = [student[0] + 0.02 * randn(n, hs), student[1][:v], student[2][:v]]
    student = [x.to(device, dtype).requires_grad_() for x in student]
    teacher = [x.to(device, dtype) for x in teacher]
    settings = {"student_bias": student[2], **({"teacher_bias": teacher[2]} if teacher_bias else {})}
    return student, (student[0], student[1], *teacher[:2]), settings


def gradients(value, leaves):
    return torch.autograd.grad(value, leaves, torch.ones_like(value))


@pytest.mark.parametrize("extra", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_equals_reference(backend, device, kind, reduction, extra):
    leaves, args, settings = heads(device=device, extra=6)
    mask = torch.arange(24, device=device) % 3 != 1
    settings = {**settings, **extra, "mask": mask, "reduction": reduction}
    ours = linear_divergence(*args, kind, **settings, backend=backend, chunk_bytes=9 * 90 * 16)
    plain = linear_divergence_reference(*args, kind, **settings)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-10)
    for x, y in zip(gradients(ours, leaves), gradients(plain, leaves), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)
        assert (x[90:] == 0).all() if x.shape[0] == 96 else True


@pytest.mark.parametrize("extra", [{}, SCALED], ids=["plain", "scaled"])
def test_minillm_equals_reference(backend, device, extra):
    leaves, args, settings = heads(device=device)
    mask = torch.arange(24, device=device) % 4 != 3
    settings = {**settings, **extra, "mask": mask, "clip": 0.3, "denominator": 31, "clip_weighted_ratio": False}
    constants = token_constants(24, 90, device=device)
    noisy = {k: c.masked_fill(~mask, torch.nan if c.is_floating_point() else -1) for k, c in constants.items()}
    ours = linear_minillm_loss(*args, **noisy, **settings, backend=backend, chunk_bytes=7 * 90 * 16)
    plain = linear_minillm_loss_reference(*args, **constants, **settings)
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)
    for x, y in zip(gradients(ours.loss, leaves), gradients(plain.loss, leaves), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


def test_gradcheck(backend, device):
    leaves, args, settings = heads(3, 5, 2, 3, device=device, extra=1)
    constants = token_constants(3, 5, device=device)

    def functions(hidden, weight, bias):
        new = {**settings, **SCALED, "student_bias": bias, "backend": backend, "chunk_bytes": 160}
        return (
            linear_divergence(hidden, weight, *args[2:], "forward_kl", **new),
            linear_reverse_kl(hidden, weight, *args[2:], reduction="sum", **new),
            linear_minillm_loss(hidden, weight, *args[2:], **constants, **new).loss,
        )

    assert torch.autograd.gradcheck(functions, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("close", [False, True], ids=["far", "close"])
def test_error_is_at_most_twice_that_of_torch(backend, device, close, dtype):
    """Against float64 of the same rounded inputs; in 16 bits torch rounds the logits."""
    leaves, args, settings = heads(64, 700, 32, 32, dtype=dtype, device=device, close=close)
    double = lambda xs: [x.detach().double().requires_grad_(x.requires_grad) for x in xs]  # noqa: E731
    wide, wide_teacher = double(leaves), double(args[2:])
    truth = linear_divergence_reference(
        *wide[:2], *wide_teacher, student_bias=wide[2], teacher_bias=settings["teacher_bias"].double()
    )
    settings = {**settings, "backend": backend, "chunk_bytes": 20 * 700 * 8}
    ours, rows = (linear_divergence(*args, **settings, reduction=reduction) for reduction in ("sum", "none"))
    plain = linear_divergence_reference(*args, **{k: settings[k] for k in ("student_bias", "teacher_bias")})
    truths = gradients(truth, wide)
    for x, y, z in zip(gradients(ours, leaves), gradients(plain, leaves), truths, strict=True):
        assert_as_exact(x, y, z)
    # Row by row: in a sum of 64 errors torch may be lucky. That of the sum is at most sqrt(64) times the rows' norm.
    limit = 2 * relative_error(plain, truth) + 1e-6
    assert relative_error(rows, truth) <= limit
    assert abs(ours.double() - truth.sum()) <= 64**0.5 * limit * truth.norm()


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("distance", [1.0, 0.3, 0.03], ids=["0.4 nats", "0.04", "0.0004"])
def test_bfloat16_costs_no_more_than_rounding_the_gradient(device, distance, gradient):
    """Logits rounded to 16 bits would cost 2, 6 and 53 % of it."""
    generator = torch.Generator().manual_seed(0)
    hidden, noise = torch.randn(2, 128, 64, generator=generator, dtype=torch.float64)
    weight = 0.24 * torch.randn(3000, 64, generator=generator, dtype=torch.float64)
    given = [x.to(device, torch.bfloat16) for x in (hidden, weight, hidden + distance / 2 * noise, weight)]
    results = []
    for function, dtype in ((linear_reverse_kl, torch.bfloat16), (linear_reverse_kl_reference, torch.float64)):
        args = [x.detach().to(dtype) for x in given]
        leaves = [x.requires_grad_() for x in args[:2]]
        settings = {"gradient": gradient} if dtype == torch.bfloat16 else {}
        results.append(gradients(function(*args, reduction="mean", **settings), leaves))
    for ours, truth in zip(*results, strict=True):
        assert relative_error(ours, truth) < rounding_unit(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_made_in_forward_is_the_recomputed_one(backend, device, dtype):
    leaves, args, settings = heads(30, 100, dtype=dtype, device=device)
    settings = {**settings, "backend": backend, "chunk_bytes": 8000}
    in_forward = gradients(linear_divergence(*args, **settings, reduction="sum"), leaves)
    recomputed = gradients(linear_divergence(*args, **settings), leaves)
    for x, y in zip(in_forward, recomputed, strict=True):
        assert relative_error(x, y) < {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    again = gradients(linear_divergence(*args, **settings, reduction="sum"), leaves)
    assert all(torch.equal(x, y) for x, y in zip(in_forward, again, strict=True))


def test_any_upstream_gradient_and_chunk_size(device):
    leaves, args, settings = heads(30, 100, device=device)
    upstream = torch.linspace(-1, 2, 30, dtype=torch.float64, device=device)
    plain = gradients((linear_divergence_reference(*args, **settings) * upstream).sum(), leaves)
    for chunk_bytes in (1, 100 * 16 * 7, 10**9):
        ours = gradients((linear_divergence(*args, **settings, chunk_bytes=chunk_bytes) * upstream).sum(), leaves)
        torch.testing.assert_close(ours, plain)


def test_small_upstream_gradients_do_not_flush_to_zero(device):
    """In float16 1e-6 / N times a small gradient in the logits is below the smallest number."""
    leaves, args, settings = heads(40, 200, dtype=torch.float16, device=device, close=True)
    plain = gradients(linear_divergence(*args, **settings, reduction="sum"), leaves)
    scale = 2.0**-14
    settings["student_bias"] = leaves[2]
    for value in (
        linear_divergence(*args, **settings, reduction="sum") * scale,
        (linear_divergence(*args, **settings) * scale).sum(),
    ):
        weight = gradients(value / scale * 1.0, leaves)[1]
        torch.testing.assert_close(weight, plain[1], rtol=1e-2, atol=1e-3)
    wide = [leaves[0], leaves[1].detach().float().requires_grad_(), leaves[2].detach().float().requires_grad_()]
    settings["student_bias"] = wide[2]
    value = (linear_divergence(wide[0], wide[1], *args[2:], **settings) * scale).sum()
    small = gradients(value, wide)
    full = gradients(linear_divergence(wide[0], wide[1], *args[2:], **settings, reduction="sum"), wide)
    assert relative_error(small[1] / scale, full[1]) < 1e-3


def test_weight_wider_than_hidden(backend, device):
    leaves, args, settings = heads(20, 80, dtype=torch.bfloat16, device=device)
    weight = leaves[1].detach().float().requires_grad_()
    bias = leaves[2].detach().float().requires_grad_()
    settings = {**settings, "student_bias": bias, "backend": backend}
    loss = linear_divergence(leaves[0], weight, *args[2:], **settings, reduction="mean")
    grads = gradients(loss, (leaves[0], weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32] and loss.dtype == torch.float32
    truth = [x.detach().double().requires_grad_() for x in (leaves[0], weight, bias)]
    settings = {"student_bias": truth[2], "teacher_bias": settings["teacher_bias"].double()}
    value = linear_divergence_reference(*truth[:2], *(x.double() for x in args[2:]), **settings, reduction="mean")
    for x, y in zip(grads, gradients(value, truth), strict=True):
        assert relative_error(x, y) < 0.02
    assert not torch.equal(grads[1], grads[1].bfloat16().float())  # summed in float32, not rounded to 16 bits


def test_gemm_with_wide_outputs(backend, device, monkeypatch):
    """16-bit GEMMs with float32 outputs, which torch has on CUDA alone: elsewhere a GEMM that plays their part."""
    if device.type == "cpu":
        plain_mm = torch.mm

        def mm(a, b, out_dtype=None, **settings):
            return (
                plain_mm(a, b, **settings)
                if out_dtype is None
                else plain_mm(a.to(out_dtype), b.to(out_dtype), **settings)
            )

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(_chunks, "_output_dtype", lambda x: torch.float32)
        monkeypatch.setattr(_chunks, "_gemm_dtype", lambda x: x.dtype)
        monkeypatch.setattr(_chunks, "_PRODUCT_BYTES", 1)  # the weight's gradient is added in three pieces
    leaves, args, settings = heads(40, 300, 32, 32, dtype=torch.bfloat16, device=device, close=True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    teacher = [x.double() for x in (*args[2:], settings["teacher_bias"])]
    truth = linear_divergence_reference(*wide[:2], *teacher[:2], student_bias=wide[2], teacher_bias=teacher[2])
    ours = linear_divergence(*args, **settings, backend=backend, chunk_bytes=13 * 300 * 10)
    assert relative_error(ours, truth) < 1e-3  # logits rounded to bfloat16 would give 0.1
    for x, y in zip(gradients(ours, leaves), gradients(truth, wide), strict=True):
        assert relative_error(x, y) < 5e-3


def test_frozen_parts_get_no_gradient(device):
    leaves, args, settings = heads(device=device)
    hidden = leaves[0]
    weight, bias = leaves[1].detach(), leaves[2].detach()
    for reduction in ("mean", "none"):
        settings = {"student_bias": bias, "reduction": reduction}
        (only,) = gradients(linear_divergence(hidden, weight, *args[2:], **settings), [hidden])
        settings["student_bias"] = leaves[2]
        (both, _) = gradients(linear_divergence(*args, **settings), [hidden, leaves[1]])
        torch.testing.assert_close(only, both)
        frozen = linear_divergence(hidden.detach(), weight, *args[2:], reduction=reduction)
        assert not frozen.requires_grad
    with torch.no_grad():
        assert not linear_divergence(*args, reduction="mean").requires_grad


def test_leading_dimensions_and_host_mask(device):
    leaves, args, settings = heads(device=device)
    mask = torch.arange(24).view(4, 6) % 5 != 0
    args = [x.view(4, 6, -1) if i % 2 == 0 else x for i, x in enumerate(args)]
    plain = linear_divergence_reference(*args, **settings, mask=mask.to(device))
    for m in (mask, mask.float(), mask.to(device), mask.to(device).long()):
        ours = linear_divergence(*args, **settings, mask=m)
        torch.testing.assert_close(ours, plain)
        mean = linear_divergence(*args, **settings, mask=m, reduction="mean")
        torch.testing.assert_close(mean, plain.sum() / mask.sum())
        wanted = torch.autograd.grad(plain, leaves, torch.ones_like(plain), retain_graph=True)
        torch.testing.assert_close(gradients(ours, leaves), wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_tokens_by_vocabulary_and_only_valid_tokens_in_gemms(device, reduction):
    n, v = 400, 1000
    leaves, args, _ = heads(n, v, 8, 8, dtype=torch.float32, device=device)
    bad = torch.arange(n) % 2 == 1
    with torch.no_grad():
        leaves[0][bad.to(device)] = torch.nan
    with Watch() as watch:
        value = linear_divergence(*args, mask=~bad, reduction=reduction, chunk_bytes=25 * v * 8)
        gradient = gradients(value.sum(), leaves[:2])
    assert watch.largest <= 4 * 25 * v < n * v / 2  # the four work buffers of a chunk's rows
    forward_rows = [rows for rows, _, columns in watch.gemms if columns == v]
    assert sum(forward_rows) == {"mean": 2, "none": 4}[reduction] * n // 2
    assert all(g.isfinite().all() for g in gradient) and (gradient[0][bad.to(device)] == 0).all()


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_no_tokens_and_all_masked(device, name):
    for n, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool, device=device))):
        leaves, args, settings = heads(n, device=device)
        with torch.no_grad():
            leaves[0].fill_(torch.nan)
        constants = token_constants(n, 90, device=device)
        settings = {**settings, "mask": mask, "backend": name}
        results = [linear_divergence(*args, **settings, reduction=r) for r in ("none", "sum", "mean")]
        results += linear_minillm_loss(*args, **constants, **settings)
        assert all((r == 0).all() for r in results)
        for r in (results[0].sum(), results[2], results[3]):
            assert all((g == 0).all() and g.shape == x.shape for g, x in zip(gradients(r, leaves), leaves, strict=True))


def test_autocast_changes_nothing(device):
    leaves, args, settings = heads(dtype=torch.float32, device=device)
    outside = linear_divergence(*args, **settings, reduction="mean")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = linear_divergence(*args, **settings, reduction="mean")
        none = linear_divergence(*args, **settings).sum()
    torch.testing.assert_close(inside, outside, atol=0, rtol=0)
    wanted = gradients(outside * 24, leaves)
    for x, y in zip(gradients(none, leaves), wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_backward_twice_and_scaled(device):
    leaves, args, settings = heads(device=device)
    value = linear_divergence(*args, **settings, reduction="mean")
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value * 3, leaves, retain_graph=True)
    torch.testing.assert_close([3 * x for x in first], list(second))
    for reduction in ("sum", "none"):
        with pytest.raises(RuntimeError, match="no second derivative"):
            value = linear_divergence(*args, **settings, reduction=reduction).sum()
            torch.autograd.grad(value, leaves, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gpu_path_never_asks_the_device(reduction):
    """On meta tensors any look at a value raises; what is not CPU takes the branches of a GPU."""
    device = torch.device("meta")
    hidden, t_hidden = torch.empty(30, 8, device=device, requires_grad=True), torch.empty(30, 6, device=device)
    weight, t_weight = torch.empty(50, 8, device=device, requires_grad=True), torch.empty(48, 6, device=device)
    constants = {k: c.to(device) for k, c in token_constants(30, 48, torch.float32).items()}
    settings = {"student_softcap": 3.0, "backend": "torch"}
    linear_divergence(hidden, weight, t_hidden, t_weight, reduction=reduction, **settings).sum().backward()
    result = linear_minillm_loss(hidden, weight, t_hidden, t_weight, **constants, **settings, denominator=9)
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None and weight.grad.shape == weight.shape
