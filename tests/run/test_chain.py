"""The chain as a user meets it: nodes shared and never run twice, paths, what lies on disk, what is refused."""

import json
import os

import pytest
import torch
from chain_setup import config, tree, weights, write_rows

from mskd.config import ConfigError, EvaluateConfig, load, parse
from mskd.evaluation.evaluate_model import evaluate_model
from mskd.evaluation.statistics import read_lines, summarize
from mskd.models import load_model, load_tokenizer, save_model
from mskd.run.chain import distill
from mskd.store import checkpoint
from mskd.store.hashes import weights_digest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(tiny_llama_folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    lines: list[str] = []
    run = distill(config(tiny_llama_folder, data), out, echo=lines.append)
    return run, out, lines


def test_the_students_are_ordinary_models(finished):
    run, out, _ = finished
    assert set(run.students) == {"teacher > ta > student", "teacher > student"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in run.students.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == 2
        assert AutoTokenizer.from_pretrained(folder)("request")["input_ids"]
        assert "teacher" in (folder / "README.md").read_text()


def test_both_paths_start_from_the_same_student_and_end_elsewhere(finished):
    run, out, _ = finished
    assert len(list((out / "models").glob("student-*"))) == 1
    chain, direct = (weights_digest(f) for f in run.students.values())
    start = weights_digest(next((out / "models").glob("student-*")) / "model")
    assert len({chain, direct, start}) == 3


def test_what_lies_on_disk(finished):
    run, out, _ = finished
    hops = {p.name.rsplit("-", 1)[0] for p in (out / "hops").iterdir()}
    assert hops == {"ta-from-teacher", "student-from-ta", "student-from-teacher"}
    for folder in (out / "hops").iterdir():
        done = json.loads((folder / "done.json").read_text())
        assert done["steps"] == 11 and done["weights"] == weights_digest(folder / "model")
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [s["step"] for s in steps if "train/loss" in s] == list(range(1, 12))
        assert [s["step"] for s in steps if "eval/loss" in s] == [2, 4]
        assert not (folder / "state").exists() and (folder / "phases" / "0-kd").is_dir()
    assert load(run.directory / "config.toml").chain.paths[0] == ("teacher", "ta", "student")
    assert (run.directory / "report.md").exists() and list(run.directory.glob("*.png"))
    assert run.summary


def test_the_same_command_again_trains_nothing(finished, tiny_llama_folder, data):
    run, out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    lines: list[str] = []
    again = distill(config(tiny_llama_folder, data), out, echo=lines.append)
    assert again.students == run.students
    assert sum("done before" in line for line in lines) == 6
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


def test_another_run_shares_nodes_and_runtime_settings_do_not_count(finished, tiny_llama_folder, data):
    _, out, _ = finished
    count = len(list((out / "hops").iterdir()))
    changed = tree(tiny_llama_folder, data, name="direct", chain={"paths": [["teacher", "student"]]})
    changed["run"] = {"device": "cpu", "save_every_s": 1.0, "log_every": 2}
    changed["evaluation"]["max_new_tokens"] = 5
    distill(parse(changed), out, echo=lambda line: None)
    assert len(list((out / "hops").iterdir())) == count


def test_further_data_sets_are_evaluated_by_every_finished_model(finished, tiny_llama_folder, data, tmp_path):
    run, out, _ = finished
    twins = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twins))
    (tmp_path / "vicuna.jsonl").write_text('{"turns": ["request response"]}\n{"turns": ["input further"]}\n')
    sources = [str(tmp_path / name) for name in ("twins.jsonl", "vicuna.jsonl")]
    changed = tree(tiny_llama_folder, data, name="further")
    changed["evaluation"]["data"] = sources
    lines: list[str] = []
    again = distill(parse(changed), out, echo=lines.append)
    assert again.students == run.students and sum("done before" in line for line in lines) == 6
    assert any("17 of 24 items have the prompt of a training row" in line for line in lines)  # 4 test, 3 validation
    index = json.loads((again.directory / "index.json").read_text())
    entries = [(e["node"], e["data"]) for e in index["evals"] if "data" in e]
    assert sorted(entries) == sorted((key, source) for key in index["nodes"] for source in sources)
    own = [e for e in index["evals"] if "data" not in e]
    assert own == json.loads((run.directory / "index.json").read_text())["evals"]  # the run's own are as they were
    for path in ("teacher>ta>student", "teacher>student"):
        file = next(e["file"] for e in index["evals"] if e["node"] == path and e.get("data") == sources[0])
        figures, shown = summarize(read_lines(out / file)), again.summary["paths"][path]["data"]
        assert shown[sources[0]]["rouge_l"] == figures["rouge_l"] and figures["items"] == 24
        assert shown[sources[0]]["reverse_kl"] == figures["reverse_kl"]["teacher"]
        assert shown[sources[1]]["items"] == 2 and shown[sources[1]]["rouge_l"] is None
    report = (again.directory / "report.md").read_text()
    assert "## On twins" in report and "## On vicuna" in report and "vicuna.jsonl, which ROUGE-L" in report


