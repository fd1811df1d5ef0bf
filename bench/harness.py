"""Time, memory and the record of a measurement: what every `python -m bench.<name>` shares.

    clock = stopwatch(device)
    wrong = gate(calls, check)                                   # red: that provider is not timed
    right = {name: call for name, call in calls.items() if name not in wrong}
    found = figures(interleave(right, rounds=7, clock=clock), base="eager")
    rows = [{"benchmark": ..., "shape": ..., "dtype": ..., "provider": name, **f} for name, f in found.items()]
    rows += [{..., "provider": name, "wrong": reason} for name, reason in wrong.items()]
    return finish("kl_kernel", environment(device), rows, left_out={}, folder=RESULTS)       # the exit code

A provider is a name and a call without arguments. A result file is one machine's: {"format", "runs": {id: environment},
"rows": [...]}, a row for each (benchmark, shape, dtype, provider), which names the run that measured it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mskd.config.hardware import probe
from mskd.store.files import write_json

Call = Callable[[], Any]
Stopwatch = Callable[[Call], float]  # a call -> the seconds it took
Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
FORMAT = "mskd-bench-1"
KEY = ("benchmark", "shape", "dtype", "provider")
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "accelerate")


# --- time


def stopwatch(device: torch.device) -> Stopwatch:
    """The clock of a device: CUDA events after a flush of the L2 cache, or the wall clock of a CPU."""
    return _CudaStopwatch(device) if device.type == "cuda" else _wall_seconds


def _wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freeing it is not part of the call
    return seconds


class _CudaStopwatch:
    """Seconds between two events around the call; its inputs come from memory, not from the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * cache, 64 * 2**20), dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self.flush.zero_()
            start.record()
            result = call()
            end.record()
            end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def interleave(calls: Mapping[str, Call], rounds: int, clock: Stopwatch, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round. The order turns by one a round, so that drift hits all alike."""
    names = list(calls)
    for name in names * warmup:
        calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            seconds[name].append(clock(calls[name]))
    return seconds


def figures(seconds: Mapping[str, Sequence[float]], base: str | None = None) -> dict[str, dict[str, Any]]:
    """For each provider: rounds, ms p20/p50/p80, and p20/p50/p80 of the ratio to `base` in the same round.

    A ratio below 1 is faster than the base; without the base there are no ratios.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, own in seconds.items():
        found[name] = {"rounds": len(own), **_spread("ms", [1e3 * s for s in own])}
        if base is not None and base in seconds:
            paired = [s / b for s, b in zip(own, seconds[base], strict=True)]
            found[name] |= {"base": base, **_spread("ratio", paired)}
    return found


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{p}": float(x) for p, x in zip((20, 50, 80), np.percentile(values, (20, 50, 80)), strict=True)}


def copy_bandwidth(device: torch.device, clock: Stopwatch, size: int = 2**29, rounds: int = 7) -> float:
    """Bytes a second, read plus written, of torch's copy between two buffers of `size` bytes; the median."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    seconds = interleave({"copy": lambda: target.copy_(source)}, rounds, clock)["copy"]
    return 2 * size / float(np.median(seconds))


# --- memory


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Peak of allocated memory during the call, beyond what was allocated before and beyond the tensors it returns.

    GPU: torch.cuda.max_memory_allocated. CPU: torch's profiler, which sees each allocation of torch's own allocator to
    the byte, always the same number; scratch memory inside MKL and oneDNN is in neither. The profiler records every op:
    for calls of seconds, not of minutes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before - _bytes(result)
    from torch.autograd.profiler import profile

    with profile(use_cpu=True, profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(changes, initial=0)) - _bytes(result)


def _bytes(result: Any) -> int:
    """Of the tensors in nested tuples and lists; memory that two of them share counts once."""
    found: dict[int, int] = {}
    queue = [result]
    while queue:
        x = queue.pop()
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, tuple | list):
            queue.extend(x)
    return sum(found.values())


# --- correctness


def gate(calls: Mapping[str, Call], check: Callable[[str, Any], str | None]) -> dict[str, str]:
    """Run every provider once before it may be timed. {provider: why not}: what `check` says, or its exception.

    `check(provider, result)` returns None, or what is wrong with the result in one line.
    """
    wrong: dict[str, str] = {}
    for name, call in calls.items():
        try:
            reason = check(name, call())
        except Exception as error:  # a provider that cannot run gets no figure either, and the others go on
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is not None:
            wrong[name] = reason
    return wrong


# --- the record


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software of a run, all that a figure must be read with."""
    facts = probe()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "name": facts.cpu_name,
        "cpu": facts.cpu_name,
        "cores": len(cores),
        "threads": torch.get_num_threads(),
        "memory_bytes": facts.cpu_memory_bytes,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := installed(p))},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "kernels", "mskd", "bench", ":!bench/results")),
    }
    if device.type == "cuda":
        gpu = facts.gpus[device.index or 0]
        found |= {"name": gpu.name, "capability": gpu.sm, "memory_bytes": gpu.memory_bytes, "cuda": torch.version.cuda}
    return found


