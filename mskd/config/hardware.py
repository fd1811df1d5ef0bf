"""What this machine is and what mskd uses on it: device, dtypes, attention, each with its reason.

hardware = detect()                          # what `mskd doctor` prints and every run starts with
hardware = detect("cuda", precision="fp16")  # a wish; ConfigError where this machine cannot grant it
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from mskd_kernels import resolve_backend

from mskd.config.bf16 import bf16_speedup
from mskd.config.problems import ConfigError

MixedPrecision = Literal["no", "bf16", "fp16"]

WORTH_A_TRY = 1.3  # times as fast in bf16, of a CPU's products


@dataclass(frozen=True)
class Generation:
    """One row a GPU generation: from this compute capability on, what it can do."""

    since: tuple[int, int]
    name: str
    bf16: bool
    flash_attention: bool  # flash-attn 2
    llm_int8: bool  # int8 tensor cores, as bitsandbytes' LLM.int8 needs them


GENERATIONS = (  # oldest first; a GPU belongs to the last row that it reaches
    Generation((7, 0), "Volta", bf16=False, flash_attention=False, llm_int8=False),
    Generation((7, 5), "Turing", bf16=False, flash_attention=False, llm_int8=True),
    Generation((8, 0), "Ampere or Ada", bf16=True, flash_attention=True, llm_int8=True),
    Generation((9, 0), "Hopper", bf16=True, flash_attention=True, llm_int8=True),
    Generation((10, 0), "Blackwell", bf16=True, flash_attention=True, llm_int8=True),
)


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def sm(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def generation(self) -> Generation | None:
        """The row of GENERATIONS; None for a GPU that is older than all of them."""
        return next((g for g in reversed(GENERATIONS) if self.capability >= g.since), None)


@dataclass(frozen=True)
class Probe:
    """The facts that `detect` decides from."""

    gpus: tuple[Gpu, ...]
    cpu_name: str
    cpu_memory_bytes: int
    flash_attn_installed: bool
    local_rank: int = 0
    cpu_flags: str = ""
    bf16_speedup: Callable[[str, str], float] = bf16_speedup  # of a CPU by name and flags; asked only where it matters


@dataclass(frozen=True)
class Hardware:
    """The choices for this machine. `reasons` holds one sentence a choice."""

    device: torch.device
    name: str
    capability: tuple[int, int] | None  # None on a CPU
    memory_bytes: int
    mixed_precision: MixedPrecision  # of training, as accelerate takes it; weights stay fp32
    teacher_dtype: torch.dtype  # activations of frozen teachers and of sampling
    attention: Literal["sdpa", "flash_attention_2", "eager"]
    llm_int8: bool  # whether precision = "llm_int8" runs here; "int8" runs everywhere
    reasons: dict[str, str]


def probe() -> Probe:
    """Look at this machine. The process's GPU is that of LOCAL_RANK, as launchers set it."""
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gpus.append(Gpu(p.name, (p.major, p.minor), p.total_memory))
    return Probe(
        gpus=tuple(gpus),
        cpu_name=_cpu("model name") or platform.processor() or platform.machine(),
        cpu_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        flash_attn_installed=importlib.util.find_spec("flash_attn") is not None,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        cpu_flags=_cpu("flags"),
    )


