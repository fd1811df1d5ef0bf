"""The ops within torch: its own checks of them, torch.compile, autocast, checkpointing, frozen parts, both modes."""

from itertools import accumulate

import pytest
import torch
from kernel_cases import FLOATS, Watch, logits, relative_error, token_constants
from mskd_kernels import (
    _ops,
    divergence,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_divergence,
    linear_kd_loss,
    linear_kd_loss_reference,
    linear_logprobs,
    linear_minillm_loss,
    linear_reverse_kl,
    linear_reverse_kl_reference,
    minillm_loss,
)
from mskd_kernels._kinds import DIVERGENCES
from torch.utils.checkpoint import checkpoint

N, V, HS, HT = 12, 50, 8, 6


def inputs(*, n=N, v=V, hs=HS, ht=HT, extra=0, dtype=torch.float32):
    """(hidden, weight, bias) of the student, leaves with gradients; (hidden, weight) of the teacher."""
    g = torch.Generator().manual_seed(n + v + hs)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    student = [randn(n, hs).requires_grad_(), randn(v + extra, hs).requires_grad_(), randn(v + extra).requires_grad_()]
    return student, (randn(n, ht), randn(v, ht))


def constants(n=N, v=V, dtype=torch.float32):
    return tuple(token_constants(n, v, dtype).values())


MASK = torch.arange(N) % 3 != 1
TOKENS, *POLICY = constants()


def gradients(value, leaves):
    return torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)


# -- torch.library ---------------------------------------------------------------------------------------------------

SCALED = _ops.Settings("skew_kl", 0.2, "torch", 0.8, True, 0.7, 6.0, 1.3, None)
PLAIN = _ops.Settings("reverse_kl", None, "torch", 1.0, False)
ALONE = _ops.Settings(None, None, "torch", 1.0, True)


