"""The row op in Triton: which kernels run for it, and with what. The kernels: `_triton_kernels`; formulas: `_row_op`.

Nothing here looks at a value on the GPU, and nothing is compiled again when the number of tokens changes.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._plan import REGISTERS, REGISTERS_FLOAT64, Chip, Plan, Shape, plan
from mskd_kernels._row_op import CENTER, COLUMNS, VALUE, Coefficients, Objective, RowOp, Side
from mskd_kernels._triton_kernels import (
    INTERPRETED,
    _combine_kernel,
    _fused_kernel,
    _gradient_kernel,
    _scale_kernel,
    _statistics_kernel,
    _terms_kernel,
)

__all__ = ["INTERPRETED", "Launch", "fused", "fuses", "gradient", "plan_for", "scale", "statistics"]

_EXPECTATIONS = {None: 0, "student": 1, "teacher": 2}
_NO_POLICY = (0.0, False, False)  # clip, weight_single_step, clip_weighted_ratio
_SCALE = Shape(2048, 8)


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name and its warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int

    @property
    def options(self) -> dict[str, int]:
        sums = self.arguments.get("stats_ptr")
        double = sums is not None and sums.dtype == torch.float64
        return {"num_warps": self.warps, "maxnreg": REGISTERS_FLOAT64 if double else REGISTERS}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def statistics(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    live: Tensor | None,
    out: Tensor,
    chosen: Plan | None = None,
) -> None:
    """Fills `out` [N, COLUMNS], zeros on entry, for the rows that are live. N > 0."""
    chosen = chosen or plan_for(op, s, t)
    parts = out.new_empty(s.shape[0], chosen.parts, 6) if chosen.parts > 1 else out
    terms = out.new_zeros(s.shape[0], chosen.parts, 2) if two_passes(op) else None
    with _on(s):
        for launch in statistics_launches(op, s, t, tokens, live, out, parts, terms, chosen):
            launch.run()
    if terms is not None:
        out[:, VALUE], out[:, CENTER] = terms.sum(1).unbind(1)


def gradient(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    stats: Tensor,
    coefficients: Coefficients,
    out: Tensor,
    chosen: Plan | None = None,
) -> None:
    """Writes the gradient in the raw student logits to `out` [N, V], N > 0; rows with coefficients 0 are not read."""
    chosen = chosen or plan_for(op, s, t)
    with _on(s):
        gradient_launch(op, s, t, tokens, stats.contiguous(), coefficients, out, chosen.gradient).run()


def fuses(op: RowOp, s: Tensor, t: Tensor | None) -> bool:
    """Whether the rows being worked on fit in L2, so that one kernel does it all; else one comes after the other."""
    return plan_for(op, s, t).fused is not None


def fused(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    objective: Objective,
    out: Tensor,
    live: Tensor | None = None,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_rows.fused` in one kernel, also where `fuses` would not; N > 0."""
    dtype = accumulate_dtype(s, t)
    chosen = chosen or plan_for(op, s, t, fuse=True)
    assert chosen.fused is not None
    stats = torch.zeros(s.shape[0], COLUMNS, dtype=dtype, device=s.device)
    losses = torch.zeros_like(stats[:, 0])
    clipped = torch.zeros_like(losses, dtype=torch.bool)
    with _on(s):
        fused_launch(
            op, s, t, tokens, live, objective, stats, losses, clipped, out, chosen.fused, chosen.programs
        ).run()
    return stats, losses, clipped


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor [], x contiguous, in place; where the factor is 1, x is neither read nor written."""
    if x.numel():
        with _on(x):
            scale_launch(x, factor.to(x.device, non_blocking=True), chip_of(x.device).processors).run()
    return x


# Launches: also what `python -m bench.architectures` compiles, from tensors without memory ----------------------------


def statistics_launches(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    live: Tensor | None,
    stats: Tensor,
    parts: Tensor,
    terms: Tensor | None,
    chosen: Plan,
) -> list[Launch]:
    """Statistics in one pass or split in parts [N, parts, 6]; then the sums of the terms [N, parts, 2], if any."""
    rows, warps = s.shape[0], chosen.statistics.warps
    arguments = _row_arguments(op, s, t) | _optional(s, tokens=tokens, live=live)
    arguments |= {"stats_ptr": stats, "partials_ptr": parts, "parts": chosen.parts, "ENTROPY": op.entropy}
    tile = _tile(chosen.statistics, s, t)
    whole = chosen.parts == 1
    launches = [Launch(_statistics_kernel, (rows, chosen.parts), arguments | tile | {"WHOLE": whole}, warps)]
    if not whole:
        launches.append(Launch(_combine_kernel, (rows,), arguments, 1))
    if terms is not None:
        dropped = ("tokens_ptr", "HAS_TOKENS", "ENTROPY", "EXPECTATION")
        kept = {k: x for k, x in arguments.items() if k not in dropped} | {"partials_ptr": terms, "beta": _beta(op)}
        launches.append(Launch(_terms_kernel, (rows, chosen.parts), kept | tile, warps))
    return launches


def gradient_launch(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    stats: Tensor,
    coefficients: Coefficients,
    out: Tensor,
    shape: Shape,
) -> Launch:
    nothing = stats.new_zeros(stats.shape[0])
    table = torch.stack([nothing if c is None else c.to(stats.dtype) for c in coefficients], 1)
    teacher = None if coefficients.value is None else t
    arguments = _row_arguments(op, s, teacher) | _optional(s, tokens=tokens) | _tile(shape, s, teacher, out)
    arguments |= {"stats_ptr": stats, "coefficients_ptr": table, "out_ptr": out, "out_stride": out.stride(0)}
    arguments |= {"slope": op.student.scale / op.temperature, "beta": _beta(op)}
    arguments["ENTROPY"] = coefficients.entropy is not None
    del arguments["EXPECTATION"]
    grid = (s.shape[0], triton.cdiv(s.shape[1], shape.block))
    return Launch(_gradient_kernel, grid, arguments, shape.warps)


def fused_launch(
    op: RowOp,
    s: Tensor,
    t: Tensor | None,
    tokens: Tensor | None,
    live: Tensor | None,
    objective: Objective,
    stats: Tensor,
    losses: Tensor,
    clipped: Tensor,
    out: Tensor,
    shape: Shape,
    programs: int,
) -> Launch:
    policy = objective.policy
    clip, weight_single_step, clip_weighted = _NO_POLICY if policy is None else policy[3:]
    old, advantages, weights = (losses, losses, losses) if policy is None else (x.contiguous() for x in policy[:3])
    arguments = _row_arguments(op, s, t) | _optional(s, tokens=tokens, live=live) | _tile(shape, s, t, out)
    arguments |= {"stats_ptr": stats, "losses_ptr": losses, "clipped_ptr": clipped, "out_ptr": out}
    arguments |= {"old_ptr": old, "advantages_ptr": advantages, "weights_ptr": weights}
    arguments |= {"divisor_ptr": _on_device(objective.divisor, s, losses), "HAS_DIVISOR": objective.divisor is not None}
    arguments |= {"N": s.shape[0], "out_stride": out.stride(0), "slope": op.student.scale / op.temperature}
    arguments |= {"beta": _beta(op), "value_scale": objective.value, "nll": objective.nll, "clip": clip}
    arguments |= {"ENTROPY": op.entropy, "HAS_VALUE": objective.value != 0, "HAS_POLICY": policy is not None}
    arguments |= {"WEIGHT_SINGLE_STEP": weight_single_step, "CLIP_WEIGHTED": clip_weighted}
    return Launch(_fused_kernel, (programs,), arguments, shape.warps)


def scale_launch(x: Tensor, factor: Tensor, processors: int) -> Launch:
    arguments = {"out_ptr": x, "factor_ptr": factor, "N": x.numel(), "BLOCK": _SCALE.block}
    programs = min(triton.cdiv(x.numel(), _SCALE.block), 8 * processors)
    return Launch(_scale_kernel, (programs,), arguments, _SCALE.warps)


def _on_device(number: Tensor | None, s: Tensor, otherwise: Tensor) -> Tensor:
    """A number where the kernels can read it. One on the host is known: filling memory with it needs no waiting."""
    if number is None:
        return otherwise
    return number if number.device == s.device else torch.full_like(otherwise[:1], float(number))


def _row_arguments(op: RowOp, s: Tensor, t: Tensor | None) -> dict[str, Any]:
    """What every kernel takes: the logits and how they become logits over T."""
    kind = None if t is None else op.kind
    teacher = s if t is None or kind is None else t
    names = ("inner", "cap", "factor")
    return {
        "s_ptr": s,
        "t_ptr": teacher,
        "V": s.shape[1],
        "s_stride": s.stride(0),
        "t_stride": teacher.stride(0),
        **{f"s_{n}": x for n, x in zip(names, _scalars(op.student, op.temperature), strict=True)},
        **{f"t_{n}": x for n, x in zip(names, _scalars(op.teacher, op.temperature), strict=True)},
        "TERMS": None if kind is None else kind.triton_terms,
        "EXPECTATION": 0 if kind is None else _EXPECTATIONS[kind.expectation],
        "S_CAPPED": op.student.softcap is not None,
        "T_CAPPED": kind is not None and op.teacher.softcap is not None,
    }


def _optional(s: Tensor, **tensors: Tensor | None) -> dict[str, Any]:
    """tokens=... -> tokens_ptr (any tensor where there are none) and HAS_TOKENS."""
    found = {f"{name}_ptr": s if x is None else x.contiguous() for name, x in tensors.items()}
    return found | {f"HAS_{name.upper()}": x is not None for name, x in tensors.items()}


def _tile(shape: Shape, *tensors: Tensor | None) -> dict[str, Any]:
    logits = [x for x in tensors if x is not None]
    return {
        "BLOCK": shape.block,
        "PER": 16 // min(x.element_size() for x in logits),
        "WIDE": _wide(logits),
    }


def _wide(logits: list[Tensor]) -> bool:
    """Whether all rows reach a 16-byte boundary at the same column: then tiles that start there are loaded by 128 bits.

    True for rows that all start on one, of any dtypes, and for tensors of one dtype that are laid out alike.
    """
    starts = [(x.data_ptr() % 16, x.stride(0) * x.element_size() % 16 if x.shape[0] > 1 else 0) for x in logits]
    one_size = len({x.element_size() for x in logits}) == 1
    return set(starts) == {(0, 0)} or (one_size and len(set(starts)) == 1)


def plan_for(op: RowOp, s: Tensor, t: Tensor | None, fuse: bool | None = None) -> Plan:
    """What runs for these logits on their GPU; `fuse` as in `plan`."""
    itemsize = s.element_size() if t is None else max(s.element_size(), t.element_size())
    return plan(s.shape[0], s.shape[1], itemsize, chip_of(s.device), heavy(op, accumulate_dtype(s, t)), fuse)


def heavy(op: RowOp, dtype: torch.dtype) -> bool:
    """Whether the op takes many registers a column."""
    capped = op.student.softcap is not None or op.teacher.softcap is not None
    return capped or dtype == torch.float64 or two_passes(op)


@lru_cache
def chip_of(device: torch.device) -> Chip:
    """The GPU's; the interpreter plays an H100, so that it takes the branches that a GPU takes."""
    if device.type != "cuda":
        return Chip((9, 0), 132, 50 * 2**20)
    found = torch.cuda.get_device_properties(device)
    return Chip((found.major, found.minor), found.multi_processor_count, found.L2_cache_size)


def two_passes(op: RowOp) -> bool:
    return op.kind is not None and op.kind.expectation is None


def _beta(op: RowOp) -> float:
    return 0.0 if op.kind is None or op.kind.beta is None else op.kind.beta


def _scalars(side: Side, temperature: float) -> tuple[float, float, float]:
    """inner, cap, factor: logits over T = factor * cap * tanh(inner * z), or factor * z where there is no soft-cap."""
    if side.softcap is None:
        return 1.0, 1.0, side.scale / temperature
    return side.scale / side.softcap, side.softcap, 1.0 / temperature


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
