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


@pytest.fixture(scope="module")
def setting(tiny_llama_folder, tmp_path_factory):
    """A configuration file that saves after every step, and the weights of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    base = tree(tiny_llama_folder, write_rows(folder / "rows.jsonl"))
    base["run"]["save_every_s"] = 0.0
    (folder / "tiny.toml").write_text(to_toml(parse(base)))
    started = time.monotonic()
    mskd("distill", folder / "tiny.toml", "--out", folder / "whole", check=True)
    return folder / "tiny.toml", weights(folder / "whole"), time.monotonic() - started


def start(file, out):
    command = [sys.executable, "-m", "mskd", "distill", str(file), "--out", str(out)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_work(out, process):
    """Until the process has begun a node: start-up takes most of a small run, and killing that would test little."""
    while process.poll() is None and not list(out.glob("models/*/lock")):
        time.sleep(0.02)


def kill_and_resume(setting, out, times, generator):
    file, expected, _ = setting
    killed = 0
    for _ in range(times):
        process = start(file, out)
        wait_for_work(out, process)
        time.sleep(generator.uniform(0, 4.0))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= times // 2, "the run ended before it was killed; it is too short for this test"
    assert mskd("distill", file, "--out", out).returncode == 0
    assert weights(out) == expected
    assert not list(out.rglob(".tmp-*"))


def test_killed_five_times_ends_with_the_same_bits(setting, tmp_path):
    kill_and_resume(setting, tmp_path / "out", 5, random.Random(0))


@pytest.mark.slow
def test_killed_fifty_times_ends_with_the_same_bits(setting, tmp_path):
    for i in range(10):
        kill_and_resume(setting, tmp_path / str(i), 5, random.Random(i + 1))


@pytest.mark.parametrize("place", ["mskd.rollout._decode", "mskd.hop.backward", "mskd.checkpoint.file_digest"])
def test_killed_inside_a_rollout_a_step_and_a_save(setting, tmp_path, place):
    """The process kills itself at the n-th call of a function, so that the place is sure to be hit."""
    file, expected, _ = setting
    out = tmp_path / "out"
    module, _, name = place.rpartition(".")
    code = (
        "import importlib, os, signal, sys\n"
        f"module = importlib.import_module('{module}'); real = module.{name}; left = [int(sys.argv[1])]\n"
        "def dying(*args, **kwargs):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **kwargs)\n"
        f"module.{name} = dying\n"
        "import mskd; mskd.distill(mskd.load(sys.argv[2]), sys.argv[3])\n"
    )
    for call in (1, 4):
        result = subprocess.run(
            [sys.executable, "-c", code, str(call), str(file), str(out)],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert mskd("distill", file, "--out", out).returncode == 0
    assert weights(out) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_leaves_and_the_run_goes_on(setting, tmp_path, number, code):
    file, expected, _ = setting
    out = tmp_path / "out"
    process = start(file, out)
    while process.poll() is None and not list(out.glob("hops/*/metrics.jsonl")):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.strip().splitlines()[-1].startswith("mskd: stopped, the state is saved")
    assert "Traceback" not in err
    result = mskd("distill", file, "--out", out)
    assert result.returncode == 0 and weights(out) == expected


def test_metrics_of_a_resumed_run_equal_those_of_an_uninterrupted_one(setting, tmp_path):
    file, _, _ = setting
    out = tmp_path / "out"
    process = start(file, out)
    while process.poll() is None and not list(out.glob("hops/*/state/*.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert mskd("distill", file, "--out", out).returncode == 0
    for folder in out.glob("hops/*"):
        lines = [read_metrics(root / "hops" / folder.name) for root in (out, file.parent / "whole")]
        assert lines[0] == lines[1]


def read_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


def test_two_processes_on_one_run_the_second_refuses(setting, tmp_path):
    file, expected, _ = setting
    out = tmp_path / "out"
    first = start(file, out)
    wait_for_work(out, first)
    second = mskd("distill", file, "--out", out)
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) == 1 and f"process {first.pid}" in second.stderr
    first.communicate()
    assert first.returncode == 0 and weights(out) == expected


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