def op_calls():
    student, teacher = inputs(extra=3)
    s, t = (x.requires_grad_(i == 0) for i, x in enumerate(logits(N, V)))
    batch = (*student, *teacher, None, TOKENS, MASK)
    alone = (*student[:2], None, None, None, None, TOKENS, None)
    upstream = (torch.randn(N), None, torch.randn(N))
    stats = _ops.row_statistics(s.detach(), t, TOKENS, MASK, *SCALED)[4]
    detached = tuple(x if x is None else x.detach() for x in batch)
    policy = (1.0, 0.5, *POLICY, 0.2, True, False)
    none = (0.0, 1.0, None, None, None, 0.0, False, False)
    value = (1.0, 0.0, *none[2:])
    return {
        "row_statistics": (_ops.row_statistics, (s, t, TOKENS, MASK, *SCALED)),
        "row_statistics, no mask": (_ops.row_statistics, (s, t, None, None, *PLAIN)),
        "row_gradient": (_ops.row_gradient, (s.detach(), t, TOKENS, MASK, *SCALED, stats, *upstream)),
        "head_statistics": (_ops.hidden_statistics, (*batch, *SCALED, 4000)),
        "head_statistics, alone": (_ops.hidden_statistics, (*alone, *ALONE, 4000)),
        "head_gradient": (
            _ops.hidden_gradient,
            (*detached, *SCALED, 4000, stats, *upstream, True, False, True),
        ),
        "row_loss": (_ops.row_loss, (s, t, TOKENS, MASK, *SCALED, *policy, torch.tensor(7.0), None)),
        "row_loss, float16": (
            _ops.row_loss,
            (s.detach().half().requires_grad_(), t, None, None, *PLAIN, *value, None, None),
        ),
        "row_loss, weights": (_ops.row_loss, (s, t, None, MASK, *PLAIN, *value, torch.tensor(7.0), torch.rand(N))),
        "head_loss, weights": (
            _ops.summed_loss,
            (*batch, *PLAIN, *value, torch.tensor(7.0), torch.rand(N), 4000, True, True, True),
        ),
        "head_loss": (_ops.summed_loss, (*batch, *SCALED, *policy, torch.tensor(7.0), None, 4000, True, True, True)),
        "head_loss, alone": (_ops.summed_loss, (*alone, *ALONE, *none, None, None, 4000, True, True, False)),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    """Schema, autograd registration, fake tensors and AOT with dynamic shapes: all of torch's own checks."""
    torch.use_deterministic_algorithms(False)  # uninitialised memory of unwanted gradients is not compared with itself
    op, args = op_calls()[name]
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_vmap_loops():
    """There is no batching rule: torch goes through the batch."""
    (hidden, weight, _), teacher = inputs()
    many = torch.stack([hidden.detach(), 2 * hidden.detach()])
    loss = lambda h: linear_reverse_kl(h, weight.detach(), *teacher, reduction="sum")  # noqa: E731
    torch.testing.assert_close(torch.vmap(loss)(many), torch.stack([loss(h) for h in many]))


# -- torch.compile ---------------------------------------------------------------------------------------------------


def programs():
    """name -> (function of leaves and mask, leaves)."""
    student, teacher = inputs()
    h, w, b = student
    s, t = logits(N, V)
    s.requires_grad_()
    return {
        "linear_divergence": (
            lambda m: linear_divergence(h, w, *teacher, "jsd", mask=m, reduction="mean", student_bias=b),
            student,
        ),
        "linear_reverse_kl, none": (lambda m: linear_reverse_kl(h, w, *teacher, mask=m), [h, w]),
        "linear_minillm_loss": (lambda m: linear_minillm_loss(h, w, *teacher, TOKENS, *POLICY, mask=m).loss, [h, w]),
        "linear_minillm_loss, recompute": (
            lambda m: linear_minillm_loss(h, w, *teacher, TOKENS, *POLICY, mask=m, gradient="recompute").loss,
            [h, w],
        ),
        "linear_cross_entropy": (lambda m: linear_cross_entropy(h, w, TOKENS, mask=m, denominator=9.0), [h, w]),
        "linear_kd_loss": (lambda m: linear_kd_loss(h, w, *teacher, TOKENS, mask=m).loss, [h, w]),
        "linear_logprobs": (lambda m: torch.cat(linear_logprobs(h, w, TOKENS, mask=m)), [h, w]),
        "divergence": (lambda m: divergence(s, t, "tvd", mask=m, reduction="mean"), [s]),
        "divergence, recompute": (
            lambda m: divergence(s, t, "jsd", mask=m, reduction="mean", gradient="recompute"),
            [s],
        ),
        "minillm_loss": (lambda m: minillm_loss(s, t, TOKENS, *POLICY, mask=m).loss, [s]),
        "minillm_loss, recompute": (
            lambda m: minillm_loss(s, t, TOKENS, *POLICY, mask=m, gradient="recompute").loss,
            [s],
        ),
    }


def assert_compiles(name, mask, backend):
    torch._dynamo.reset()
    function, leaves = programs()[name]
    eager, compiled = function(mask), torch.compile(function, fullgraph=True, backend=backend)(mask)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, leaves), gradients(eager, leaves))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", programs())
def test_compiles_to_one_graph(name, masked):
    assert_compiles(name, MASK if masked else None, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_minillm_loss", "linear_reverse_kl, none", "divergence", "minillm_loss"])
def test_compiles_with_inductor(name):
    assert_compiles(name, MASK, "inductor")


def test_compiled_once_for_all_token_counts():
    """The second count makes the shape dynamic; after that nothing is compiled again. Nobody looks at token values."""
    torch._dynamo.reset()
    _, w, _ = inputs()[0]
    seen = []

    def count(graph, example_inputs):
        seen.append(len(example_inputs))
        return graph.forward

    compiled = torch.compile(lambda h, y: linear_cross_entropy(h, w, y, reduction="sum"), fullgraph=True, backend=count)
    for n in (5, 7, 9, 12):
        h, y = torch.randn(n, HS), torch.randint(0, V, (n,))
        torch.testing.assert_close(compiled(h, y), linear_cross_entropy(h, w, y, reduction="sum"))
    assert len(seen) == 2
    assert compiled(h, torch.full_like(y, V)).isnan()


# -- second derivatives, autocast, checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["linear_reverse_kl, none", "linear_cross_entropy", "divergence", "divergence, recompute", "minillm_loss"]
)
def test_second_derivative_is_refused(name):
    function, leaves = programs()[name]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(None).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_autocast_of_the_layers_before(gradient):
    """A layer under autocast gives bfloat16 hidden states to a float32 head: gradients of bfloat16's exactness."""
    student, teacher = inputs(n=64, v=300, hs=32)
    layer = torch.nn.Linear(32, 32)
    leaves = [layer.weight, student[1]]

    def run(function, enabled, **settings):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            hidden = layer(student[0].detach())
            loss = function(hidden, student[1] * 1, *teacher, reduction="mean", **settings)
        return hidden.dtype, loss, gradients(loss, leaves)

    dtype, loss, found = run(linear_reverse_kl, True, gradient=gradient)
    _, truth, wanted = run(linear_reverse_kl_reference, False)
    assert dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert relative_error(loss, truth) < 0.02
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32 and relative_error(x, y) < 0.03


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_checkpointing_changes_nothing(gradient, use_reentrant):
    student, teacher = inputs()

    def loss(h, w):
        return linear_reverse_kl(torch.tanh(h), w, *teacher, mask=MASK, reduction="mean", gradient=gradient)

    wanted = gradients(loss(*student[:2]), student[:2])
    checkpoint(loss, *student[:2], use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(student[:2], wanted, strict=True))


