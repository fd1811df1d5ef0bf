"""The reverse-KL benchmark: its inputs, its truth, its gate, and the whole of it at the smallest size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kl_kernel, kl_providers
from bench.harness import read_results
from bench.kl_cases import Case, relative_error, truth

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", ["64x2000", "64x2000x96x128", "64x2000x96x96"])
@pytest.mark.parametrize("kl", kl_kernel.LEVELS)
def test_inputs_have_the_reverse_kl_that_was_asked_for(shape, kl):
    inputs = Case.parse(shape, torch.float32).inputs(kl, CPU)
    assert 0.7 * kl < float(truth(inputs)[0]) < 1.3 * kl


@pytest.mark.parametrize("shape", ["7x50", "7x50x6x8"])
def test_truth_is_the_derivative_of_the_formula(shape):
    """Central differences of the definition, in float64."""
    inputs = [x.detach().double() for x in Case.parse(shape, torch.float64).inputs(0.5, CPU)]
    leaves = inputs[: len(inputs) // 2]

    def mean_kl():
        s, t = inputs if len(inputs) == 2 else (inputs[0] @ inputs[1].T, inputs[2] @ inputs[3].T)
        q, p = s.softmax(-1), t.softmax(-1)
        return float((q * (q / p).log()).sum(-1).mean())

    loss, *gradients = truth(tuple(inputs), tokens=3)
    assert float(loss) == pytest.approx(mean_kl(), rel=1e-9)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for i, j in ((0, 0), (3, 2), (6, 5)):
            old, step = float(leaf[i, j]), 1e-5
            leaf[i, j] = old + step
            above = mean_kl()
            leaf[i, j] = old - step
            slope = (above - mean_kl()) / (2 * step)
            leaf[i, j] = old
            assert float(gradient[i, j]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shape", ["8x300", "8x300x16x24"])
def test_what_needs_neither_compiler_nor_peer_is_right_and_the_rest_is_named(shape, monkeypatch):
    monkeypatch.setattr(kl_providers.shutil, "which", lambda _: None)
    monkeypatch.setattr(kl_providers, "installed", lambda _: None)
    inputs = Case.parse(shape, torch.float32).inputs(0.5, CPU)
    true = truth(inputs)
    calls, left_out = kl_providers.providers(inputs)
    assert left_out["compile"] == "torch.compile needs a C++ compiler"
    assert left_out["ours triton"] == "needs a CUDA GPU"
    if len(inputs) == 4:
        assert left_out["trl"] == "trl is not installed (pip install 'mskd[bench]')"
    assert {"eager", "ours"} <= set(calls) and not set(calls) & set(left_out)
    for name, call in calls.items():
        assert max(relative_error(x, y) for x, y in zip(call(), true, strict=True)) < 1e-5, name


def test_minimal_bytes():
    assert Case(4, 10, None, torch.float16).minimal_bytes == 3 * 4 * 10 * 2
    # read: hidden states and weights of both; written: two gradients
    case = Case(4, 10, (3, 5), torch.float32)
    assert case.minimal_bytes == (4 * 3 + 10 * 3 + 4 * 5 + 10 * 5 + 4 * 3 + 10 * 3) * 4


@pytest.mark.parametrize("shape", ["12", "1x2x3", "0x5", "axb", "8x100x64x32"])
def test_a_bad_shape_is_one_line_and_exit_code_2(shape, capsys):
    assert kl_kernel.main(["--shape", shape, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert shape in error and error.count("\n") == 1


def off_by_two(hidden, weight, *teacher):
    loss, *gradients = kl_providers.LINEAR["eager"](hidden, weight, *teacher)
    return loss, *(2 * g for g in gradients)


def test_a_wrong_provider_gets_no_figure(monkeypatch, tmp_path, capsys):
    eager = kl_providers.LINEAR["eager"]
    monkeypatch.setattr(kl_providers, "LINEAR", {"eager": eager, "ours": off_by_two})
    code = kl_kernel.main(["--shape", "8x300x16x24", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["provider"]: row for row in document["rows"]}
    assert code == 1
    assert "error 1.0e+00 > 0.001 at a reverse KL of 0.00" in rows["ours"]["wrong"]
    assert not [field for field in rows["ours"] if field.startswith(("ms_", "ratio_", "peak"))]
    assert rows["eager"]["ms_p50"] > 0


def test_chunk_of_the_compiled_chunks_fits_the_budget():
    weight = torch.empty(1, 1).expand(151936, 1)
    assert kl_providers._chunk_tokens(weight) == 128  # 2 sides x 4 bytes x 151936 x 128 = 148 MiB of 256
    assert kl_providers._chunk_tokens(weight[:1000]) == 256


def test_smoke_runs_and_its_last_line_is_json(tmp_path):
    """All of it in a process of its own, torch.compile and the installed peers included."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.kl_kernel", "--smoke", "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    stored = read_results(Path(document["results"]))
    assert document["run"]["copy_gb_s"] > 0
    assert {row["shape"] for row in stored["rows"]} == {
        Case.parse(shape, torch.float32).shape for shape in kl_kernel.SMOKE_SHAPES
    }
    for row in stored["rows"]:
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["rounds"] >= kl_kernel.FEWEST
        if row["provider"] != "gemm":
            assert row["gradient_error_0.5"] < 1e-4 and row["ratio_p50"] > 0
    linear = {row["provider"]: row for row in stored["rows"] if row["hs"]}
    assert linear["gemm"]["roof_percent"] == pytest.approx(100)
    assert {"eager", "ours", "ours recompute"} <= set(linear)
    missing = set(kl_providers.LINEAR) - set(linear)
    assert missing <= set(document["left_out"])  # nobody is dropped without a word
    assert Path(document["results"]).with_suffix(".kl_kernel.png").stat().st_size > 10_000
