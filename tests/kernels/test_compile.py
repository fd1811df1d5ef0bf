"""Every kernel compiles for GPUs that are not there, and spills no register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).parent / "compile_only.py"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_for(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_no_spills(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == {"_statistics_kernel", "_gradient_kernel"}
    assert all(row["registers"] > 0 for row in rows)
    assert not [row for row in rows if row["spill_bytes"]]


@pytest.mark.skipif(not PTXAS.exists(), reason="this triton brings no CUDA tools")
def test_no_spills_on_volta_ampere_hopper():
    assert_no_spills(compile_for("70", "80", "90"))


@pytest.mark.slow
@pytest.mark.skipif(not PTXAS.exists(), reason="this triton brings no CUDA tools")
def test_no_spills_anywhere():
    assert_no_spills(compile_for("70", "75", "80", "86", "89", "90", "100", "120", "--all"))
