"""mskd.config.hardware: what is chosen for every compute capability, why, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from chain_setup import environment

from mskd.config import ConfigError, bf16
from mskd.config.hardware import Gpu, Probe, detect, probe

NAMES = {(6, 1): "P40", (7, 0): "V100", (7, 5): "T4", (8, 0): "A100", (8, 9): "L4", (9, 0): "H100", (10, 0): "B200"}


def machine(*capabilities: tuple[int, int], flash: bool = False, rank: int = 0) -> Probe:
    gpus = tuple(Gpu(NAMES[c], c, 16 * 2**30) for c in capabilities)
    return Probe(
        gpus, "some CPU", 8 * 2**30, flash_attn_installed=flash, local_rank=rank, bf16_speedup=lambda cpu, flags: 1.0
    )


@pytest.mark.parametrize(
    ("capability", "mixed", "dtype", "attention", "llm_int8"),
    [
        ((7, 0), "fp16", torch.float16, "sdpa", False),
        ((7, 5), "fp16", torch.float16, "sdpa", True),
        ((8, 0), "bf16", torch.bfloat16, "flash_attention_2", True),
        ((8, 9), "bf16", torch.bfloat16, "flash_attention_2", True),
        ((9, 0), "bf16", torch.bfloat16, "flash_attention_2", True),
        ((10, 0), "bf16", torch.bfloat16, "flash_attention_2", True),
    ],
)
def test_choices_of_each_gpu(capability, mixed, dtype, attention, llm_int8):
    hardware = detect(facts=machine(capability, flash=True))
    assert hardware.device == torch.device("cuda", 0)
    assert (hardware.name, hardware.capability, hardware.memory_bytes) == (NAMES[capability], capability, 16 * 2**30)
    assert (hardware.mixed_precision, hardware.teacher_dtype) == (mixed, dtype)
    assert (hardware.attention, hardware.llm_int8) == (attention, llm_int8)
    assert set(hardware.reasons) == {"device", "precision", "teacher", "int8", "attention"}
    assert all("\n" not in reason for reason in hardware.reasons.values())


def test_a_machine_without_gpu_computes_in_fp32():
    hardware = detect(facts=machine())
    assert (hardware.device.type, hardware.capability, hardware.memory_bytes) == ("cpu", None, 8 * 2**30)
    assert (hardware.mixed_precision, hardware.teacher_dtype, hardware.attention) == ("no", torch.float32, "sdpa")
    assert hardware.llm_int8
    assert detect("cpu", "bf16", facts=machine()).teacher_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("speedup", "says"),
    [
        (2.46, "in bf16 was 2.5 times as fast here, so train.precision = 'bf16' is worth a try"),
        (1.04, "in bf16 was about as fast here (1.0 times)"),
        (0.2, "in bf16 took 5.0 times as long here"),
    ],
)
def test_what_bf16_brings_on_a_cpu_is_said_as_it_was_timed(speedup, says):
    def timed(cpu, flags):
        assert (cpu, flags) == ("some CPU", "fpu avx512_bf16")
        return speedup

    hardware = detect(facts=replace(machine(), cpu_flags="fpu avx512_bf16", bf16_speedup=timed))
    assert hardware.mixed_precision == "no" and says in hardware.reasons["precision"]


def test_bf16_is_timed_once_on_a_machine(tmp_path, monkeypatch):
    asked = []

    def timed():
        asked.append(1)
        return 0.25, 0.1

    def speedup(cpu="some CPU", flags="fpu"):
        bf16.bf16_speedup.cache_clear()  # as in another process
        return bf16.bf16_speedup(cpu, flags)

    monkeypatch.setenv("MSKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bf16, "times", timed)
    try:
        assert [speedup(), speedup()] == [2.5, 2.5] and len(asked) == 1
        (file,) = (tmp_path / "cache").iterdir()
        kept = json.loads(file.read_text())
        assert kept["key"]["cpu"] == "some CPU" and (kept["fp32_ms"], kept["bf16_ms"]) == (250, 100)
        for text in ("", "[]", "{", '{"speedup": "x"}', json.dumps(kept | {"speedup": math.nan}), "[" * 10**5):
            file.write_text(text)
            before = len(asked)
            assert speedup() == 2.5 and len(asked) == before + 1
        before = len(asked)
        assert speedup(cpu="another") == speedup(flags="fpu amx") == 2.5 and len(asked) == before + 2
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        assert speedup() == 2.5 and len(asked) == before + 3
        (tmp_path / "file").touch()
        for nowhere in (tmp_path / "file", "/proc/nowhere", "~nosuchuser/x"):  # no folder can be made there
            monkeypatch.setenv("MSKD_CACHE", str(nowhere))
            before = len(asked)
            assert [speedup(), speedup()] == [2.5, 2.5] and len(asked) == before + 2
            assert bf16.bf16_speedup("some CPU", "fpu") == 2.5 and len(asked) == before + 2  # once a process
    finally:
        bf16.bf16_speedup.cache_clear()


def test_timing_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fp32, in_bf16 = bf16.times()
    assert 0 < fp32 < 10 and 0 < in_bf16 < 10 and torch.equal(torch.get_rng_state(), before)


def test_wishes_are_granted():
    facts = machine((8, 0), (9, 0), flash=True, rank=1)
    assert detect(facts=facts).device == torch.device("cuda", 1)
    assert detect(facts=facts).name == "H100"
    assert detect("cpu", facts=facts).device.type == "cpu"
    assert detect("cuda", "fp16", "eager", facts=facts).mixed_precision == "fp16"
    fp32 = detect("cuda", "fp32", facts=facts)
    assert (fp32.mixed_precision, fp32.teacher_dtype, fp32.attention) == ("no", torch.float32, "sdpa")
    assert detect(facts=machine((8, 0))).attention == "sdpa"


def test_a_gpu_that_is_too_old_is_left_alone_with_its_reason():
    hardware = detect(facts=machine((6, 1)))
    assert hardware.device.type == "cpu"
    assert "sm_61" in hardware.reasons["device"]


@pytest.mark.parametrize(
    ("wishes", "facts", "message"),
    [
        ({"device": "cuda"}, machine(), "device = 'cuda' was asked for, but torch sees none"),
        ({"device": "cuda"}, machine((6, 1)), "sm_61; mskd needs sm_70"),
        ({"device": "tpu"}, machine(), "allowed: auto, cpu, cuda"),
        ({"precision": "bf16"}, machine((7, 0)), "'bf16' needs sm_80 or newer, V100 is sm_70"),
        ({"precision": "fp16"}, machine(), "'fp16' needs a GPU"),
        ({"precision": "int4"}, machine(), "allowed: auto, fp32, bf16, fp16"),
        ({"attention": "flash_attention_2"}, machine((8, 0)), "flash-attn is not installed"),
        ({"attention": "flash_attention_2"}, machine((7, 5), flash=True), "needs sm_80 or newer, T4 is sm_75"),
        ({"attention": "flash_attention_2"}, machine(flash=True), "needs a CUDA GPU"),
        ({"attention": "flash_attention_2", "precision": "fp32"}, machine((8, 0), flash=True), "16 bits"),
        ({"attention": "magic"}, machine(), "allowed: auto, sdpa, flash_attention_2, eager"),
        ({}, machine((8, 0), rank=1), "process 1 of this machine has no GPU of its own: torch sees 1"),
    ],
)
def test_wishes_that_cannot_be_granted(wishes, facts, message):
    with pytest.raises(ConfigError) as error:
        detect(**wishes, facts=facts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_this_machine_can_be_probed():
    facts = probe()
    assert facts.cpu_name
    assert facts.cpu_memory_bytes > 2**28
    assert len(facts.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert detect() == detect()


def test_freed_memory_is_kept_for_the_next_tensor():
    code = (
        "import resource, torch; from mskd.config.hardware import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(8): torch.ones(2**24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); given_back = faults(); can = keep_freed_memory(); faults(); print(int(can), given_back, faults())"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    can, given_back, kept = map(int, result.stdout.split())
    if not can:
        pytest.skip("this system's C library is not glibc")
    # A fault for every page of eight times 64 MiB: of 4 KiB, or of 2 MiB where transparent huge pages are always on.
    assert given_back >= 8 * 32 and kept < given_back / 10
