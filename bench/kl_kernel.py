"""The reverse KL and its gradient: ours beside eager torch, torch.compile, TRL and Liger, in one interleaved run.

    python -m bench.kl_kernel                           # this machine's default shapes, rows to bench/results/
    python -m bench.kl_kernel --shape 1024x50257x768x1600 --dtype bf16 --out /tmp/results
    python -m bench.kl_kernel --smoke                   # small, stores nothing unless --out is given

A time is loss, forward and backward, of one call. First every provider's loss and gradients are compared with float64
at a reverse KL of about 0.005 and 0.5; one that is wrong gets no figure, and the exit code is 1. The roof of a shape is
its minimal bytes at the copy bandwidth of the same run (logits), or the four matrix products alone (hidden states).
Last line: one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import (
    RESULTS,
    Call,
    Row,
    Stopwatch,
    copy_bandwidth,
    environment,
    figures,
    finish,
    gate,
    interleave,
    merge,
    peak_extra_bytes,
    read_results,
    result_file,
    stopwatch,
    table,
)
from bench.kl_cases import NAMES, Case, Inputs, relative_error, truth
from bench.kl_providers import gemms, providers
from bench.plot import Panel, draw

LEVELS = (0.005, 0.5)  # reverse KL of the inputs; the last is the one that is timed
# Largest relative error of loss and gradients at these levels that passes. 16 bits: rounding the logits alone costs up
# to 30 % in bf16 and 4 % in fp16 at the small KL; a wrong formula is off by more.
LIMITS = {torch.float32: (1e-3, 1e-4), torch.float16: (0.1, 0.02), torch.bfloat16: (0.6, 0.15)}

VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
HEADS = ("50257x768x1600", "151936x896x3584", "128256x2048x4096")
GPU_SHAPES = (
    *(f"4096x{v}" for v in VOCABULARIES),
    "256x151936",
    *(f"{n}x{head}" for n in (1024, 8192) for head in HEADS),
)
CPU_SHAPES = ("256x50257", "32x151936", "256x8192x256x512", "512x50257x768x1600")
SMOKE_SHAPES = ("16x1000", "32x1000x48x64")
FEWEST, MOST = 5, 25  # rounds


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    folder = options.out or (None if options.smoke else RESULTS)
    try:
        cases = _cases(options.shape, options.dtype, options.smoke, device)
        run = environment(device)
        if folder and (path := result_file(folder, run)).exists():
            read_results(path)  # a file that nothing can be merged into is found before the measurement
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    clock = stopwatch(device)
    run |= {"copy_gb_s": copy_bandwidth(device, clock, 2**24 if options.smoke else 2**29) / 1e9}
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for case in cases:
        found, missing = measure(case, device, clock, options.seconds, run["copy_gb_s"])
        rows, left_out = rows + found, left_out | missing
        print(table(found, COLUMNS) + "\n", flush=True)
    if folder and rows:
        plot(result_file(folder, run), run, rows)
    return finish("kl_kernel", run, rows, left_out, folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kl_kernel", description=(__doc__ or "").partition("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="+", help="NxV (logits) or NxVxHsxHt (hidden states)")
    parser.add_argument("--dtype", nargs="+", choices=list(NAMES.values()), help="GPU: fp16 and bf16; CPU: fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, help="of timed rounds a shape, of which there are 5 to 25")
    parser.add_argument("--smoke", action="store_true", help="two tiny shapes")
    parser.add_argument("--out", type=Path, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no CUDA GPU here; use cpu")
    options.seconds = options.seconds or (1.0 if options.smoke else 100.0 if options.device == "cpu" else 20.0)
    return options


def _cases(shapes: Sequence[str] | None, dtypes: Sequence[str] | None, smoke: bool, device: torch.device) -> list[Case]:
    """The shapes and dtypes that were asked for, or this device's."""
    if dtypes is None:
        dtypes = ["fp32"] if device.type == "cpu" else ["fp16"]
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            dtypes = ["fp16", "bf16"]
    shapes = shapes or (SMOKE_SHAPES if smoke else CPU_SHAPES if device.type == "cpu" else GPU_SHAPES)
    types = {name: dtype for dtype, name in NAMES.items()}
    return [Case.parse(shape, types[dtype]) for dtype in dtypes for shape in shapes]


def measure(
    case: Case, device: torch.device, clock: Stopwatch, seconds: float, copy_gb_s: float
) -> tuple[list[Row], dict[str, str]]:
    """(rows, what was left out and why) of one shape; who runs out of memory is left out."""
    torch.compiler.reset()
    try:
        checked = check(case, device)
        found, memory = _figures(checked, device, clock, seconds)
    except torch.OutOfMemoryError:
        return [], {f"{case.shape}, {NAMES[case.dtype]}": "the inputs, their truth or the floor do not fit in memory"}
    roof = found["gemm"]["ms_p50"] if "gemm" in found else case.minimal_bytes / copy_gb_s / 1e6
    rows = []
    for name, figure in found.items():
        errors, shares = checked.errors.get(name, {}), _shares(case, figure["ms_p50"], roof, copy_gb_s)
        rows.append(_start(case, name) | figure | shares | memory.get(name, {}) | errors)
    rows += [_start(case, n) | checked.errors.get(n, {}) | {"wrong": why} for n, why in checked.wrong.items()]
    return rows, checked.left_out


