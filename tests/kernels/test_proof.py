"""The proof at first use: asked once, kept, shared by processes; every failure ends in torch, with the reason.

Triton's interpreter stands for the GPU where there is none. Where only the keeping is tested, a few lines of Python
stand for the process that proves.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mskd_kernels
import pytest
import torch
from kernel_cases import logits
from mskd_kernels import Proof, _backend, _rows, _triton_kernels, _triton_rows, prove, state
from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._plan import Chip
from mskd_kernels._row_op import RowOp, Side
from mskd_kernels.proof import first_use, kept, prover
from mskd_kernels.proof.timings import Size, Timing
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
GPU = "Triton's interpreter" if DEVICE == "cpu" else torch.cuda.get_device_name(DEVICE)
KERNELS = Path(mskd_kernels.__file__).parents[1]
HEAD = (
    "import json, os, signal, sys, time\ndef say(**x): print(json.dumps({'format': 'mskd-proof-1', **x}), flush=True)\n"
)
RIGHT = "say(case='one'); say(done=3, gpu='a GPU', table=[[2, 1, 50257, 4096, 900.0, 300.0, 200.0]])"
WRONG = "say(case='jsd, split'); say(wrong='the gradient of row 3 is 1 and should be 2', kernel='gradient')"
NO_COMPILER = "say(case='one'); say(unable='RuntimeError: Failed to find C compiler'); sys.exit(2)"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, and nothing known."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MSKD_CACHE", str(folder))
    for name in ("MSKD_KERNELS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(first_use, "_known", {})
    return folder / "kernels"


@pytest.fixture
def proving(monkeypatch, tmp_path):
    """proving(code) puts the code in place of the process that proves; proving.runs() counts how often it ran."""
    log = tmp_path / "runs"

    def proving(code: str) -> None:
        mark = f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"

        def command(device, subject, timed, timeout):
            options = [str(device), subject, "timed" if timed else "untimed"]
            return [sys.executable, "-S", "-c", HEAD + mark + code, *options]

        monkeypatch.setattr(prover, "command", command)

    proving.runs = lambda: log.read_text().splitlines() if log.exists() else []
    return proving


def forget(monkeypatch) -> None:
    """As a new process."""
    monkeypatch.setattr(first_use, "_known", {})


# Proven once ----------------------------------------------------------------------------------------------------------


def test_kernels_are_proven_in_a_process_of_their_own_and_once(monkeypatch, cache):
    """Nothing stands for anything here, but the interpreter for the GPU."""
    found = state(DEVICE, "logprobs+softcap")
    cases = 3 if DEVICE == "cpu" else "1[05]"
    assert found.passed and re.search(f"proven on {GPU}: {cases} cases against float64", found.why), found.why
    (record,) = cache.glob("*.json")
    assert json.loads(record.read_text())["key"]["sources"] == kept._sources()
    forget(monkeypatch)
    monkeypatch.setattr(prover, "command", lambda *given: ["false"])
    assert state(DEVICE, "logprobs+softcap") == found


def test_what_was_measured_is_kept_and_said(monkeypatch, proving, cache, caplog):
    proving("print('a driver says hello'); print('{}'); print('[1]'); " + RIGHT)
    found = state(DEVICE)
    assert found.table == (Timing(Size(2, 1, 50257, 4096), 900.0, 300.0, 200.0),)
    assert found.why.endswith("4096 x 50257 logits of 16 bits: torch 0.9 ms, split 0.3 ms, fused 0.2 ms")
    assert state(DEVICE) is found
    (waiting,) = caplog.messages
    assert waiting == f"proving the Triton losses (core) on {GPU}, once: a minute, at most 120 s"
    forget(monkeypatch)
    assert state(DEVICE) == found and state(DEVICE).digest == found.digest
    assert proving.runs() == [f"{DEVICE} core timed"]
    assert state(DEVICE, "tvd").passed and proving.runs()[1:] == [f"{DEVICE} tvd untimed"]  # only the core is timed
    assert found.digest != found._replace(table=()).digest != found._replace(passed=False).digest
    assert not list(cache.glob("*.json.*"))


@pytest.mark.parametrize("name", ["gpu", "capability", "processors", "driver", "torch", "cuda", "triton", "sources"])
def test_another_gpu_driver_torch_triton_or_kernel_is_proven_anew(monkeypatch, proving, name):
    proving(RIGHT)
    key = kept.key_of(torch.device(DEVICE))
    monkeypatch.setattr(first_use, "key_of", lambda device: key)
    state(DEVICE)
    forget(monkeypatch)
    monkeypatch.setattr(first_use, "key_of", lambda device: key | {name: "another"})
    state(DEVICE)
    assert len(proving.runs()) == 2


@pytest.mark.parametrize(
    ("says", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\nGCC 12.3.0",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build  (dvs-builder)", "580.65"),
        ("", None),
    ],
)
def test_the_version_of_the_driver(says, version):
    assert kept.driver_of(says) == version


def test_a_gpu_is_asked_for_in_its_own_words(monkeypatch, proving):
    """A pretended A100 behind the index that is current."""
    found = SimpleNamespace(name="A100", major=8, minor=0, multi_processor_count=108)
    asked = {
        "is_available": True,
        "is_current_stream_capturing": False,
        "current_device": 1,
        "get_device_properties": found,
    }
    for name, answer in asked.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(_triton_kernels, "INTERPRETED", False)
    key = kept.key_of(torch.device("cuda:1"))
    assert (key["gpu"], key["capability"], key["processors"]) == ("A100", [8, 0], 108)
    proving(RIGHT)
    assert state("cuda").passed and state("cuda:1") is state("cuda") and proving.runs() == ["cuda:1 core timed"]
    assert state("cuda:0").passed and len(proving.runs()) == 1  # another GPU of the same model
    assert mskd_kernels.backend_for("cuda") == ("triton", state("cuda").why)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in state("cuda:2").why


def test_a_record_that_is_not_ours_is_proven_anew(monkeypatch, proving, cache):
    proving(RIGHT)
    found = state(DEVICE)
    (record,) = cache.glob("*.json")
    good = json.loads(record.read_text())
    bad = ["", "[]", "{}", json.dumps(good | {"format": "other"}), json.dumps(good | {"table": [[1, 2]]})]
    for number, text in enumerate(bad, 2):
        record.write_text(text)
        forget(monkeypatch)
        assert state(DEVICE) == found and len(proving.runs()) == number, text


def test_proven_anew_when_asked_for(monkeypatch, proving, cache):
    proving(WRONG)
    with pytest.warns(RuntimeWarning, match="stay off"):
        assert not state(DEVICE).passed
    proving(RIGHT)
    assert prove(DEVICE).passed and state(DEVICE).passed and len(proving.runs()) == 2
    forget(monkeypatch)
    monkeypatch.setattr(first_use, "_STARTED", time.time())
    monkeypatch.setenv("MSKD_KERNELS", "retest")
    assert state(DEVICE).passed and state(DEVICE).passed and len(proving.runs()) == 3  # once in a process


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of -inf - -inf
def test_a_wrong_kernel_stays_off_and_is_named_once(monkeypatch, proving):
    proving(WRONG)
    sentence = "the gradient kernel is wrong in the case jsd, split: the gradient of row 3 is 1 and should be 2"
    for _ in range(2):  # in a second process from what is kept
        with pytest.warns(RuntimeWarning, match=sentence) as said:
            assert not state(DEVICE).passed and not state(DEVICE).passed
        assert len(said) == 1 and "\n" not in str(said[0].message)
        forget(monkeypatch)
    assert len(proving.runs()) == 1
    s, t = logits(2, 10)
    assert mskd_kernels.reverse_kl(s, t, backend="triton").shape == (2,)  # asked for is obeyed
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not state(DEVICE).passed  # the first process has said it


def test_a_kernel_that_hangs_is_ended_in_time(monkeypatch, proving, tmp_path):
    """With all that it started."""
    pids = tmp_path / "pids"
    proving(
        "say(case='tvd, fused'); say(kernel='fused'); import subprocess; child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(60)"
    )
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match="the proof was ended after 5 s in the fused kernel in the case tvd, fused"):
        assert not prove(DEVICE, timeout=5).passed  # it must have begun by then, on a busy machine too
    assert time.monotonic() - start < 40  # not the 60 that it would sleep
    assert not [pid for pid in pids.read_text().split() if running(int(pid))]
    proving(RIGHT)
    forget(monkeypatch)
    assert state(DEVICE).passed  # what was slow today is tried again


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kernel_that_kills_its_process(monkeypatch, proving):
    proving("say(case='jsd, parts'); say(kernel='terms'); os.kill(os.getpid(), signal.SIGSEGV)")
    for _ in range(2):
        with pytest.warns(
            RuntimeWarning, match=r"the proof died \(SIGSEGV\) in the terms kernel in the case jsd, parts"
        ):
            assert not state(DEVICE).passed
        forget(monkeypatch)
    assert len(proving.runs()) == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (NO_COMPILER, "could not be proven: RuntimeError: Failed to find C compiler"),
        (
            "sys.exit('ImportError: no torch')",
            r"died \(exit code 1\) before its first case: ImportError: no torch",
        ),
    ],
)
def test_what_may_be_otherwise_tomorrow_is_not_kept(monkeypatch, proving, code, said):
    proving(code)
    with pytest.warns(RuntimeWarning, match=said):
        assert not state(DEVICE).passed and not state(DEVICE).passed
    assert len(proving.runs()) == 1
    proving(RIGHT)
    forget(monkeypatch)
    assert state(DEVICE).passed


def test_no_python_to_start(monkeypatch):
    monkeypatch.setattr(prover, "command", lambda *given: ["/nowhere/python"])
    with pytest.warns(RuntimeWarning, match="no process could be started to prove them"):
        assert not state(DEVICE).passed


@pytest.mark.parametrize("where", ["file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written(monkeypatch, proving, tmp_path, where):
    """Proven in each process; nothing is timed, so that all of them choose alike."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSKD_CACHE", str(tmp_path / where))
    proving(RIGHT)
    found = state(DEVICE)
    assert found.passed and "cannot be written; set MSKD_CACHE" in found.why
    assert state(DEVICE) is found and proving.runs() == [f"{DEVICE} core untimed"]


