"""Properties of every kind on random cases: shapes, strides, masks, dtypes, zero masses, temperatures, extreme logits.

The truth is float64 in log space, value and slope from their formulas, of the same rounded inputs. Examples repeat
(derandomize); `make test-slow` draws many more. Gaps between strided columns hold NaN.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS
from mskd_kernels import divergence, linear_divergence
from mskd_kernels._kinds import DIVERGENCES
from torch import Tensor

BETA_FREE = [name for name, row in DIVERGENCES.items() if row.beta is None]
MIXED = [name for name, row in DIVERGENCES.items() if row.beta is not None]
PATTERNS = ["normal", "close", "offset", "equal", "one-hot", "extreme"]
PATTERNS += ["student has zeros", "teacher has zeros", "both"]
LAYOUTS = ["plain", "wide rows", "every other column", "transposed", "expanded", "misaligned"]
OPTIONS = dict(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture poisons memory: once is enough


@dataclass(frozen=True)
class Case:
    """What is drawn; the numbers come from `seed`."""

    seed: int
    rows: int
    vocabulary: int
    teacher_extra: int  # columns of the teacher beyond the student's; negative: the student has more
    kind: str
    beta: float | None
    dtypes: tuple[torch.dtype, torch.dtype]
    pattern: str
    layouts: tuple[str, str]
    temperature: float
    masked: bool

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student and teacher, plain, on their own vocabularies and in their own dtypes."""
        g = torch.Generator().manual_seed(self.seed)
        n, v = self.rows, self.vocabulary + abs(self.teacher_extra)
        s, t = (2 * torch.randn(n, v, generator=g, dtype=torch.float64) for _ in range(2))
        place = torch.randint(self.vocabulary, (n, 1), generator=g)
        if self.pattern == "close":
            t = s + 0.03 * t
        elif self.pattern == "offset":
            s, t = s + 200, t - 300
        elif self.pattern == "equal":
            s, t = torch.full_like(s, 7.0), torch.full_like(t, -2.5)
        elif self.pattern == "one-hot":
            s = torch.zeros_like(s).scatter(1, place, 1e4)
        elif self.pattern == "extreme":
            s, t = ((torch.rand(n, v, generator=g, dtype=torch.float64) * 2 - 1) * 1e4 for _ in range(2))
        for side, x in (("student", s), ("teacher", t)):
            if self.pattern in (f"{side} has zeros", "both"):
                holes = torch.rand(n, v, generator=g) < 0.4
                x.masked_fill_(holes.scatter(1, place, False), -torch.inf)
        s, t = (x[:, : self.vocabulary + max(0, sign * self.teacher_extra)] for x, sign in ((s, -1), (t, 1)))
        s, t = s.to(self.dtypes[0]), t.to(self.dtypes[1])
        rows = ([0] * n if layout == "expanded" else slice(None) for layout in self.layouts)
        return tuple(x[index] for x, index in zip((s, t), rows, strict=True))

    def mask(self) -> Tensor | None:
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.rows, generator=g) < 0.6 if self.masked else None


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides."""
    n, v = x.shape
    if layout == "expanded":
        return x[:1].clone().expand(n, v)
    if layout == "transposed":
        return x.t().contiguous().t()
    gap = {"plain": (n, v), "wide rows": (n, v + 3), "every other column": (n, 2 * v), "misaligned": (1 + n * v,)}
    memory = x.new_full(gap[layout], torch.nan)
    views = {
        "plain": lambda: memory,
        "wide rows": lambda: memory[:, :v],
        "every other column": lambda: memory[:, ::2],
        "misaligned": lambda: memory[1:].view(n, v),
    }
    return views[layout]().copy_(x)


def cases(vocabulary: int, rows: int = 5, dtypes=tuple(FLOATS), patterns=tuple(PATTERNS)) -> st.SearchStrategy[Case]:
    kinds = st.one_of(
        st.tuples(st.sampled_from(BETA_FREE), st.none()),
        st.tuples(st.sampled_from(MIXED), st.one_of(st.none(), st.floats(0.01, 0.99))),
    )
    one = st.builds(
        Case,
        seed=st.integers(0, 2**31),
        rows=st.integers(1, rows),
        vocabulary=st.integers(1, vocabulary),
        teacher_extra=st.integers(-3, 3),
        kind=st.none(),
        beta=st.none(),
        dtypes=st.tuples(st.sampled_from(dtypes), st.sampled_from(dtypes)),
        pattern=st.sampled_from(patterns),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
        temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0, 10.0]),
        masked=st.booleans(),
    )
    return st.tuples(one, kinds).map(lambda x: Case(**vars(x[0]) | dict(zip(("kind", "beta"), x[1], strict=True))))


# -- the truth ------------------------------------------------------------------------------------


def truth(s: Tensor, t: Tensor, kind: str, beta: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Divergence [N] of float64 logits and its slope [N, V] in s, from the formulas; an infinite one has slope 0."""
    b = DIVERGENCES[kind].beta if beta is None else beta
    lq, lp = ((x / temperature).log_softmax(-1) for x in (s, t))
    q, p = lq.exp(), lp.exp()
    lm = None if b is None else mixture(kind, lq, lp, b)
    value = {
        "reverse_kl": lambda: kl(lq, lp),
        "forward_kl": lambda: kl(lp, lq),
        "jsd": lambda: b * kl(lp, lm) + (1 - b) * kl(lq, lm),
        "skew_kl": lambda: kl(lp, lm),
        "skew_reverse_kl": lambda: kl(lq, lm),
        "tvd": lambda: (q - p).abs().sum(-1) / 2,
    }[kind]()
    w = {
        "reverse_kl": lambda: q * (lq - lp),
        "forward_kl": lambda: q - p,
        "jsd": lambda: (1 - b) * q * (lq - lm),
        "skew_kl": lambda: -(1 - b) * q * (lp - lm).exp(),
        "skew_reverse_kl": lambda: q * (lq - lm - b * (lq - lm).exp()),
        "tvd": lambda: q * (q - p).sign() / 2,
    }[kind]()
    if kind != "forward_kl":
        w = w.masked_fill(lq == -torch.inf, 0.0)
    slope = (w - q * w.sum(-1, keepdim=True)) / temperature
    return value, slope.masked_fill(value.isinf()[:, None], 0.0)