def detect(
    device: str = "auto", precision: str = "auto", attention: str = "auto", *, facts: Probe | None = None
) -> Hardware:
    """Choose device, dtypes and attention for this machine, deterministically.

    device: auto, cpu, cuda. precision, of training: auto, fp32, bf16, fp16. attention: auto, sdpa, flash_attention_2,
    eager. facts: what to decide from, by default `probe()`. Raises ConfigError where a wish cannot be granted: there is
    no silent fallback.
    """
    facts = facts or probe()
    reasons: dict[str, str] = {}
    gpu = _device(device, facts, reasons)
    mixed = _mixed_precision(precision, gpu, facts, reasons)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed]
    reasons["teacher"] = f"frozen models and sampling compute in {str(dtype).removeprefix('torch.')}, as training does"
    generation = gpu.generation if gpu else None
    llm_int8 = gpu is None or (generation is not None and generation.llm_int8)
    reasons["int8"] = "weight-only int8 runs everywhere; " + (
        "LLM.int8 would run here too" if llm_int8 else f"LLM.int8 needs sm_75 or newer, this is {gpu.sm if gpu else ''}"
    )
    return Hardware(
        device=torch.device("cuda", facts.local_rank) if gpu else torch.device("cpu"),
        name=gpu.name if gpu else facts.cpu_name,
        capability=gpu.capability if gpu else None,
        memory_bytes=gpu.memory_bytes if gpu else facts.cpu_memory_bytes,
        mixed_precision=mixed,
        teacher_dtype=dtype,
        attention=_attention(attention, gpu, dtype, facts, reasons),
        llm_int8=llm_int8,
        reasons=reasons,
    )


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ConfigError unless the fused losses run with this `run.backend` on the device.

    With "auto" on a GPU the kernels are proven here, once, before models take its memory.
    """
    try:
        resolve_backend(backend, device)
    except ValueError as e:
        raise ConfigError(f"run.backend = {backend!r}: {e}") from None


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU free, for the next ones; whether the system can.

    glibc gives big blocks back at once and asks for them again, page by page, at the next step: about a tenth of a
    step's time (docs/memory.md). The process then stays as big as it ever was.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    return mallopt is not None and mallopt(M_TRIM_THRESHOLD, -1) == mallopt(M_MMAP_THRESHOLD, 2**30) == 1


def _device(wish: str, facts: Probe, reasons: dict[str, str]) -> Gpu | None:
    """The GPU to use, or None for the CPU."""
    if wish not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {wish!r}; allowed: auto, cpu, cuda")
    if wish == "cpu":
        reasons["device"] = "the CPU, as asked for"
        return None
    if not facts.gpus:
        if wish == "cuda":
            built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
            raise ConfigError(f"device = 'cuda' was asked for, but torch sees none{built}; use 'cpu' or 'auto'")
        reasons["device"] = "the CPU: torch sees no CUDA GPU"
        return None
    if facts.local_rank >= len(facts.gpus):
        raise ConfigError(
            f"process {facts.local_rank} of this machine has no GPU of its own: torch sees {len(facts.gpus)}; "
            "start at most that many processes"
        )
    gpu = facts.gpus[facts.local_rank]
    if gpu.generation is None:
        if wish == "cuda":
            raise ConfigError(f"{gpu.name} is {gpu.sm}; mskd needs sm_70 or newer; use device = 'cpu'")
        reasons["device"] = f"the CPU: {gpu.name} is {gpu.sm}, older than sm_70"
        return None
    reasons["device"] = f"{gpu.name}, {gpu.sm} ({gpu.generation.name}), {gpu.memory_bytes / 2**30:.0f} GiB"
    return gpu


def _mixed_precision(wish: str, gpu: Gpu | None, facts: Probe, reasons: dict[str, str]) -> MixedPrecision:
    if wish not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"precision is {wish!r}; allowed: auto, fp32, bf16, fp16")
    bf16 = gpu is None or (gpu.generation is not None and gpu.generation.bf16)
    if wish == "fp16" and gpu is None:
        raise ConfigError("precision = 'fp16' needs a GPU (its loss scaling does); use fp32 or bf16 on a CPU")
    if wish == "bf16" and not bf16 and gpu:
        raise ConfigError(f"precision = 'bf16' needs sm_80 or newer, {gpu.name} is {gpu.sm}; use fp16 or fp32")
    if wish != "auto":
        reasons["precision"] = f"{wish}, as asked for"
        return "no" if wish == "fp32" else wish  # type: ignore[return-value]
    if gpu is None:
        reasons["precision"] = f"fp32; {_bf16_on(facts)}"
        return "no"
    if bf16:
        reasons["precision"] = f"bf16 over fp32 weights: {gpu.sm} has it at full speed, without loss scaling"
        return "bf16"
    reasons["precision"] = f"fp16 with loss scaling over fp32 weights: {gpu.sm} has no bf16"
    return "fp16"


def _bf16_on(facts: Probe) -> str:
    """What bf16 would bring on this CPU, as it was timed."""
    speedup = facts.bf16_speedup(facts.cpu_name, facts.cpu_flags)
    if speedup >= WORTH_A_TRY:
        return (
            f"a product of matrices in bf16 was {speedup:.1f} times as fast here, "
            "so train.precision = 'bf16' is worth a try: a step gains less than a product"
        )
    if speedup >= 1 / WORTH_A_TRY:
        return f"a product of matrices in bf16 was about as fast here ({speedup:.1f} times)"
    return f"a product of matrices in bf16 took {1 / speedup:.1f} times as long here"


def _attention(
    wish: str, gpu: Gpu | None, dtype: torch.dtype, facts: Probe, reasons: dict[str, str]
) -> Literal["sdpa", "flash_attention_2", "eager"]:
    if wish not in ("auto", "sdpa", "flash_attention_2", "eager"):
        raise ConfigError(f"attention is {wish!r}; allowed: auto, sdpa, flash_attention_2, eager")
    missing = _why_no_flash(gpu, dtype, facts)
    if wish == "flash_attention_2" and missing:
        raise ConfigError(f"attention = 'flash_attention_2' was asked for, but {missing}; use sdpa or auto")
    if wish != "auto":
        reasons["attention"] = f"{wish}, as asked for"
        return wish  # type: ignore[return-value]
    if missing:
        reasons["attention"] = f"torch's SDPA: {missing}"
        return "sdpa"
    reasons["attention"] = "flash-attn 2: it is installed and this GPU runs it"
    return "flash_attention_2"


def _why_no_flash(gpu: Gpu | None, dtype: torch.dtype, facts: Probe) -> str | None:
    if gpu is None:
        return "flash-attn needs a CUDA GPU"
    if gpu.generation is None or not gpu.generation.flash_attention:
        return f"flash-attn needs sm_80 or newer, {gpu.name} is {gpu.sm}"
    if dtype == torch.float32:
        return "flash-attn computes in 16 bits, not in fp32"
    if not facts.flash_attn_installed:
        return "flash-attn is not installed (pip install 'mskd[flash]')"
    return None


def _cpu(field: str) -> str:
    """A field of /proc/cpuinfo, "" where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next((line.partition(":")[2].strip() for line in f if line.startswith(field)), "")
    except OSError:
        return ""