# -- what is not wanted is not made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_frozen_parts_cost_nothing(frozen, gradient):
    student, teacher = inputs(n=40)
    h, w = student[0].requires_grad_(frozen == "head"), student[1].requires_grad_(frozen == "hidden")
    with Watch() as watch:
        loss = linear_reverse_kl(h, w, *teacher, reduction="sum", gradient=gradient, chunk_bytes=10 * V * 8)
        if frozen != "both":
            loss.backward()
    logits_made = 2 if gradient == "recompute" and frozen != "both" else 1
    per_chunk = {"head": [(10, V, HS)], "hidden": [(V, 10, HS)], "both": []}[frozen]
    assert watch.gemms.count((10, HS, V)) == watch.gemms.count((10, HT, V)) == 4 * logits_made
    assert [g for g in watch.gemms if g[2] == HS and g != (10, HT, V)] == 4 * per_chunk
    assert (h.grad is None) == (frozen != "head") and (w.grad is None) == (frozen != "hidden")


def allocations(function):
    """Bytes of all torch allocations and frees while it runs, in order (what it returns is still there)."""
    from torch.autograd.profiler import profile

    with profile(use_cpu=True, profile_memory=True) as profiler:
        result = function()
    events = sorted((e for e in profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    del result
    return [e.nbytes() for e in events]


def test_memory_is_a_third_of_that_of_eager_and_backward_copies_nothing():
    """N=512 as in the benchmark, V and H a tenth of it: peak beyond the gradients."""
    torch.use_deterministic_algorithms(False)
    student, teacher = inputs(n=512, v=5021, hs=77, ht=160)
    leaves = student[:2]
    kept = sum(x.nbytes for x in leaves)

    def peak(function):
        return max(accumulate(allocations(lambda: gradients(function(*leaves, *teacher, reduction="mean"), leaves))))

    ours, eager = peak(linear_reverse_kl) - kept, peak(linear_reverse_kl_reference) - kept
    assert ours < eager / 3, (ours, eager)
    loss = linear_reverse_kl(*leaves, *teacher, reduction="mean")
    made = sum(x for x in allocations(loss.backward) if x > 0)
    assert made < leaves[1].nbytes / 10, made  # the gradients that forward made are handed on
    assert (
        relative_error(
            leaves[1].grad, gradients(linear_reverse_kl_reference(*leaves, *teacher, reduction="mean"), leaves)[1]
        )
        < 1e-5
    )


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("name", ["linear_divergence", "divergence", "minillm_loss"])
def test_gradients_handed_on_are_not_shared(name, factor):
    """backward hands on what forward made: a second backward, or a sum in place, must not see it changed."""
    function, leaves = programs()[name]
    wanted = [factor * g for g in gradients(function(MASK), leaves)]
    loss = factor * function(MASK)
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        for x, g in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(x.grad, times * g)


def test_logits_backward_makes_no_memory():
    """The gradient that forward made is handed on, scaled in its place."""
    torch.use_deterministic_algorithms(False)
    s, t = logits(64, 1000)
    for factor in (1.0, 3.0):
        loss = factor * divergence(s.requires_grad_(), t, reduction="mean")
        made = sum(x for x in allocations(lambda loss=loss: torch.autograd.grad(loss, s)) if x > 0)
        assert made < s.nbytes / 10, made


# -- both modes, and the losses on given tokens ----------------------------------------------------------------------

MODES = {
    "linear_divergence": lambda x, t, **s: linear_divergence(*x[:2], *t, "skew_reverse_kl", reduction="mean", **s),
    "linear_minillm_loss": lambda x, t, **s: linear_minillm_loss(*x[:2], *t, *constants(dtype=x[0].dtype), **s).loss,
    "linear_cross_entropy": lambda x, t, student_bias, **s: linear_cross_entropy(
        *x[:2], TOKENS, bias=student_bias, **s
    ),
    "linear_kd_loss": lambda x, t, **s: linear_kd_loss(*x[:2], *t, TOKENS, **s).loss,
    "linear_kd_loss, wide": lambda x, t, **s: (
        linear_kd_loss(*x[:2], t[0], t[1][:40], TOKENS, temperature=2.0, **s).loss
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODES)
def test_modes_agree_and_repeat(name, dtype):
    student, teacher = inputs(dtype=dtype)
    settings = {"mask": MASK, "student_bias": student[2], "chunk_bytes": 5 * V * 8}
    found = {}
    for gradient in ("forward", "recompute", None):
        runs = []
        for _ in range(2):
            value = MODES[name](student, teacher, **settings, gradient=gradient)
            runs.append((value, *gradients(2.5 * value, student)))
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))  # bit for bit
        found[gradient] = runs[0]
    limit = {torch.float32: 2e-6, torch.bfloat16: 5e-3}[dtype]
    assert all(relative_error(x, y) < limit for x, y in zip(found["forward"], found["recompute"], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found["forward"], found[None], strict=True))


LOGITS = {
    "divergence": lambda s, t, c, **x: divergence(s, t, "jsd", reduction="mean", **x),
    "divergence, sum": lambda s, t, c, **x: divergence(s, t, "forward_kl", temperature=2.0, reduction="sum", **x),
    "minillm_loss": lambda s, t, c, **x: minillm_loss(s, t, **c, denominator=7.0, **x).loss,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LOGITS)
def test_modes_agree_and_repeat_on_logits(backend, device, name, dtype):
    """Of a student with columns of padding; masked tokens hold NaN and get a gradient of 0."""
    n = 5
    s, t = logits(n, V + 5, dtype=dtype, device=device)
    mask = MASK[:n].to(device)
    s = s.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    constants = token_constants(n, V, torch.promote_types(dtype, torch.float32), device)
    found = {}
    for gradient in ("forward", "recompute", None):
        runs = []
        for _ in range(2):
            value, again = (
                factor * LOGITS[name](s, t[:, :V], constants, mask=mask, gradient=gradient, backend=backend)
                for factor in (1.0, 2.5)
            )
            runs.append((value.detach(), *gradients(value, [s]), *gradients(again, [s])))
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))  # bit for bit
        found[gradient] = runs[0]
        assert all(g.dtype == dtype and (g[~mask] == 0).all() and (g[:, V:] == 0).all() for g in runs[0][1:])
    bf16 = 4e-3 if backend == "torch" else 8e-3  # Triton's interpreter cuts float32 off to bfloat16
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: bf16, torch.float16: 5e-4}[dtype]
    assert all(relative_error(x, y) < limit for x, y in zip(found["forward"], found["recompute"], strict=True))
    default = found["recompute" if dtype == torch.float16 else "forward"]
    assert all(torch.equal(x, y) for x, y in zip(default, found[None], strict=True))


