"""tracking: what stands in metrics.jsonl after logging, kills and resumes; trackers by name; the progress."""

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mskd.config import ConfigError
from mskd.store import progress
from mskd.store.progress import duration
from mskd.training.tracking import Tracker, check_trackers

ROOT = Path(__file__).parents[2]


def read(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def without_time(lines):
    return [{k: v for k, v in x.items() if k != "time" and not k.startswith("perf/")} for x in lines]


def train(folder, first, last, tracker_options=None):
    """Log the steps first to last of two phases of 3 and 5 steps."""
    with Tracker(folder, "teacher>ta", **(tracker_options or {})) as tracker:
        tracker.truncate_after(first - 1)
        for name, start, steps in (("kd", 0, 3), ("minillm", 3, 5)):
            if first > start + steps:
                continue
            tracker.start_phase(name, max(0, first - 1 - start), steps)
            for step in range(max(first, start + 1), min(last, start + steps) + 1):
                metrics = {
                    "train/loss": 1 / step,
                    "train/reverse_kl": torch.tensor(0.5 / step),
                    "perf/tokens_per_s": 9.0,
                }
                tracker.log(metrics, step=step, phase_step=step - start, shown="reverse_kl")
                if step % 4 == 0:
                    tracker.log({"eval/loss": 2.0}, step=step, phase_step=step - start, shown="eval/loss")


def test_lines_are_written_at_once_and_are_valid_json(tmp_path):
    with Tracker(tmp_path / "hop", "h") as tracker:
        tracker.start_phase("kd", 0, 3)
        values = {"a": float("nan"), "b": math.inf, "c": torch.tensor(-math.inf), "d": 0.5, "e": 3, "f": "x", "g": None}
        tracker.log(values, step=1, phase_step=1)
        line = read(tmp_path / "hop")[0]  # before the file is closed
    assert line.pop("time") > 1.6e9
    assert line == {
        "step": 1, "phase_step": 1, "objective": "kd",
        "a": None, "b": None, "c": None, "d": 0.5, "e": 3, "f": "x", "g": None,
    }  # fmt: skip


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", 1, 8)
    whole = without_time(read(tmp_path / "whole"))
    assert [x["step"] for x in whole] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [x["objective"] for x in whole] == ["kd"] * 3 + ["minillm"] * 7
    for killed_at in range(9):
        for saved in range(killed_at + 1):
            folder = tmp_path / f"{killed_at}-{saved}"
            train(folder, 1, killed_at)
            train(folder, saved + 1, 8)
            assert without_time(read(folder)) == whole


@pytest.mark.parametrize("torn", ['{"step": 3', '{"step": 3, "x": 1}', "garbage\n", '["list"]\n', "\x00\x00\n"])
def test_what_a_kill_tore_is_cut_off(tmp_path, torn):
    train(tmp_path, 1, 2)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    with Tracker(tmp_path, "h") as tracker:
        tracker.truncate_after(5)
        assert (tmp_path / "metrics.jsonl").read_text() == whole
        tracker.truncate_after(0)
    assert read(tmp_path) == []


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    class Second:
        is_main_process = False

    train(tmp_path / "second", 1, 8, {"accelerator": Second()})
    assert not (tmp_path / "second").exists() and capsys.readouterr() == ("", "")


# -- trackers -------------------------------------------------------------------------------------


def test_an_unknown_tracker_names_those_that_exist(tmp_path):
    with pytest.raises(ConfigError, match="'tensorbord', which is no tracker; allowed: .*tensorboard.*wandb"):
        Tracker(tmp_path, "h", trackers=["tensorbord"])


def test_a_missing_tracker_names_what_to_install(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match=r"pip install 'mskd\[track\]'"):
        check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(["wandb"])
    check_trackers([])


def test_tensorboard_gets_the_figures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, 1, 8, {"trackers": ["tensorboard"]})
    (file,) = tmp_path.rglob("events.out.tfevents*")
    accumulator = events.EventAccumulator(str(file.parent)).Reload()
    points = [(e.step, e.value) for e in accumulator.Scalars("train/loss")]
    assert points == [(s, pytest.approx(1 / s)) for s in range(1, 9)]


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    class Broken:
        requires_logging_directory = False

        def __init__(self, project):
            raise RuntimeError("no login\nmore lines")

    monkeypatch.setitem(__import__("accelerate.tracking", fromlist=["x"]).LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    with pytest.raises(ConfigError, match="^the tracker 'tensorboard' does not start: no login; [^\n]*$"):
        with Tracker(tmp_path, "h", trackers=["tensorboard"]):
            pass


# -- errors of the disk ---------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_error(tmp_path):
    """A limit on the size of files stands for the full disk: the kernel writes a part of the line, then refuses."""
    code = f"""
import resource, signal
from pathlib import Path
from mskd.training.tracking import Tracker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    with Tracker(Path({str(tmp_path)!r}), "h") as tracker:
        tracker.start_phase("kd", 0, 100)
        for step in range(1, 100):
            tracker.log({{"x": 1.0}}, step=step, phase_step=step)
except OSError as e:
    print(e.errno, e.filename, e.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    number, path, *message = done.stdout.split()
    assert int(number) == errno.EFBIG and path == str(tmp_path / "metrics.jsonl")
    assert " ".join(message).startswith("cannot write the metrics: ")
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(lines) == 300 and not lines.endswith(b"\n")
    with Tracker(tmp_path, "h") as tracker:
        tracker.truncate_after(99)
    steps = [x["step"] for x in read(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and steps


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/full"), Path.mkdir])
def test_what_is_no_file_in_the_place_of_the_metrics_is_an_os_error_at_once(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="cannot write the metrics: no regular file is in its place"):
        with Tracker(tmp_path, "h"):
            pass


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the metrics"):
        with Tracker(tmp_path / "file" / "hop", "h"):
            pass


# -- progress -------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1.7e9 + self.now


def steps(tmp_path, clock, seconds, *, done=0, total=40):
    with Tracker(tmp_path, "teacher>ta") as tracker:
        tracker.start_phase("minillm", done, total)
        for step in range(done + 1, total + 1):
            clock.now += seconds
            metrics = {"train/loss": 0.5, "train/reverse_kl": 0.25, "perf/tokens_per_s": 1234.5}
            tracker.log(metrics, step=step, phase_step=step, shown="reverse_kl")


def test_a_ticker_is_silent_for_ten_seconds_then_says_how_long_it_takes(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    tick = progress.ticker("set.jsonl")
    for done in range(1, 26):
        clock.now += 1.0
        tick(done, 25)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == ["set.jsonl  10/25  0:15 left", "set.jsonl  20/25  0:05 left"]


def test_plain_lines_come_at_most_every_ten_seconds_and_at_the_ends(tmp_path, monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    steps(tmp_path, clock, 1.0)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    first = "teacher>ta  minillm  step 1/40  loss 0.5  reverse KL 0.25  1234 tokens/s  0:39 left"
    assert lines[0] == first
    assert [x.split("step ")[1].split("/")[0] for x in lines] == ["1", "11", "21", "31", "40"]
    assert lines[1].endswith("0:29 left") and lines[-1].endswith("tokens/s")
    steps(tmp_path, clock, 30.0, done=36)
    assert [x.split("  ")[-1] for x in capsys.readouterr().err.splitlines()] == [
        "1:30 left", "1:00 left", "0:30 left", "1234 tokens/s",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140)
    monkeypatch.setattr(progress, "_terminal", lambda: console)
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    steps(tmp_path, clock, 1.0, total=3)
    assert "step 3/3" in stream.getvalue() and "reverse KL 0.25" in stream.getvalue()
    assert "━" in stream.getvalue()
    assert len(read(tmp_path)) == 3


def test_duration():
    assert [duration(x) for x in (0, 7.4, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]
