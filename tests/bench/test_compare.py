"""The table and the plot over machines, from two files made here."""

import json

import pytest

from bench import compare, harness


@pytest.fixture
def files(tmp_path):
    paths = []
    for gpu, ms in (("Tesla V100", 8.0), ("NVIDIA H100", 1.25)):
        run = {"date": "2030-01-01", "commit": None, "device": "cuda", "name": gpu}
        rows = [
            {"benchmark": "kl_kernel", "shape": "logits N=8 V=9", "dtype": "fp16", "provider": "ours", "ms_p50": ms,
             "roof_percent": 80.0},
            {"benchmark": "rollout", "shape": "B=8", "dtype": "fp16", "provider": "mskd", "tokens_per_s": 1e4 / ms},
        ]  # fmt: skip
        if gpu == "Tesla V100":
            rows.append({**rows[0], "dtype": "bf16", "wrong": "error 1"})
            del rows[-1]["ms_p50"]
        paths.append(harness.result_file(tmp_path, run))
        paths[-1].write_text(json.dumps(harness.merge(None, run, rows)))
    return paths


def test_table_plot_and_json(files, tmp_path, capsys):
    plot = tmp_path / "p.png"
    assert compare.main([*map(str, files), "--plot", str(plot)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["benchmark", "shape", "dtype", "provider", "tesla-v100", "nvidia-h100"]
    cells = {(r["dtype"], r["provider"]): r["cells"] for r in json.loads(last)["rows"]}
    assert cells == {
        ("fp16", "ours"): {"tesla-v100": "8 ms (80 %)", "nvidia-h100": "1.25 ms (80 %)"},
        ("bf16", "ours"): {"tesla-v100": "WRONG", "nvidia-h100": "-"},
        ("fp16", "mskd"): {"tesla-v100": "1250 tokens/s", "nvidia-h100": "8000 tokens/s"},
    }
    for row in cells.values():
        assert any(all(cell in line for cell in row.values()) for line in lines[1:])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_benchmark_of_a_provider_that_has_nothing_to_plot(files, tmp_path, capsys):
    plot = tmp_path / "p.png"
    assert compare.main([*map(str, files), "--benchmark", "rollout", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "kl_kernel" not in out and "no plot" in out and not plot.exists()


@pytest.mark.parametrize("case", ["missing", "foreign", "empty"])
def test_files_that_cannot_serve_are_refused_in_one_line(case, files, tmp_path, capsys):
    path = tmp_path / "other.json"
    if case == "foreign":
        path.write_text("{}")
    arguments = [str(files[0]), "--benchmark", "no_such"] if case == "empty" else [str(files[0]), str(path)]
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("no_such" if case == "empty" else "other.json") in error