@pytest.mark.parametrize("gradient", ["forward", "recompute", None])
def test_a_float16_gradient_waits_for_the_loss_scale(backend, device, gradient):
    """1 / N alone would flush most of it to zero; with the scale, as GradScaler brings it, it is exact."""
    s, t = logits(8, 3000, close=True, dtype=torch.float16, device=device)
    x, truth = (y.detach().clone().requires_grad_() for y in (s, s.double()))
    settings = {"reduction": "mean", "denominator": 4096}
    (found,) = gradients(2.0**20 * divergence(x, t, gradient=gradient, backend=backend, **settings), [x])
    (wanted,) = gradients(2.0**20 * divergence(truth, t.double(), **settings), [truth])
    assert found.dtype == torch.float16 and relative_error(found, wanted) < 1e-3


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.6}], ids=["plain", "scaled"]
)
def test_cross_entropy_equals_reference(backend, device, reduction, extra):
    student, _ = inputs(dtype=torch.float64)
    student = [x.detach().to(device).requires_grad_() for x in student]
    tokens, mask = TOKENS.to(device), MASK.to(device)
    settings = {"bias": student[2], "mask": mask, "reduction": reduction, **extra}
    ours = linear_cross_entropy(
        *student[:2], tokens.masked_fill(~mask, -100), **settings, backend=backend, chunk_bytes=3000
    )
    plain = linear_cross_entropy_reference(*student[:2], tokens, **settings)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, student), gradients(plain, student))
    if not extra:
        wanted = torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(*student), tokens.masked_fill(~mask, -100), reduction=reduction
        )
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("extra", [0, 6], ids=["common", "wider"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_kd_equals_reference(backend, device, kind, temperature, extra):
    student, teacher = inputs(dtype=torch.float64, extra=extra)
    student = [x.detach().to(device).requires_grad_() for x in student]
    teacher = [x.to(device) for x in teacher]
    settings = {"kd_ratio": 0.3, "temperature": temperature, "mask": MASK.to(device), "student_bias": student[2]}
    args = (*student[:2], *teacher, TOKENS.to(device), kind)
    ours = linear_kd_loss(*args, **settings, denominator=5, backend=backend)
    plain = linear_kd_loss_reference(*args, **settings, denominator=5)
    torch.testing.assert_close(tuple(ours), tuple(plain))
    torch.testing.assert_close(gradients(ours.loss, student), gradients(plain.loss, student))


@pytest.mark.parametrize(("temperature", "passes"), [(1.0, 1), (2.0, 2)])
def test_kd_at_temperature_one_is_one_pass(temperature, passes):
    student, teacher = inputs()
    with Watch() as watch:
        linear_kd_loss(*student[:2], *teacher, TOKENS, temperature=temperature).loss.backward()
    assert watch.gemms.count((N, HS, V)) == passes and watch.gemms.count((N, HT, V)) == 1
    assert watch.gemms.count((V, N, HS)) == passes


def test_refused():
    student, teacher = inputs()
    with pytest.raises(ValueError, match="gradient='late' is not known; allowed: forward, recompute, None"):
        linear_reverse_kl(*student[:2], *teacher, gradient="late")
    with pytest.raises(ValueError, match='gradient="forward" needs a scalar result'):
        linear_cross_entropy(*student[:2], TOKENS, reduction="none", gradient="forward")
    with pytest.raises(ValueError, match='gradient="forward" needs a scalar result'):
        divergence(*logits(2, 5), gradient="forward")
    with pytest.raises(ValueError, match="gradient='now' is not known"):
        minillm_loss(*logits(N, V), TOKENS, *POLICY, gradient="now")
    with pytest.raises(ValueError, match="kd_ratio must lie between 0 and 1, got 1; at the ends use"):
        linear_kd_loss(*student[:2], *teacher, TOKENS, kd_ratio=1)
    with pytest.raises(ValueError, match="beta"):
        linear_kd_loss(*student[:2], *teacher, TOKENS, "jsd", beta=1.0)


# -- offsets ---------------------------------------------------------------------------------------------------------


def test_row_offsets_beyond_32_bits():
    """Two rows 2^31 + 16 elements apart: address space that is never touched, so it costs no memory."""
    torch.use_deterministic_algorithms(False)  # which would fill it

    def rows_apart(stride):
        """Strided both times, and alike within 64 bytes: the same program, so the same bits."""
        s, t = (torch.empty(stride + 64, dtype=torch.float16).as_strided((2, 64), (stride, 1)) for _ in range(2))
        for place, x in zip((s, t), logits(2, 64), strict=True):
            place.copy_(x)
        value = divergence(s.requires_grad_(), t)
        return value, *gradients(value, [s])

    for far, near in zip(rows_apart(2**31 + 16), rows_apart(64 + 16), strict=True):
        assert torch.equal(far, near)
