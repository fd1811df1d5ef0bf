"""The benchmark's own arithmetic, on clocks that are given: a wrong harness would make every figure wrong."""

import json
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import harness

CPU = torch.device("cpu")


class Clock:
    """Seconds that the test chose for each provider and round; remembers the order of the calls."""

    def __init__(self, seconds):
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.order = []

    def __call__(self, call):
        name = call()
        self.order.append(name)
        return next(self.seconds[name])


def test_interleave_turns_the_order_and_warms_up_outside_the_clock():
    clock, warm = Clock({"a": [1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9]}), []
    calls = {name: lambda name=name: warm.append(name) or name for name in "abc"}
    seconds = harness.interleave(calls, rounds=3, clock=clock, warmup=2)
    assert clock.order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert warm[:6] == list("abcabc") and len(warm) == 6 + 9
    assert seconds == {"a": [1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9]}


def test_figures_pair_a_round_with_the_base_of_the_same_round():
    # The machine becomes slower from round to round: the paired ratio is 1/2 throughout, that of the medians too,
    # but a provider that is slow once has its outlier in p80 only.
    seconds = {"eager": [1.0, 2.0, 4.0, 8.0, 16.0], "ours": [0.5, 1.0, 2.0, 4.0, 12.0]}
    found = harness.figures(seconds, "eager")
    assert found["ours"]["rounds"] == 5 and found["ours"]["base"] == "eager"
    assert [found["ours"][f"ms_p{p}"] for p in (20, 50, 80)] == pytest.approx([900.0, 2000.0, 5600.0])
    assert [found["ours"][f"ratio_p{p}"] for p in (20, 50, 80)] == pytest.approx([0.5, 0.5, 0.55])
    assert found["eager"]["ratio_p50"] == 1.0


@pytest.mark.parametrize("base", [None, "refused"])
def test_figures_without_their_base_have_no_ratio(base):
    assert set(harness.figures({"ours": [1.0]}, base)["ours"]) == {"rounds", "ms_p20", "ms_p50", "ms_p80"}


def test_gate_names_the_wrong_and_the_broken():
    def broken():
        raise RuntimeError("no such kernel\nand a long story")

    calls = {"right": lambda: 1.0, "wrong": lambda: 2.0, "broken": broken}
    wrong = harness.gate(calls, lambda name, x: None if x == 1.0 else f"{x} is not 1")
    assert wrong == {"wrong": "2.0 is not 1", "broken": "RuntimeError: no such kernel"}


def test_peak_memory_counts_what_is_beyond_inputs_and_results():
    x = torch.ones(1000, 1000)

    def three_temporaries_at_once():
        a, b = x + 1, x + 2
        c = a * b  # a, b, c: 3 x 4 MB
        del a, b
        return c, [c[:10]]  # the slice shares c's memory

    for _ in range(2):  # exact, and the same the second time
        assert abs(harness.peak_extra_bytes(three_temporaries_at_once, CPU) - 8_000_000) < 1000


def test_peak_memory_ignores_what_the_call_frees():
    held = [torch.ones(1000, 1000)]

    def swap():
        held.clear()
        return torch.ones(10, 10)

    assert 0 <= harness.peak_extra_bytes(swap, CPU) < 1000


def test_copy_bandwidth_counts_reading_and_writing():
    clock = iter([0.5, 0.25, 0.1, 0.2, 0.3])
    bandwidth = harness.copy_bandwidth(CPU, lambda call: next(clock), size=1000, rounds=5)
    assert bandwidth == pytest.approx(2 * 1000 / 0.25)


def test_wall_clock_of_a_cpu():
    assert 0 < harness.stopwatch(CPU)(lambda: torch.ones(10)) < 10


def test_gpu_clock_flushes_the_cache_before_the_first_event(monkeypatch):
    """The order of the calls on a pretended GPU; the chip itself is not in question."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            assert end is not self
            return 250.0  # ms

    clock = object.__new__(harness._CudaStopwatch)
    clock.device, clock.flush = torch.device("cuda"), SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert clock(lambda: log.append("call")) == 0.25
    assert log == ["flush", "record", "call", "record", "synchronize"]


def test_gpu_memory_is_the_peak_beyond_what_was_there_and_what_comes_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000)
    result = torch.ones(100)  # 400 bytes
    assert harness.peak_extra_bytes(lambda: result, torch.device("cuda")) == 5000 - 1000 - 400


@pytest.fixture
def run():
    return {
        "date": "2030-01-01T00:00:00+00:00",
        "commit": "a" * 40,
        "device": "cpu",
        "name": "Some(R) CPU @ 2",
        "cores": 2,
    }


def row(provider, shape="N=1", **rest):
    return {"benchmark": "b", "shape": shape, "dtype": "fp32", "provider": provider, **rest}


def test_results_merge_by_key_and_keep_the_run_of_each_row(run, tmp_path, capsys):
    assert harness.finish("b", run, [row("eager", ms_p50=1.0), row("ours", ms_p50=2.0)], {}, tmp_path) == 0
    later = {**run, "date": "2030-02-02T00:00:00+00:00"}
    assert harness.finish("b", later, [row("ours", ms_p50=3.0), row("ours", "N=2", ms_p50=4.0)], {}, tmp_path) == 0
    (path,) = tmp_path.iterdir()  # nothing is left of the atomic write
    assert path.name == "some-cpu-2-2-cores.json"
    document = harness.read_results(path)
    found = {(r["shape"], r["provider"]): (r["ms_p50"], r["run"][:10]) for r in document["rows"]}
    assert found == {
        ("N=1", "eager"): (1.0, "2030-01-01"),
        ("N=1", "ours"): (3.0, "2030-02-02"),
        ("N=2", "ours"): (4.0, "2030-02-02"),
    }
    assert {run["date"] for run in document["runs"].values()} == {run["date"], later["date"]}
    assert all(len(run["load_average"]) == 3 for run in document["runs"].values())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == str(path)


def test_a_run_that_no_row_refers_to_is_dropped(run):
    first = harness.merge(None, run, [row("ours", ms_p50=1.0)])
    second = harness.merge(first, {**run, "date": "2030-02-02"}, [row("ours", ms_p50=2.0)])
    assert [r["date"] for r in second["runs"].values()] == ["2030-02-02"]


def test_a_wrong_provider_replaces_its_older_figure_and_fails_the_run(run, tmp_path, capsys):
    harness.finish("b", run, [row("ours", ms_p50=1.0)], {}, tmp_path)
    assert harness.finish("b", run, [row("ours", wrong="off by 2")], {"trl": "not installed"}, tmp_path) == 1
    (stored,) = harness.read_results(harness.result_file(tmp_path, run))["rows"]
    assert stored["wrong"] == "off by 2" and "ms_p50" not in stored
    out = capsys.readouterr().out
    assert "WRONG, no figure: N=1, fp32, ours: off by 2" in out and "left out: trl: not installed" in out


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"format": "mskd-bench-0", "rows": []}'])
def test_damaged_or_foreign_result_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no") as error:
        harness.read_results(path)
    assert "\n" not in str(error.value)


def test_environment_names_machine_versions_and_commit():
    found = harness.environment(CPU)
    assert found["device"] == "cpu" and found["name"] and found["cores"] >= 1
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (
        found["commit"]
        == subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=harness.ROOT).stdout.strip()
        or None
    )
    assert harness.installed("no-such-package-of-ours") is None


def test_table_aligns():
    text = harness.table([{"a": 1}, {"a": 22}], {"x": lambda r: str(r["a"]), "longer": lambda r: "y"})
    assert text.splitlines() == ["x   longer", "1   y", "22  y"]
