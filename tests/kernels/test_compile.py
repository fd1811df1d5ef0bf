"""Every kernel compiles for GPUs that are not there, spills no register, and reads full tiles by 128 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = [70, 75, 80, 86, 89, 90, 100, 120]
KERNELS = {"statistics", "combine", "terms", "gradient", "fused", "scale"}


# The keys of Triton's cache of binaries for each launch, at some N and V; and those of the same kernels left to Triton.
KEYS = """
import json, triton
from bench.architectures import Variant, cache_key, launches

for sizes in ((1, 50257), (16, 50257), (17, 50257), (4096, 50257), (4096, 151936)):
    some = list(launches(Variant(90, "fp16", "jsd"), *sizes))
    free = [launch._replace(kernel=triton.jit(launch.kernel.fn)) for launch in some]
    print(json.dumps([[cache_key(launch, 90) for launch in each] for each in (some, free)]))
"""


def compiling(folder: Path, *arguments: str) -> list:
    """The lines of JSON of a process in which Triton compiles, with an empty cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]


def check(document: dict) -> None:
    rows = document["rows"]
    found = {(row["kernel"], row["arch"]) for row in rows}
    assert found == {(kernel, arch) for kernel in KERNELS for arch in ARCHITECTURES}
    assert all(row["registers"] > 0 for row in rows)
    assert not [row for row in rows if row["spill_bytes"]]
    wide = [row for row in rows if row["load_128_share"] is not None and "unaligned" not in row["variant"]]
    assert wide and min(row["load_128_share"] for row in wide) > 0.9, min(wide, key=lambda row: row["load_128_share"])


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no CUDA tools")
def test_no_spills_and_wide_loads_on_eight_architectures(tmp_path):
    (document,) = compiling(tmp_path, "-m", "bench.architectures", "--smoke")
    check(document)
    assert all(row["projection"] == "not measured" and row["ms"] > 0 for row in document["projections"])


@pytest.mark.slow
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no CUDA tools")
def test_no_spills_anywhere(tmp_path):
    (document,) = compiling(tmp_path, "-m", "bench.architectures")
    check(document)


def test_nothing_is_compiled_again_when_sizes_change(tmp_path):
    """N = 1, divisible by 16 or not, and V: Triton would compile for each of them, were it not told otherwise."""
    keys = compiling(tmp_path, "-c", KEYS)
    ours, free = ({tuple(each[i]) for each in keys} for i in (0, 1))
    assert len(ours) == 1 and len(set(*ours)) == 7  # every kernel, statistics whole and in parts
    assert len(free) == 4  # 16 and 4096 are alike