# Several processes ----------------------------------------------------------------------------------------------------

PROCESS = """
import sys
from mskd_kernels import state
from mskd_kernels.proof import prover
prover.command = lambda *given: [sys.executable, "-S", "-c", sys.argv[1]]
print(state(sys.argv[2]).passed)
"""


def test_of_two_processes_one_proves(cache, tmp_path):
    log = tmp_path / "runs"
    code = HEAD + f"open({str(log)!r}, 'a').write('x'); time.sleep(2)\n" + RIGHT
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, code, DEVICE], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["True", "True"]
    assert log.read_text() == "x" and len(list(cache.glob("*.json"))) == 1


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on some host"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_taken_over(monkeypatch, proving, cache):
    """While it lives it is waited for, but not for ever."""
    proving(RIGHT)
    record = kept.Record(kept.key_of(torch.device(DEVICE)), "core")
    cache.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-S", "-c", HOLDER, str(record.locked)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(first_use, "_GRACE", 0.0)
    try:
        with pytest.warns(RuntimeWarning, match=f"process {holder.pid} on some host has not finished proving in 1 s"):
            assert not prove(DEVICE, timeout=0.6).passed
        assert not proving.runs()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    forget(monkeypatch)
    assert str(holder.pid) in record.locked.read_text()
    assert state(DEVICE).passed and len(proving.runs()) == 1
    assert f"process {os.getpid()} on" in record.locked.read_text()


