"""How much faster this CPU multiplies matrices in bf16 than in fp32: timed once, then kept in the user's cache folder.

    bf16_speedup("AMD EPYC")         # 2.5: a product in bf16 takes 1 / 2.5 of its time in fp32

The features that a CPU lists do not say it: 2.5 was timed on one with avx512_bf16 and without AMX.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mskd.config.cache import cache_dir

ROWS, WIDTH, OUT = 512, 576, 1536  # a batch of tokens through a layer's MLP, SmolLM2-135M's
REPEATS = 5
ENOUGH_S = 0.5  # of repeats: where bf16 is emulated, one product takes a tenth of a second
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # variables that hide features from torch


@functools.cache
def bf16_speedup(cpu: str, flags: str = "") -> float:
    """Time of a product in fp32 over that of the same in bf16, with this process's threads.

    cpu, flags: the CPU's name and features; they, torch's version, the threads and the variables that limit torch say
    whether a time kept before is this machine's. Timed again in every process where the cache cannot be written.
    """
    key: dict[str, Any] = {"cpu": cpu, "torch": torch.__version__, "threads": torch.get_num_threads()}
    key |= {"flags": hashlib.sha256(flags.encode()).hexdigest()[:16], "limits": [os.environ.get(v) for v in LIMITS]}
    name = f"bf16-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # no cache folder, no file, or one that is damaged
        kept = json.loads((cache_dir() / name).read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.get("key") == key and _is_ratio(kept.get("speedup")):
            return float(kept["speedup"])
    fp32, bf16 = times()
    speedup = round(fp32 / bf16, 3)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        found = {"key": key, "fp32_ms": round(fp32 * 1e3, 3), "bf16_ms": round(bf16 * 1e3, 3), "speedup": speedup}
        _write(cache_dir() / name, json.dumps(found) + "\n")
    return speedup


def times() -> tuple[float, float]:
    """Seconds of [512, 576] x [576, 1536] in fp32 and in bf16, the best of a few in turn."""
    generator = torch.Generator().manual_seed(0)  # a stream of its own: the caller's is left alone
    x, w = torch.rand(ROWS, WIDTH, generator=generator), torch.rand(OUT, WIDTH, generator=generator)
    pairs = [(x, w), (x.bfloat16(), w.bfloat16())]
    best = [math.inf, math.inf]
    with torch.inference_mode():
        for pair in pairs:
            F.linear(*pair)  # the first one also makes threads and chooses kernels
        begin = time.perf_counter()
        for _ in range(REPEATS):
            for i, pair in enumerate(pairs):
                start = time.perf_counter()
                F.linear(*pair)
                best[i] = min(best[i], time.perf_counter() - start)
            if time.perf_counter() - begin > ENOUGH_S:
                break
    return best[0], best[1]


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _write(path: Path, text: str) -> None:
    """Other processes that look find the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
