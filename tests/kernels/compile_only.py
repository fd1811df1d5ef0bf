"""Compiles every kernel for compute capabilities given on the command line, with no GPU: one JSON row a kernel.

    python tests/kernels/compile_only.py 70 80 90 [--all]

The row: kernel, arch, dtype, variant, registers, spill_bytes (stack + local memory of a thread), shared. Needs an
environment without TRITON_INTERPRET. `--all`: every variant; else those that need most registers.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from mskd_kernels import _triton_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VOCABULARY = 50257
DTYPES = {"fp16": torch.float32, "bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def signature(kernel, dtype: str, constants: dict) -> tuple[dict, dict]:
    """Types of the arguments, and which are divisible by 16 (pointers are, strides of such a vocabulary are not)."""
    total = "fp64" if dtype == "fp64" else "fp32"
    pointers = {"tokens_ptr": "*i64", "live_ptr": "*i1", "stats_ptr": f"*{total}", "coefficients_ptr": f"*{total}"}
    pointers |= {"s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}"}
    pointers["out_ptr"] = f"*{total}" if "HAS_LIVE" in constants else f"*{dtype}"
    types, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name], aligned[(i,)] = pointers[name], [["tt.divisibility", 16]]
        else:
            types[name] = "i32" if name == "V" or name.endswith("_stride") else "fp64"
    return types, aligned


def compiled(kernel, arch: int, dtype: str, constants: dict) -> dict:
    capped = constants["S_CAPPED"] or constants["T_CAPPED"]
    shape = _triton_rows.tile_shape(VOCABULARY, DTYPES[dtype], capped)
    constants = {**constants, "BLOCK": shape["BLOCK"]}
    types, aligned = signature(kernel, dtype, constants)
    source = ASTSource(kernel, types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": shape["num_warps"]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        output = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, shared, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", output).groups()
    )
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": dtype,
        "variant": {k: v for k, v in constants.items() if k in ("KIND", "S_CAPPED", "BLOCK")},
        "registers": registers,
        "spill_bytes": stack + local,
        "shared": shared,
    }


def rows(arch: int, everything: bool):
    small = "fp16" if arch < 80 else "bf16"
    dtypes = [d for d in DTYPES if d != "bf16" or arch >= 80] if everything else [small, "fp32"]
    for dtype, kind, capped in itertools.product(dtypes, (0, 1, 2) if everything else (1, 2), (False, True)):
        yield from variant(arch, dtype, kind, capped, full=True)
        if everything:
            yield from variant(arch, dtype, kind, capped, full=False)
    yield from variant(arch, small, 0, False, full=False)


def variant(arch: int, dtype: str, kind: int, capped: bool, full: bool):
    shared = {"KIND": kind, "ENTROPY": full, "HAS_TOKENS": full, "S_CAPPED": capped, "T_CAPPED": capped}
    yield compiled(_triton_rows._statistics_kernel, arch, dtype, {**shared, "HAS_LIVE": full})
    yield compiled(_triton_rows._gradient_kernel, arch, dtype, shared)


if __name__ == "__main__":
    archs = [int(x) for x in sys.argv[1:] if x != "--all"]
    print(json.dumps([row for arch in archs for row in rows(arch, "--all" in sys.argv)]))