def test_who_waits_takes_what_was_found(monkeypatch, proving):
    """Also a failure that is not kept: else each of eight processes would fail anew, one after the other."""
    proving(NO_COMPILER)
    key = kept.key_of(torch.device(DEVICE))
    asked = time.time()
    with pytest.warns(RuntimeWarning):
        state(DEVICE)
    record = kept.Record(key, "core")
    waited = record.read(0.0, asked)
    assert waited is not None and "C compiler" in waited.why
    assert record.read(0.0, time.time()) is None


# Where nothing is proven ----------------------------------------------------------------------------------------------


def test_without_a_gpu(monkeypatch, proving):
    proving(RIGHT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert state("cuda:0") == Proof(False, "no GPU: torch sees no CUDA device for cuda:0")
    monkeypatch.setattr(_triton_kernels, "INTERPRETED", False)
    assert not state("cpu").passed and state("cpu").why.startswith("no GPU: ")
    assert mskd_kernels.backend_for("cpu") == ("torch", _backend.automatic(torch.device("cpu")).why)
    assert not proving.runs()


@pytest.mark.parametrize("busy", ["compiles", "faked", "captured"])
def test_never_while_compiling_faking_or_capturing(monkeypatch, proving, busy):
    proving(RIGHT)
    with monkeypatch.context() as patch:
        mode = FakeTensorMode()
        if busy == "compiles":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        if busy == "captured":
            patch.setattr(first_use, "_indexed", lambda device: torch.device("cuda:0"))
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        if busy == "faked":
            mode.__enter__()
        try:
            found = state(DEVICE)
        finally:
            if busy == "faked":
                mode.__exit__(None, None, None)
    assert not found.passed and busy in found.why and not proving.runs()
    assert state(DEVICE).passed and len(proving.runs()) == 1  # asked again later


def test_what_kernels_auto_takes_is_decided_when_an_op_runs(monkeypatch):
    """Not where torch traces it."""
    asked = []
    monkeypatch.setattr(_backend, "state", lambda *given: asked.append(given))
    assert _backend.check_backend("auto", torch.device("cuda:0")) == "auto" and not asked
    s, t = logits(3, 10)
    compiled = torch.compile(lambda s, t: mskd_kernels.reverse_kl(s, t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(s, t), mskd_kernels.reverse_kl(s, t)) and not asked


# What auto takes ------------------------------------------------------------------------------------------------------


def test_the_wish_of_the_environment(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(_backend, "state", lambda *given: Proof(True, "proven"))
    assert mskd_kernels.backend_for(gpu) == ("triton", "proven")
    monkeypatch.setenv("MSKD_KERNELS", "torch")
    assert mskd_kernels.backend_for(gpu)[0] == "torch" and _backend.check_backend("triton", gpu) == "triton"
    monkeypatch.setenv("MSKD_KERNELS", "triton")
    monkeypatch.setattr(_backend, "state", lambda *given: pytest.fail("asked"))
    assert mskd_kernels.backend_for(gpu)[0] == "triton" and mskd_kernels.backend_for("cpu")[0] == "torch"
    monkeypatch.setenv("MSKD_KERNELS", "fast")
    with pytest.raises(ValueError, match="MSKD_KERNELS='fast' is not known; allowed: auto, torch, triton, retest$"):
        mskd_kernels.backend_for(gpu)


def on_gpu(n: int, v: int, dtype=torch.float16) -> SimpleNamespace:
    """What the choice looks at of logits on a GPU."""
    gpu, size = torch.device("cuda:0"), torch.empty(0, dtype=dtype).element_size()
    return SimpleNamespace(device=gpu, is_cuda=True, dtype=dtype, shape=(n, v), element_size=lambda: size)


@pytest.mark.parametrize("fits", [True, False])
def test_auto_takes_the_fastest_of_what_is_proven(monkeypatch, fits):
    asked, core = [], [Proof(True, "proven", ())]

    def known(device, subject="core"):
        asked.append(subject)
        return core[0] if subject == "core" else Proof(subject == "tvd", "the other kind")

    monkeypatch.setattr(_backend, "state", known)
    monkeypatch.setattr(_triton_rows, "chip_of", lambda device: Chip((9, 0), 132, 50 * 2**20 if fits else 2**20))
    ways = ("fused", "split", "torch")
    s = on_gpu(4096, 50257)
    plain, tvd, capped = (RowOp(DIVERGENCES[k], "auto") for k in ("reverse_kl", "tvd", "jsd"))
    capped = RowOp(capped.kind, "auto", student=Side(1.0, 30.0))
    first = "fused" if fits else "split"
    assert _rows._way(plain, s, s, ways) == first and asked == ["core"]
    assert _rows._way(tvd, s, s, ways) == first and asked[-1] == "tvd"
    assert _rows._way(capped, s, s, ways) == "torch" and asked[-1] == "jsd+softcap"  # not proven
    assert _rows._way(plain, s, on_gpu(4096, 50257, torch.float32), ways) == "torch"  # no proof covers it
    core[0] = Proof(True, "proven", (Timing(Size(2, 1, 50257, 4096), 100.0, 300.0, 200.0),))
    assert _rows._way(plain, s, s, ways) == "torch"
    core[0] = Proof(True, "proven", (Timing(Size(2, 1, 50257, 4096), 900.0, 300.0, 100.0),))
    assert _rows._way(plain, s, s, ways) == "fused" and _rows._way(plain, s, s, ways[1:]) == "split"
    assert _rows._way(RowOp(plain.kind, "triton"), s, s, ways) == first  # asked for: the plan decides
    core[0] = Proof(False, "wrong")
    assert {_rows._way(op, s, s, ways) for op in (plain, tvd)} == {"torch"} and asked[-1] == "core"
    assert _rows._way(RowOp(plain.kind, "triton"), s, s, ways[1:]) == "split"