@dataclass
class Checked:
    """A shape's providers after the gate: who may be timed, on which inputs, and the errors of all."""

    inputs: Inputs = ()
    calls: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def check(case: Case, device: torch.device) -> Checked:
    """Every provider against float64 at each level; the calls that are left are those of the last level."""
    found = Checked()
    for level, limit in zip(LEVELS, LIMITS[case.dtype], strict=True):
        found.calls, found.inputs = {}, ()  # the memory of the level before
        found.inputs = case.inputs(level, device)
        calls, left_out = providers(found.inputs)
        found.left_out |= left_out
        found.calls = {name: call for name, call in calls.items() if name not in found.wrong}
        found.wrong |= gate(found.calls, partial(_verdict, truth(found.inputs), level, limit, found.errors))
    for name in [n for n, reason in found.wrong.items() if reason.startswith("OutOfMemoryError")]:
        del found.wrong[name]
        found.left_out[f"{case.shape}, {NAMES[case.dtype]}, {name}"] = "out of memory"
        found.calls.pop(name, None)
    found.calls = {name: call for name, call in found.calls.items() if name not in found.wrong}
    return found


def _verdict(true: Inputs, level: float, limit: float, errors: dict, name: str, result: Inputs) -> str | None:
    loss, *gradients = (relative_error(x, y) for x, y in zip(result, true, strict=True))
    errors.setdefault(name, {})[f"gradient_error_{level:g}"] = max(gradients)
    worst = max(loss, *gradients)
    if worst <= limit:  # not so for NaN
        return None
    return f"error {worst:.1e} > {limit:g} at a reverse KL of {float(true[0]):.2g}"


def _figures(
    checked: Checked, device: torch.device, clock: Stopwatch, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]]]:
    """Times of all calls and of the floor, and peak extra memory of the calls."""
    calls = dict(checked.calls)
    if len(checked.inputs) == 4:
        calls["gemm"] = gemms(*checked.inputs)
    once = interleave(calls, 1, clock, warmup=1 if device.type == "cuda" else 0)  # the gate has run all but the floor
    rounds = int(seconds / sum(s for (s,) in once.values())) if once else 0
    found = figures(interleave(calls, max(FEWEST, min(MOST, rounds)), clock, warmup=0), base="eager")
    return found, {name: {"peak_extra_bytes": peak_extra_bytes(call, device)} for name, call in checked.calls.items()}


def _start(case: Case, provider: str) -> Row:
    hs, ht = case.hidden or (None, None)
    key = {"benchmark": "kl_kernel", "shape": case.shape, "dtype": NAMES[case.dtype], "provider": provider}
    return key | {"n": case.n, "v": case.v, "hs": hs, "ht": ht}


def _shares(case: Case, ms: float, roof: float, copy_gb_s: float) -> Row:
    """How near a time is to what the machine can do; `bound`: from hidden states in 16 bits, GEMMs and 10 N V bytes."""
    gb_s = case.minimal_bytes / ms / 1e6
    shares = {"gb_s": gb_s, "copy_percent": 100 * gb_s / copy_gb_s, "roof_ms": roof, "roof_percent": 100 * roof / ms}
    if case.hidden is None or case.dtype.itemsize != 2:
        return shares
    return shares | {"bound_ratio": ms / (roof + 10 * case.n * case.v / copy_gb_s / 1e6)}


def _form(name: str, form: str, scale: float = 1.0) -> Any:
    return lambda row: form.format(row[name] * scale) if row.get(name) is not None else "-"


COLUMNS = {
    "shape": lambda row: row["shape"],
    "dtype": lambda row: row["dtype"],
    "provider": lambda row: row["provider"] + (" WRONG" if "wrong" in row else ""),
    "ms p20": _form("ms_p20", "{:.3g}"),
    "p50": _form("ms_p50", "{:.3g}"),
    "p80": _form("ms_p80", "{:.3g}"),
    "/ eager": _form("ratio_p50", "{:.2f}"),
    "% of roof": _form("roof_percent", "{:.0f}"),
    "GB/s": _form("gb_s", "{:.1f}"),
    "% of copy": _form("copy_percent", "{:.0f}"),
    "extra MiB": _form("peak_extra_bytes", "{:.0f}", 2**-20),
    "error at 0.5": _form("gradient_error_0.5", "{:.1e}"),
    "at 0.005": _form("gradient_error_0.005", "{:.1e}"),
}


def plot(results: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Share of the roof and peak extra memory, of all shapes in the result file and this run, to a PNG beside it."""
    merged = merge(read_results(results) if results.exists() else None, run, rows)
    rows = [row for row in merged["rows"] if row["benchmark"] == "kl_kernel"]
    panels = [
        Panel("% of the roof: bytes at copy bandwidth, or the GEMMs", _by_shape(rows, "roof_percent"), limit=100.0),
        Panel("peak extra memory, MiB", _by_shape(rows, "peak_extra_bytes", 2**-20), log=True),
    ]
    measured = ", ".join(sorted({row["run"] for row in rows}))
    title = f"reverse KL, forward and backward: {run['name']}, {run['cores']} CPU cores\nmeasured {measured}"
    draw(results.with_suffix(".kl_kernel.png"), title, panels)


def _by_shape(rows: Sequence[Row], name: str, scale: float = 1.0) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if name in row and row["provider"] != "gemm":
            found.setdefault(f"{row['shape']} {row['dtype']}", {})[row["provider"]] = row[name] * scale
    return found


if __name__ == "__main__":
    sys.exit(main())
