"""What the row kernels become on GPUs that are not here: registers, spills, load widths, and projected times.

    python -m bench.architectures [--arch 70 90] [--smoke]

Compiles every kernel for all eight architectures, with no GPU and without TRITON_INTERPRET. Last line of the output:
one JSON document. `rows`: {kernel, arch, dtype, variant, registers, spill_bytes (stack and local memory a thread),
shared, loads (bits -> instructions), load_128_share}. `projections`: the times of V100, A100, H100 and H200 at their
published limits, from bytes and FLOPs: projection, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from mskd_kernels import _triton_rows
from mskd_kernels._inputs import accumulate_dtype
from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._plan import Chip, plan
from mskd_kernels._row_op import COLUMNS, Coefficients, Objective, Policy, RowOp, Side
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from bench.harness import RESULTS, Row, environment, read_results, table
from bench.kl_cases import Case
from bench.kl_kernel import GPU_SHAPES
from mskd.store.files import write_json

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
TOKENS, VOCABULARY = 4096, 50257
KINDS = (*DIVERGENCES, None)
LOADS = "loads are counted in the PTX: the bundled disassembler (CUDA 13) knows no sm_70"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled for: dtype of both logits, kind, soft-caps, and whether rows are aligned alike."""

    arch: int
    dtype: str
    kind: str | None
    capped: bool = False
    wide: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind or 'no teacher'}{', soft-cap' if self.capped else ''}{'' if self.wide else ', unaligned'}"


@dataclass(frozen=True)
class Gpu:
    """A GPU's published limits: memory in bytes/s, 16-bit tensor cores in FLOP/s."""

    name: str
    bandwidth: float
    flops: float
    chip: Chip


GPUS = (  # data sheets: V100 SXM2, A100 SXM 80 GB, H100 SXM, H200 SXM; dense FLOPs
    Gpu("V100", 0.9e12, 125e12, Chip((7, 0), 80, 6 * 2**20)),
    Gpu("A100", 2.039e12, 312e12, Chip((8, 0), 108, 40 * 2**20)),
    Gpu("H100", 3.35e12, 989e12, Chip((9, 0), 132, 50 * 2**20)),
    Gpu("H200", 4.8e12, 989e12, Chip((9, 0), 132, 50 * 2**20)),
)


def variants(archs: Sequence[int], everything: bool) -> list[Variant]:
    """Every kind and dtype on each architecture, one 16-bit dtype; or only what is used most and what is heaviest.

    sm_75 is much like 70, and 89 like 86: there the short list has a kind of two passes that compiles faster.
    """
    found = []
    for arch in archs:
        small = "fp16" if arch < 80 else "bf16"
        light = arch in (75, 89) and not everything
        heaviest = Variant(arch, small, "tvd") if light else Variant(arch, small, "skew_reverse_kl", capped=True)
        found += [Variant(arch, small, "reverse_kl"), heaviest]
        if everything:
            found += [Variant(arch, d, k, c) for d in (small, "fp32") for k in KINDS for c in (False, True)]
            found += [Variant(arch, "fp64", k, c) for k in ("reverse_kl", "skew_reverse_kl") for c in (False, True)]
            found += [Variant(arch, small, k, wide=False) for k in ("reverse_kl", "skew_reverse_kl")]
    return list(dict.fromkeys(found))