def test_a_further_data_set_that_is_not_there(tiny_llama_folder, data, tmp_path):
    changed = tree(tiny_llama_folder, data)
    changed["evaluation"]["data"] = [str(tmp_path / "nowhere.jsonl")]
    with pytest.raises(ConfigError, match="evaluation.data .*nowhere.jsonl' does not exist"):
        distill(parse(changed), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*s/*"))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"train": {"gradient_checkpointing": True}},
        {"hop": {"teacher>student": {"lr": 2e-3}}},
        {"models": {"teacher": {"source": "", "precision": "fp32"}, "student": {"from": "teacher", "layers": 2}}},
        {"data": {"validation": 2}},
    ],
)
def test_what_determines_a_node_is_in_its_hash(tiny_llama_folder, data, tmp_path, change):
    from mskd.config.hardware import detect
    from mskd.run.nodes import Graph

    base = tree(tiny_llama_folder, data, chain={"paths": [["teacher", "student"]]})
    changed = {**base, **{k: ({**base[k], **v} if k == "data" else v) for k, v in change.items()}}
    if "models" in change:
        changed["models"]["teacher"]["source"] = str(tiny_llama_folder)
    hashes = [
        Graph(parse(t), tmp_path, detect("cpu"), lambda line: None).nodes["teacher>student"].hash
        for t in (base, base, changed)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_of_the_same_name_with_another_configuration_is_refused(finished, tiny_llama_folder, data):
    _, out, _ = finished
    kept = (out / "runs" / "tiny" / "config.toml").read_text()
    with pytest.raises(ConfigError, match="another configuration"):
        distill(config(tiny_llama_folder, data, seed=5), out, echo=lambda line: None)
    assert (out / "runs" / "tiny" / "config.toml").read_text() == kept


def test_a_damaged_node_is_refused_not_rebuilt(tiny_llama_folder, data, tmp_path):
    small = config(tiny_llama_folder, data, chain={"paths": [["teacher", "student"]]})
    distill(small, tmp_path, echo=lambda line: None)
    (weights_file,) = next((tmp_path / "hops").iterdir()).glob("model/*.safetensors")
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        distill(small, tmp_path, echo=lambda line: None)
    assert weights_file.read_bytes() == bytes(content)


def test_minillm_alone_takes_prompts_without_responses(tiny_llama_folder, tmp_path):
    rows = [{"instruction": f"{i} write a response"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = tree(tiny_llama_folder, tmp_path / "prompts.jsonl", chain={"paths": [["teacher", "student"]]})
    base["phases"] = base["phases"][1:]
    run = distill(parse(base), tmp_path / "out", echo=lambda line: None)
    assert run.students


def test_a_text_corpus_adds_its_term(tiny_llama_folder, data, tmp_path):
    (tmp_path / "text.txt").write_text("Write a response that completes the request.\n" * 20)
    base = tree(tiny_llama_folder, data, chain={"paths": [["teacher", "student"]]})
    base["data"]["text"] = str(tmp_path / "text.txt")
    base["phases"] = [{**base["phases"][1], "objective": "lmops", "steps": 2}]
    base["train"] = {"gradient_checkpointing": True, "loss_chunk_mb": 1}
    distill(parse(base), tmp_path / "out", echo=lambda line: None)
    (metrics,) = (tmp_path / "out").glob("hops/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(line["train/lm_nll"] > 0 and line["train/lm_forward_kl"] > 0 for line in lines)


def test_a_model_may_be_prepared_and_cut_from_a_prepared_one(tiny_llama_folder, data, tmp_path):
    base = tree(tiny_llama_folder, data, chain={"paths": [["teacher", "student"]]})
    base["models"]["teacher"]["prepare"] = [{"objective": "sft", "steps": 2, "batch_size": 4}]
    distill(parse(base), tmp_path, echo=lambda line: None)
    (teacher,) = (tmp_path / "models").glob("teacher-*")
    assert json.loads((teacher / "done.json").read_text())["steps"] == 2
    assert weights_digest(teacher / "model") != weights_digest(tiny_llama_folder)


def test_ten_steps_that_are_not_finite_stop_the_run_and_keep_the_last_good_state(tiny_llama_folder, data, tmp_path):
    base = tree(tiny_llama_folder, data, chain={"paths": [["teacher", "student"]]})
    grows = {"lr": 1.0, "weight_decay": 1000.0, "grad_clip": 1e9}  # every weight by 999 in each step
    base["phases"] = [{"objective": "sft", "steps": 40, "batch_size": 4, **grows}]
    base["run"]["save_every_s"] = 0.0
    with pytest.raises(FloatingPointError, match="10 steps in a row.*lower lr"):
        distill(parse(base), tmp_path, echo=lambda line: None)
    (hop,) = (tmp_path / "hops").iterdir()
    skipped = [json.loads(line)["train/skipped"] for line in (hop / "metrics.jsonl").read_text().splitlines()]
    assert skipped[-1] == 10 and not (hop / "done.json").exists()
    state = checkpoint.load_state(hop / "state")
    assert state.meta["progress"]["skipped_in_a_row"] == 0


# -- what the world may hold wrong -----------------------------------------------------------------


def small(model, data, **changes):
    return tree(model, data, **{"chain": {"paths": [["teacher", "student"]]}, **changes})


def refused(tree_, out, match):
    with pytest.raises(ConfigError, match=match) as caught:
        distill(parse(tree_), out, echo=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not list(out.rglob("*.safetensors"))


def test_too_many_layers(tiny_llama_folder, data, tmp_path):
    models = {"teacher": {"source": str(tiny_llama_folder)}, "student": {"from": "teacher", "layers": 5}}
    refused(
        small(tiny_llama_folder, data, models=models), tmp_path, "wants 5 layers, but teacher has 4; give at most 4"
    )


def test_an_assistant_bigger_than_its_teacher(tiny_llama_folder, data, tmp_path):
    models = {
        "teacher": {"source": str(tiny_llama_folder)},
        "small": {"from": "teacher", "layers": 2},
        "student": {"from": "teacher", "layers": 3},
    }
    chain = {"paths": [["teacher", "small", "student"]]}
    refused(
        small(tiny_llama_folder, data, models=models, chain=chain),
        tmp_path,
        "'student'.*bigger than its teacher 'small'",
    )


def test_another_tokenizer(tiny_llama_folder, data, tmp_path):
    other = tmp_path / "other"
    tokenizer = load_tokenizer(tiny_llama_folder)
    tokenizer.add_tokens(["<extra>"])
    model = load_model(tiny_llama_folder)
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, other)
    models = {"teacher": {"source": str(other)}, "student": {"source": str(tiny_llama_folder)}}
    out = tmp_path / "out"
    refused(small(tiny_llama_folder, data, models=models), out, "tokenizer")


def test_cuda_asked_for_and_absent(tiny_llama_folder, data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(small(tiny_llama_folder, data, run={"device": "cuda"}), tmp_path, "(?i)cuda")


def test_int8_without_bitsandbytes(tiny_llama_folder, data, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(small(tiny_llama_folder, data), tmp_path, "bitsandbytes")


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mskd_kernels._backend._interpreted", lambda: False)
    asked = small(tmp_path / "no-model", tmp_path / "no-data.jsonl") | {"run": {"device": "cpu", "backend": "triton"}}
    refused(asked, tmp_path, "run.backend = 'triton': .*runs on CUDA tensors, got cpu.*or use backend=\"torch\"")
    with pytest.raises(ConfigError, match="run.backend = 'triton'"):
        settings = parse({"run": asked["run"]}, kind=EvaluateConfig)
        evaluate_model("no-model", settings, data=["no-data.jsonl"], out=tmp_path)


def test_rollouts_that_do_not_fill_batches(tiny_llama_folder, data, tmp_path):
    base = small(tiny_llama_folder, data)
    base["phases"][1]["rollouts"] = 5
    with pytest.raises(ConfigError, match="multiple of batch_size"):
        distill(parse(base), tmp_path, echo=lambda line: None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_cannot_be_written(tiny_llama_folder, data, tmp_path):
    tmp_path.chmod(0o500)
    refused(small(tiny_llama_folder, data), tmp_path / "out", "cannot write to the output folder")


def test_an_output_folder_that_is_a_file(tiny_llama_folder, data, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        distill(parse(small(tiny_llama_folder, data)), tmp_path / "out", echo=lambda line: None)
    assert (tmp_path / "out").read_text() == "a file"


def test_weights_helper_sees_every_trained_node(finished):
    _, out, _ = finished
    assert len(weights(out)) == 5
