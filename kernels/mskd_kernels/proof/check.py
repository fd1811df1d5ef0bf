"""Runs a case's kernels on a device and compares what they did with the truth: `check(case, device)` raises Wrong."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mskd_kernels import _triton_rows
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._plan import Plan
from mskd_kernels._row_op import COLUMNS, ENTROPY, LOGPROB, TEACHER_LOGPROB, VALUE, RowOp, evaluate, in_effect
from mskd_kernels.proof.cases import BF16, F16, F32, Case
from mskd_kernels.proof.oracle import Inputs, Truth, beyond, inputs_of, laid_out, truth_of

# Relative errors that are allowed: of a gradient its dtype's rounding, besides the slack of the truth.
_VALUE, _GRADIENT = 2e-5, {F16: 1e-3, BF16: 6e-3, F32: 2e-5}
_LEAST = 1e-6  # of a value: where it is smaller, its terms cancel
_CANARY = 512.0  # after each row


class Wrong(Exception):
    """A kernel that did something else than it should."""

    def __init__(self, kernel: str, what: str):
        super().__init__(what)
        self.kernel, self.what = kernel, what


class Outcome(NamedTuple):
    """What the kernels made: statistics [N, COLUMNS], losses and clip flags [N], the gradient [N, V]."""

    statistics: Tensor
    losses: Tensor
    clipped: Tensor
    gradient: Tensor


Begin = Callable[[str], None]  # told the kernel that runs next, whatever becomes of it


def nobody(kernel: str) -> None:
    """Of whom nothing is told."""


def check(case: Case, device: torch.device, begin: Begin = nobody) -> None:
    """Raises Wrong, which names the kernel and what it did."""
    if case.way == "scale":
        check_scale(case, device, begin)
        return
    given = inputs_of(case, device)
    first, second = (outcome_of(case, given, begin) for _ in range(2))
    compare(case, given, first, truth_of(given))
    for name, a, b in zip(Outcome._fields, first, second, strict=True):
        if not torch.equal(_bits(a), _bits(b)):
            raise Wrong(_kernel_of(case, name), f"{name.replace('_', ' ')}: a second run gave other bits")


def outcome_of(case: Case, given: Inputs, begin: Begin = nobody) -> Outcome:
    """Into memory that holds NaN where it is to be written and a canary where it is not."""
    op, t, tokens, live, objective = given.op, given.t, given.tokens, given.live, given.objective
    s = laid_out(given.s, case.layout, torch.nan)
    nothing = torch.full(s.shape, torch.nan, dtype=case.gradient, device=s.device)
    out = s if case.in_place else laid_out(nothing, case.layout, _CANARY)
    before = beyond(out).clone()
    chosen = _plan_of(case, op, s, t)
    if case.way == "fused":
        with running("fused", s.device, begin):
            stats, losses, clipped = _triton_rows.fused(op, s, t, tokens, objective, out, live, chosen)
    else:
        stats = torch.zeros(s.shape[0], COLUMNS, dtype=accumulate_dtype(s, t), device=s.device)
        with running("statistics", s.device, begin):
            _triton_rows.statistics(op, s, t, tokens, live, stats, chosen)
        losses, clipped, coefficients = evaluate(objective, stats)
        if live is not None:
            losses, clipped = losses.masked_fill(~live, 0.0), clipped & live
        coefficients = in_effect(given.fields or coefficients, stats, live)
        with running("gradient", s.device, begin):
            _triton_rows.gradient(op, s, t, tokens, stats, coefficients, out, chosen)
    if not torch.equal(_bits(beyond(out)), _bits(before)):
        row = int((_bits(beyond(out)) != _bits(before)).any(1).nonzero()[0])
        raise Wrong(_kernel_of(case, "gradient"), f"it wrote beyond the end of row {row}")
    return Outcome(stats, losses, clipped, out)


def _plan_of(case: Case, op: RowOp, s: Tensor, t: Tensor | None) -> Plan:
    chosen = _triton_rows.plan_for(op, s, t, fuse=case.way == "fused")
    programs = min(chosen.programs, 1 + case.tokens // 8)  # of the fused kernel: several rows each
    return chosen._replace(parts=max(2, chosen.parts) if case.way == "parts" else 1, programs=programs)


@contextmanager
def running(kernel: str, device: torch.device, begin: Begin = nobody) -> Iterator[None]:
    """What goes wrong within is that kernel's fault, but for a machine that cannot compile or has no memory left."""
    begin(kernel)
    try:
        yield
        _synchronise(device)
    except (torch.OutOfMemoryError, subprocess.CalledProcessError):
        raise
    except Exception as error:
        if "C compiler" in str(error):
            raise
        raise Wrong(kernel, first_line(error)) from error


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _bits(x: Tensor) -> Tensor:
    """NaN equals itself."""
    return x.contiguous().view(torch.uint8)