def installed(package: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no checkout


def result_file(folder: Path, run: Mapping[str, Any]) -> Path:
    """bench/results/<gpu>.json, or <cpu>-<n>-cores.json: CPUs of one name differ in what they are given."""
    name = run["name"] if run["device"] == "cuda" else f"{run['name']} {run['cores']} cores"
    return folder / (re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") + ".json")


def read_results(path: Path) -> dict[str, Any]:
    """A result file; ValueError, in one line, where it is missing, damaged or of another format."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give files of bench/results/") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON; give files of bench/results/") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is no result file of format {FORMAT}; write it again with python -m bench.<name>")
    return document


def merge(document: Mapping[str, Any] | None, run: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """`document` with the rows of a new run, each in the place of the older row of its key; unused runs go."""
    name = f"{run['date']} {(run['commit'] or 'no commit')[:12]}"
    kept = {_key(row): row for row in (document or {}).get("rows", [])}
    kept |= {_key(row): {**row, "run": name} for row in rows}
    runs = {**(document or {}).get("runs", {}), name: dict(run)}
    used = {row["run"] for row in kept.values()}
    return {
        "format": FORMAT,
        "runs": {k: v for k, v in sorted(runs.items()) if k in used},
        "rows": [kept[key] for key in sorted(kept)],
    }


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[k]) for k in KEY)


def finish(
    benchmark: str, run: Mapping[str, Any], rows: Sequence[Row], left_out: Mapping[str, str], folder: Path | None
) -> int:
    """Store the rows, print the document as the last line and return the exit code: 1 if a provider was wrong.

    A row has figures or, where the gate was red, "wrong": why; either takes the place of the older row of its key.
    left_out: provider -> why it cannot run here. folder: of the result files; None stores nothing. The run's record
    gets the load of the machine: above the run's own threads, others were at work, and only ratios mean something.
    """
    run = dict(run) | {"load_average": list(os.getloadavg())}  # over the last 1, 5 and 15 minutes
    document = {"benchmark": benchmark, "run": dict(run), "rows": list(rows), "left_out": dict(left_out)}
    code, path = 0, None
    for row in rows:
        if "wrong" in row:
            print(f"WRONG, no figure: {row['shape']}, {row['dtype']}, {row['provider']}: {row['wrong']}")
            code = 1
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if folder is not None and rows:
        path = result_file(folder, run)
        write_json(path, merge(read_results(path) if path.exists() else None, run, rows))
        print(f"rows are in {path}")
    print(json.dumps(document | {"results": path and str(path)}), flush=True)
    return code


def table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """Rows as aligned text: title -> what of a row stands below it."""
    cells = [list(columns), *([form(row) for form in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
