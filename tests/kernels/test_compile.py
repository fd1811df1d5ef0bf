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
KERNELS = {"statistics", "combine", "terms", "gradient", "fused"}


def compile_for(*arguments: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "bench.architectures", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(document: dict) -> None:
    rows = document["rows"]
    found = {(row["kernel"], row["arch"]) for row in rows}
    assert found == {(kernel, arch) for kernel in KERNELS for arch in ARCHITECTURES}
    assert all(row["registers"] > 0 for row in rows)
    assert not [row for row in rows if row["spill_bytes"]]
    wide = [row for row in rows if row["load_128_share"] is not None and "unaligned" not in row["variant"]]
    assert wide and min(row["load_128_share"] for row in wide) > 0.9, min(wide, key=lambda row: row["load_128_share"])


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no CUDA tools")
def test_no_spills_and_wide_loads_on_eight_architectures():
    document = compile_for("--smoke")
    check(document)
    assert all(row["projection"] == "not measured" and row["ms"] > 0 for row in document["projections"])


@pytest.mark.slow
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no CUDA tools")
def test_no_spills_anywhere():
    check(compile_for())
