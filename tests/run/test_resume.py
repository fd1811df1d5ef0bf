"""Killed at any moment and started again, a run ends with the same bits; a stop that is asked for saves and leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from chain_setup import environment, mskd, tree, weights, write_rows

from mskd.config import parse, to_toml
from mskd.store.locks import lock


@pytest.fixture(scope="module")
def setting(tiny_llama_folder, tmp_path_factory):
    """A configuration file that saves after every step; the weights and the seconds of work of a run without a stop."""
    folder = tmp_path_factory.mktemp("resume")
    base = tree(tiny_llama_folder, write_rows(folder / "rows.jsonl"))
    base["run"]["save_every_s"] = 0.0
    (folder / "tiny.toml").write_text(to_toml(parse(base)))
    process = start(folder / "tiny.toml", folder / "whole")
    wait_for_work(folder / "whole", process)
    began = time.monotonic()
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder / "tiny.toml", weights(folder / "whole"), time.monotonic() - began


def start(file, out):
    command = [sys.executable, "-m", "mskd", "distill", str(file), "--out", str(out)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_work(out, process):
    """Until the process holds its run: start-up takes most of a small run, and killing that would test little."""
    lock = out / "runs" / "tiny" / "lock"  # that of a killed process stays, with its number
    while process.poll() is None and not (lock.exists() and lock.read_text() == str(process.pid)):
        time.sleep(0.01)


def same_metrics(out, whole):
    """metrics.jsonl of every hop is the same, apart from times."""

    def read(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]

    for folder in whole.glob("hops/*"):
        assert read(out / "hops" / folder.name) == read(folder)


def kill_and_resume(setting, out, times, generator):
    file, expected, work = setting
    killed = 0
    for _ in range(times):
        process = start(file, out)
        wait_for_work(out, process)
        time.sleep(generator.uniform(0, work / 3))  # of the run's own time, however fast the machine is
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= 2  # the first two at least, since each waits for a third of the work at most
    assert mskd("distill", file, "--out", out).returncode == 0
    assert weights(out) == expected
    assert not list(out.rglob(".tmp-*"))
    same_metrics(out, file.parent / "whole")


def test_killed_three_times_ends_with_the_same_bits(setting, tmp_path):
    kill_and_resume(setting, tmp_path / "out", 3, random.Random(0))


@pytest.mark.slow
def test_killed_fifty_times_ends_with_the_same_bits(setting, tmp_path):
    for i in range(10):
        kill_and_resume(setting, tmp_path / str(i), 5, random.Random(i + 1))


@pytest.mark.parametrize("call", [1, 4])
def test_killed_inside_a_rollout_a_step_and_a_save(setting, tmp_path, call):
    """The process kills itself at the n-th call of a function, so that the place is sure to be hit."""
    file, expected, _ = setting
    out = tmp_path / "out"
    for module, name in (
        ("mskd.sampling.slots", "draw"),
        ("mskd.training.hop", "backward"),
        ("mskd.store.checkpoint", "file_digest"),
    ):
        code = (
            "import importlib, os, signal, sys\n"
            f"module = importlib.import_module('{module}'); real = module.{name}; left = [{call}]\n"
            "def dying(*args, **kwargs):\n"
            "    left[0] -= 1\n"
            "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(*args, **kwargs)\n"
            f"module.{name} = dying\n"
            "import mskd; mskd.distill(mskd.load(sys.argv[1]), sys.argv[2])\n"
        )
        command = [sys.executable, "-c", code, str(file), str(out)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert mskd("distill", file, "--out", out).returncode == 0
    assert weights(out) == expected
    same_metrics(out, file.parent / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_leaves_and_the_run_goes_on(setting, tmp_path, number, code):
    file, expected, work = setting
    out = tmp_path / "out"
    process = start(file, out)
    while process.poll() is None and not list(out.glob("hops/*/metrics.jsonl")):
        time.sleep(0.01)
    time.sleep(work / 30)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert err.strip().splitlines()[-1].startswith("mskd: stopped, the state is saved")
    assert "Traceback" not in err
    result = mskd("distill", file, "--out", out)
    assert result.returncode == 0 and weights(out) == expected


@pytest.mark.parametrize("folder", ["runs/tiny", "hops/ta-from-teacher-*"])
def test_while_another_process_holds_a_run_or_node_this_one_refuses(setting, tmp_path, folder):
    file, _, _ = setting
    (held,) = (file.parent / "whole").glob(folder)
    held = tmp_path / held.relative_to(file.parent / "whole")
    with lock(held):
        result = mskd("distill", file, "--out", tmp_path)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert f"{held} is being worked on by process {os.getpid()}" in last and "Traceback" not in result.stderr
    assert [p.name for p in held.iterdir()] == ["lock"]


def test_a_full_disk_is_one_line_and_loses_nothing(setting, tmp_path):
    file, expected, _ = setting
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        result = mskd("distill", file, "--out", disk)
        assert result.returncode == 2, result.stderr
        lines = result.stderr.strip().splitlines()
        assert "Traceback" not in result.stderr and "No space left on device" in lines[-1]
        shutil.copytree(disk, tmp_path / "roomy")
    finally:
        subprocess.run(["umount", disk], check=True)
    result = mskd("distill", file, "--out", tmp_path / "roomy")
    assert result.returncode == 0 and weights(tmp_path / "roomy") == expected