def _kernel_of(case: Case, field: str) -> str:
    """Which kernel wrote it."""
    if case.way == "fused":
        return "fused"
    return "gradient" if field == "gradient" else "combine" if case.way == "parts" else "statistics"


def compare(case: Case, given: Inputs, made: Outcome, truth: Truth) -> None:
    """Raises Wrong for the first thing that is not as it should be."""
    found = made  # of masked rows later: the truth has zeros there
    if given.live is not None:
        dead = ~given.live
        found = Outcome(*(x.masked_fill(dead.view(-1, *[1] * (x.ndim - 1)), 0) for x in made))
    names = {
        VALUE: "divergence",
        LOGPROB: "log-probability",
        TEACHER_LOGPROB: "teacher's log-probability",
        ENTROPY: "entropy",
    }
    for column, right in truth.statistics.items():
        two_passes = column == VALUE and given.op.kind is not None and given.op.kind.expectation is None
        kernel = "terms" if two_passes and case.way != "fused" else _kernel_of(case, "statistics")
        near(kernel, names[column], found.statistics[:, column], right, _VALUE * right.abs() + _LEAST)
    if given.fields is None:
        kernel = _kernel_of(case, "losses")
        near(kernel, "loss", found.losses, truth.losses, _VALUE * (truth.losses.abs() + 1) + _LEAST)
        if not torch.equal(found.clipped, truth.clipped):
            raise Wrong(kernel, f"the clip flag of row {int((found.clipped != truth.clipped).nonzero()[0])} is wrong")
    kind = torch.finfo(case.gradient)
    allowed = _GRADIENT[case.gradient] * truth.gradient.abs() + truth.slack + kind.tiny * kind.eps
    near(_kernel_of(case, "gradient"), "gradient", found.gradient, truth.gradient, allowed)
    if given.live is not None:
        for name, x in zip(Outcome._fields, made, strict=True):
            touched = ((x != 0) | (x != x)).reshape(len(x), -1).any(1) & ~given.live
            if touched.any():
                row = int(touched.nonzero()[0])
                raise Wrong(_kernel_of(case, name), f"{name}: the masked row {row} was not left alone")


def near(kernel: str, name: str, x: Tensor, right: Tensor, allowed: Tensor) -> None:
    """All of x [N] or [N, V] within what is allowed; infinite where it should be."""
    x = x.double()
    error = torch.where(x == right, 0.0, (x - right).abs())
    bad = ~(error <= allowed) | (right.isinf() & (x != right))  # also where it is NaN
    if not bad.any():
        return
    unwritten = bad & x.isnan()
    place = [int(i) for i in (unwritten if unwritten.any() else bad).nonzero()[0]]
    where = " of row " + ", column ".join(str(i) for i in place)
    what = "was not written, or is NaN," if unwritten.any() else f"is {float(x[tuple(place)]):.6g}"
    raise Wrong(
        kernel, f"the {name}{where} {what} and should be {float(right[tuple(place)]):.6g}; {int(bad.sum())} are wrong"
    )


def check_scale(case: Case, device: torch.device, begin: Begin = nobody) -> None:
    """All of it, beyond the last full tile too, and nothing after it; a factor of 1 touches nothing."""
    generator = torch.Generator().manual_seed(0)
    size = case.tokens * case.vocabulary
    x = torch.randn(size, generator=generator).to(device, case.gradient)
    for factor in (1.0, -0.3):
        memory = torch.cat([x, torch.full((8,), _CANARY, dtype=x.dtype, device=device)])
        with running("scale", device, begin):
            _triton_rows.scale(memory[:size], torch.tensor(factor, device=device))
        if not (memory[size:] == _CANARY).all():
            raise Wrong("scale", "it wrote beyond the end")
        right = x.double() * factor
        allowed = (torch.finfo(case.gradient).eps if factor != 1.0 else 0.0) * right.abs()
        near("scale", "product", memory[:size], right, allowed)