def launches(variant: Variant, rows: int = TOKENS, vocabulary: int = VOCABULARY) -> Iterator[_triton_rows.Launch]:
    """What the package would launch for a variant, on tensors without memory."""
    dtype, kind = DTYPES[variant.dtype], None if variant.kind is None else DIVERGENCES[variant.kind]
    storage = torch.empty(rows * (vocabulary + 16), dtype=dtype, device="meta")
    s, t = (storage[i : i + rows * vocabulary].view(rows, vocabulary) for i in (0, 0 if variant.wide else 1))
    total = accumulate_dtype(s)

    def a_token(of: torch.dtype = total) -> torch.Tensor:
        return torch.empty(rows, dtype=of, device="meta")

    side = Side(1.0, 30.0) if variant.capped else Side()
    op = RowOp(kind, "triton", 1.0, side, side, entropy=True)
    terms = torch.empty(rows, 1, 2, dtype=total, device="meta") if _triton_rows.two_passes(op) else None
    stats = torch.empty(rows, COLUMNS, dtype=total, device="meta")
    tokens, live, teacher = a_token(torch.int64), a_token(torch.bool), None if kind is None else t
    chip = Chip((variant.arch // 10, variant.arch % 10), 1, 2**30)  # an L2 in which every row fits
    chosen = plan(rows, vocabulary, dtype.itemsize, chip, _triton_rows.heavy(op, total))
    for parts in (1, 2):
        split = chosen._replace(parts=parts)
        yield from _triton_rows.statistics_launches(op, s, teacher, tokens, live, stats, stats, terms, split)
        terms = None
    coefficients = Coefficients(None if kind is None else a_token(), a_token(), a_token())
    yield _triton_rows.gradient_launch(op, s, teacher, tokens, stats, coefficients, s, chosen.gradient)
    assert chosen.fused is not None
    policy = Policy(a_token(), a_token(), a_token(), 0.2, True, True)
    divisor = torch.empty((), dtype=total, device="meta")
    objective = Objective(0.0 if kind is None else 1.0, 1.0, policy, divisor)
    flags = a_token(torch.bool)
    yield _triton_rows.fused_launch(
        op, s, teacher, tokens, live, objective, stats, a_token(), flags, s, chosen.fused, chosen.programs
    )
    yield _triton_rows.scale_launch(s, divisor, chip.processors)


def compiled(variant: Variant) -> list[Row]:
    return [_row(variant, launch) for launch in launches(variant)]


def _row(variant: Variant, launch: _triton_rows.Launch) -> Row:
    target = GPUTarget("cuda", variant.arch, 32)
    bound = dict(zip(launch.kernel.arg_names, _bound(launch, target), strict=True))
    constants = {name: value for name, (kind, value) in bound.items() if kind == "constexpr"}
    assert all(special is None for name, (_, special) in bound.items() if name not in constants), bound
    types = {name: kind for name, (kind, _) in bound.items()}
    source = ASTSource(launch.kernel, types, constants, {})
    binary = triton.compile(source, target=target, options=launch.options)
    loads = _loads(binary.asm)
    return {
        "kernel": launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        "arch": variant.arch,
        "dtype": variant.dtype,
        "variant": variant.name + (", split" if constants.get("WHOLE") is False else ""),
        "block": constants.get("BLOCK", 0),
        "warps": launch.warps,
        **_resources(binary.asm["cubin"]),
        "loads": {str(bits): count for bits, count in sorted(loads.items())},
        "load_128_share": _share(variant, constants, loads, launch.warps),
    }


def _bound(launch: _triton_rows.Launch, target: GPUTarget) -> list[tuple[str, Any]]:
    """What Triton itself makes of the arguments of a launch: (type, what it specialises) or ("constexpr", value)."""
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, make_backend(target))
    return bind(**launch.arguments)[1]


def cache_key(launch: _triton_rows.Launch, arch: int) -> str:
    """The key under which Triton looks for the binary of a launch on such a GPU; a new key is a compilation."""
    target = GPUTarget("cuda", arch, 32)
    options = make_backend(target).parse_options(launch.options)
    return compute_cache_key({}, _bound(launch, target), options)


def _resources(cubin: bytes) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", output)
    assert found, output
    registers, stack, shared, local = map(int, found.groups())
    return {"registers": registers, "spill_bytes": stack + local, "shared": shared}


def _loads(asm: dict[str, Any]) -> Counter[int]:
    """Bits a thread -> global load instructions, in the PTX."""
    found = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", asm["ptx"])
    return Counter(int(lanes or 1) * int(bits) for lanes, bits in found)


def _share(variant: Variant, constants: dict[str, Any], loads: Counter[int], warps: int) -> float | None:
    """The share of a row of 50257 that 128-bit loads bring: its full tiles, if they cover one tile of each side."""
    if "BLOCK" not in constants:
        return None
    block, sides = constants["BLOCK"], 1 if constants.get("TERMS") is None else 2
    tile = sides * block * DTYPES[variant.dtype].itemsize
    return round(min(1.0, loads[128] * 16 * 32 * warps / tile) * (VOCABULARY // block * block) / VOCABULARY, 3)


def compile_all(chosen: Sequence[Variant], processes: int | None = None) -> list[Row]:
    """Rows of all variants, in their order, compiled side by side."""
    processes = max(1, min(processes or os.cpu_count() or 1, os.cpu_count() or 1, len(chosen)))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compiled, chosen) for row in rows]


def projections() -> list[Row]:
    """bench.kl_kernel's shapes at each GPU's limits. Logits read twice where the fused kernel does not run."""
    rows = []
    for gpu in GPUS:
        for shape in GPU_SHAPES:
            case = Case.parse(shape, torch.float16)
            times = _seconds(gpu, case)
            rows.append({"gpu": gpu.name, "shape": case.shape, "dtype": "fp16", "projection": "not measured"} | times)
    return rows


def _seconds(gpu: Gpu, case: Case) -> Row:
    size = case.dtype.itemsize
    if case.hidden is None:
        fused = plan(case.n, case.v, size, gpu.chip).fused is not None
        moved, flops = (3 if fused else 5) * case.n * case.v * size, 0.0
    else:
        hs, ht = case.hidden
        moved = 10 * case.n * case.v + case.minimal_bytes
        flops = (6.0 * hs + 2.0 * ht) * case.n * case.v
    ms = 1e3 * (moved / gpu.bandwidth + flops / gpu.flops)
    return {"bytes": moved, "flops": flops, "ms": ms}


def compared(rows: Sequence[Row], folder: Path) -> list[Row]:
    """The projections, with the ratio to the time of a result file of that GPU, and whether it is off by over 25 %."""
    measured: dict[tuple[str, str], tuple[str, float]] = {}
    for path in sorted(folder.glob("*.json")) if folder.exists() else []:
        for row in read_results(path)["rows"]:
            if row["benchmark"] == "kl_kernel" and row["provider"].startswith("ours triton") and "ms_p50" in row:
                key = row["shape"], row["dtype"]
                measured[path.stem + key[0], key[1]] = path.stem, row["ms_p50"]
    found = []
    for row in rows:
        own = [
            ms for (name, dtype), (stem, ms) in measured.items()
            if dtype == row["dtype"] and row["gpu"].lower() in stem.lower() and name == stem + row["shape"]
        ]  # fmt: skip
        ratio = row["ms"] / min(own) if own else None
        found.append(row | ({} if ratio is None else {"projected_over_measured": ratio, "off": abs(ratio - 1) > 0.25}))
    return found


COMPILED = {
    name: (lambda row, n=name: str(row[n])) for name in ("kernel", "arch", "dtype", "variant", "block", "warps")
}
COMPILED |= {name: (lambda row, n=name: str(row[n])) for name in ("registers", "spill_bytes", "shared")}
COMPILED |= {"128-bit": lambda row: "-" if row["load_128_share"] is None else f"{row['load_128_share']:.0%}"}
PROJECTED = {
    "projection, not measured": lambda row: row["gpu"],
    "shape": lambda row: row["shape"],
    "ms": lambda row: f"{row['ms']:.3g}",
    "projected / measured": lambda row: (
        f"{row['projected_over_measured']:.2f}{' OFF' if row['off'] else ''}" if "off" in row else "-"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.architectures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--smoke", action="store_true", help="only the variants that need most registers")
    parser.add_argument("--processes", type=int, help="that compile side by side; default: the CPU's cores")
    parser.add_argument("--out", type=Path, help="write the document to this file too")
    options = parser.parse_args(arguments)
    if _triton_rows.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted; unset it")
    if not CUOBJDUMP.exists():
        parser.error(f"this triton brings no {CUOBJDUMP.name}: registers and spills cannot be read")
    rows = compile_all(variants(options.arch, not options.smoke), options.processes)
    projected = compared(projections(), RESULTS)
    print(table(rows, COMPILED) + f"\n{LOADS}", table(projected, PROJECTED), sep="\n\n", flush=True)
    run = environment(torch.device("cpu"))
    document = {"benchmark": "architectures", "variants": "short list" if options.smoke else "all", "run": run}
    document |= {"note": LOADS, "rows": rows, "projections": projected}
    if options.out is not None:
        write_json(options.out, document)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