def mixture(kind: str, lq: Tensor, lp: Tensor, b: float) -> Tensor:
    """log of b p + (1 - b) q, or of b q + (1 - b) p for skew_reverse_kl."""
    first, second = (lq, lp) if kind == "skew_reverse_kl" else (lp, lq)
    return torch.logaddexp(first + math.log(b), second + math.log1p(-b))


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL of log-probabilities [N, V]; 0 log 0 = 0."""
    return (first.exp() * (first - second)).masked_fill(first == -torch.inf, 0.0).sum(-1)


def tolerance(s: Tensor, t: Tensor, temperature: float, exact: bool) -> float:
    """A log-probability carries the rounding of the largest logit in units of T; 16 such errors may add up."""
    largest = max(float(x[x.isfinite()].abs().max()) for x in (s, t))
    unit = torch.finfo(torch.float64 if exact else torch.float32).eps
    return 16 * unit * (4 + largest / temperature)


def ties(s: Tensor, t: Tensor, temperature: float, limit: float) -> Tensor:
    """How far rounding may move tvd's slope [N, V]: its sign jumps where q and p are equal up to `limit`."""
    lq, lp = ((x / temperature).log_softmax(-1) for x in (s, t))
    q = lq.exp()
    turned = q.masked_fill(~((lq - lp).abs() <= limit), 0.0)
    return (turned + q * turned.sum(-1, keepdim=True)) / temperature


# -- logits ---------------------------------------------------------------------------------------


def value_and_gradient(
    case: Case, s: Tensor, t: Tensor, mask: Tensor | None, backend: str, mode: str = "recompute"
) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    options = dict(beta=case.beta, temperature=case.temperature, mask=mask, backend=backend)
    value = divergence(s, t, case.kind, **options)
    in_forward = mode == "forward"
    total = divergence(s, t, case.kind, reduction="sum", gradient=mode, **options) if in_forward else value.sum()
    return value.detach(), torch.autograd.grad(total, s)[0]


def check(case: Case, backend: str, mode: str = "recompute") -> None:
    s, t = case.logits()
    mask, v = case.mask(), case.vocabulary
    value, gradient = value_and_gradient(case, *map(laid_out, (s, t), case.layouts), mask, backend, mode)
    exact = torch.float64 in case.dtypes
    expected, slope = truth(s[:, :v].double(), t[:, :v].double(), case.kind, case.beta, case.temperature)
    if mask is not None:
        expected, slope = expected.masked_fill(~mask, 0.0), slope.masked_fill(~mask[:, None], 0.0)
    limit = tolerance(s[:, :v], t[:, :v], case.temperature, exact)
    size = 1 + expected.masked_fill(expected.isinf(), 0.0).abs()
    assert value.dtype == (torch.float64 if exact else torch.float32) and gradient.dtype == s.dtype
    assert torch.equal(value.isinf(), expected.isinf()) and not value.isnan().any()
    finite = expected.isfinite()
    assert ((value - expected)[finite].abs() <= limit * size[finite]).all(), (value, expected)
    assert (value >= (-1e-12 if exact else -1e-5)).all(), value
    rounding = torch.finfo(s.dtype).eps * slope.abs()
    error = (gradient[:, :v].double() - slope).abs()
    bound = limit * size[:, None] / case.temperature + rounding + 2 * torch.finfo(s.dtype).tiny
    if case.kind == "tvd":
        bound = bound + ties(s[:, :v].double(), t[:, :v].double(), case.temperature, limit)
    assert (error <= bound).all(), (error - bound).max()
    assert not gradient[:, v:].any()
    drift = gradient.double().sum(-1).abs()  # the slope's own sum is 0: what is left is rounding
    assert (drift <= bound.sum(-1)).all(), drift


@given(cases(vocabulary=300), st.sampled_from(["forward", "recompute"]))
@settings(max_examples=200, **OPTIONS)
def test_value_and_gradient_are_the_formulas(case, mode):
    check(case, "torch", mode)


@pytest.mark.slow
@given(cases(vocabulary=3000, rows=40), st.sampled_from(["forward", "recompute"]))
@settings(max_examples=5000, **OPTIONS)
def test_value_and_gradient_are_the_formulas_in_many_more_cases(case, mode):
    check(case, "torch", mode)


@given(cases(vocabulary=40, rows=2, dtypes=(torch.float32, torch.float64)))
@settings(max_examples=12, **OPTIONS)
def test_value_and_gradient_are_the_formulas_in_triton(case):
    check(case, "triton")


# No bfloat16: the interpreter makes nonsense of float64 -> bfloat16 (1.0 becomes 9e-41), and truncates from float32.
@pytest.mark.slow
@given(cases(vocabulary=2500, rows=2, dtypes=(torch.float16, torch.float32, torch.float64)))
@settings(max_examples=150, **OPTIONS)
def test_value_and_gradient_are_the_formulas_in_many_more_cases_in_triton(case):
    check(case, "triton")


@given(cases(vocabulary=60, dtypes=(torch.float64,), patterns=("normal", "close", "both")), st.integers(-300, 300))
@settings(max_examples=40, **OPTIONS)
def test_a_constant_added_to_a_row_changes_nothing(case, shift):
    s, t = case.logits()
    steps = torch.arange(case.rows, dtype=torch.float64)[:, None]
    found = value_and_gradient(case, s + shift * steps, t - 3 * shift, case.mask(), "torch")
    expected = value_and_gradient(case, s, t, case.mask(), "torch")
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@given(cases(vocabulary=50, rows=8), st.integers(1, 200))
@settings(max_examples=40, **OPTIONS)
def test_value_and_gradient_are_the_formulas_in_any_blocks_of_rows(case, block):
    """Not the same bits: where a block ends decides which elements torch computes in vectors, and with which exp."""
    from mskd_kernels import _torch_rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch_rows, "_CPU_BLOCK", block)
        check(case, "torch")


# -- hidden states --------------------------------------------------------------------------------


@st.composite
def heads(draw) -> dict:
    """The arguments of linear_divergence, float64: both sides with their own sizes, bias, scale and soft-cap."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, v, found = draw(st.integers(1, 9)), draw(st.integers(1, 70)), {}
    for side in ("student", "teacher"):
        h, own = draw(st.integers(1, 12)), v + draw(st.integers(0, 4))
        for name, shape in (("hidden", (n, h)), ("weight", (own, h)), ("bias", (own,))):
            found[f"{side}_{name}"] = 2 * torch.randn(shape, generator=g, dtype=torch.float64)
        if draw(st.booleans()):
            found[f"{side}_bias"] = None
        found[f"{side}_logit_scale"] = draw(st.sampled_from([0.25, 1.0, 3.0]))
        found[f"{side}_softcap"] = draw(st.sampled_from([None, 1.5, 30.0]))
    found["mask"] = torch.rand(n, generator=g) < 0.7 if draw(st.booleans()) else None
    return found


def project(arguments: dict, side: str, v: int) -> Tensor:
    hidden, weight, bias, scale, softcap = (
        arguments[f"{side}_{name}"] for name in ("hidden", "weight", "bias", "logit_scale", "softcap")
    )
    z = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    z = scale * z[:, :v]
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@given(heads(), cases(vocabulary=1), st.sampled_from(["forward", "recompute"]), st.sampled_from([1, 1500, None]))
@settings(max_examples=80, **OPTIONS)
def test_from_hidden_states_in_both_modes_and_any_chunk(arguments, case, mode, chunk_bytes):
    """Value and gradients through soft-cap, scale and bias are those of the logits, whatever the chunk."""
    names = [n for n in ("student_hidden", "student_weight", "student_bias") if arguments[n] is not None]
    for name in names:
        arguments[name].requires_grad_()
    mask, v = arguments["mask"], min(arguments["student_weight"].shape[0], arguments["teacher_weight"].shape[0])
    s, t = project(arguments, "student", v), project(arguments, "teacher", v).detach()
    value, slope = truth(s.detach(), t, case.kind, case.beta, case.temperature)
    counts = torch.ones(len(value), dtype=torch.bool) if mask is None else mask
    expected = torch.autograd.grad(s, [arguments[n] for n in names], slope * counts[:, None])
    options = dict(beta=case.beta, temperature=case.temperature, chunk_bytes=chunk_bytes)
    total = linear_divergence(kind=case.kind, reduction="sum", gradient=mode, **arguments, **options)
    torch.testing.assert_close(total, value[counts].sum(), atol=1e-10, rtol=1e-10)
    found = torch.autograd.grad(total, [arguments[n] for n in names])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
