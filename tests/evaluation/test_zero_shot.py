"""Zero-shot tasks through lm-eval: its own figures, kept with a value for every item; one line for every mistake."""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from mskd import models
from mskd.config import ConfigError, EvalConfig
from mskd.evaluation import zero_shot as reasoning
from mskd.evaluation.statistics import item_values

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

QUESTIONS = [
    {"question": f"request {i} that", "choices": ["appropriately", "completes", "a task", "input"][: 2 + i % 3],
     "answer": i % 2, "text": "Write a response. " * (1 + i % 3)} for i in range(9)
]  # fmt: skip
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1.5},
}
ROLLING = {
    "task": "tiny_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
ANSWERING = {
    "task": "tiny_answer",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"max_gen_toks": 4, "until": ["."]},
    "num_fewshot": 2,
    "metric_list": [{"metric": "exact_match"}],
    "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
}
CONFIG = EvalConfig.model_validate({"batch_size": 4, "limit": 8})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The data sets of tests go to no cache of the user's, and nobody asks the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def task(tmp_path):
    """Writes a task file over local questions; changes take a key away where they are None."""
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))

    def write(base, name="", **changes):
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
        tree = {**base, **source, "test_split": "test", **changes}
        path = tmp_path / f"{name or base['task']}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
        return str(path)

    return write


def test_figures_are_lm_evals_own(task, tiny_llama_folder, tmp_path, monkeypatch):
    files = [task(CHOICE), task(ROLLING), task(ANSWERING)]
    own = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(tiny_llama_folder), "dtype": "float32"}, files, num_fewshot=0, batch_size=4, limit=8,
        device="cpu", task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )  # fmt: skip
    model, tokenizer = models.load_model(tiny_llama_folder).train(), models.load_tokenizer(tiny_llama_folder)
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    tasks = reasoning.load_tasks([",".join(files[:2]), files[2]])
    found = reasoning.run_tasks(model, tokenizer, tasks, CONFIG, tmp_path / "evals")
    assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert model.training and found["lm_eval"] == lm_eval.__version__
    assert found["tasks"].keys() == own["results"].keys() == {"tiny_choice", "tiny_text", "tiny_answer"}
    for name, figures in found["tasks"].items():
        theirs = {k.removesuffix(",none"): v for k, v in own["results"][name].items() if "," in k}
        assert {k: "N/A" if figures[k] is None else figures[k] for k in theirs} == theirs
        assert figures.keys() - theirs.keys() == {"items", "version"} and figures["items"] == 8
    choice = found["tasks"]["tiny_choice"]
    assert 0 < choice["acc"] < 1 and choice["acc_stderr"] > 0 and choice["version"] == 1.5
    assert "exact_match,first" in found["tasks"]["tiny_answer"] and found["tasks"]["tiny_text"]["word_perplexity"] > 1

    lines = json.loads(open(found["file"]).read())["lines"]
    values = item_values(lines["tiny_choice"], "acc")
    assert math.fsum(values.values()) / 8 == choice["acc"] and list(values) == list(range(8))
    monkeypatch.setattr(reasoning, "_evaluate", None)
    assert reasoning.run_tasks(model, tokenizer, tasks, CONFIG, tmp_path / "evals") == found  # taken from the file
    assert reasoning.load_tasks(files[::-1]).file_name(8) == tasks.file_name(8) == os.path.basename(found["file"])
    names = {tasks.file_name(8), tasks.file_name(None), reasoning.load_tasks(files[:2]).file_name(8)}
    changed = reasoning.load_tasks([*files[:2], task(ANSWERING, generation_kwargs={"max_gen_toks": 5, "until": ["."]})])
    assert len({*names, changed.file_name(8)}) == 4
    open(found["file"], "w").write("{")
    with pytest.raises(ConfigError, match="^damaged: .*; delete it and run the same command$"):
        reasoning.run_tasks(model, tokenizer, tasks, CONFIG, tmp_path / "evals")


def test_a_diverged_model_gets_no_accuracy(task, tiny_llama_folder, tmp_path):
    model = models.load_model(tiny_llama_folder)
    model.model.norm.weight.data.fill_(math.nan)
    tasks = reasoning.load_tasks([task(CHOICE)])
    with pytest.raises(FloatingPointError, match="tiny_choice, item 0: a log-likelihood is not a number"):
        reasoning.run_tasks(model, models.load_tokenizer(tiny_llama_folder), tasks, CONFIG, tmp_path)


def test_a_group_has_the_average_that_lm_eval_gives_it(task, tiny_llama_folder, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, target in {"one": "answer", "two": "{{1 - answer}}"}.items():
        os.rename(task(CHOICE, name, task=name, doc_to_target=target), mine / f"{name}.yaml")
    average = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    (mine / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["one", "two"], "aggregate_metric_list": [average]})
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(mine), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(tiny_llama_folder)}, ["both"], batch_size=4, device="cpu", task_manager=manager
    )["results"]
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: manager)
    model, tokenizer = models.load_model(tiny_llama_folder), models.load_tokenizer(tiny_llama_folder)
    config = EvalConfig.model_validate({"batch_size": 4})
    found = reasoning.run_tasks(model, tokenizer, reasoning.load_tasks(["both"]), config, tmp_path)["tasks"]
    assert list(found) == ["one", "two", "both"] and found["both"]["items"] == 18
    assert found["one"]["acc"] != found["two"]["acc"]
    for name, figures in found.items():
        assert all(figures[metric] == theirs[name][f"{metric},none"] for metric in ("acc", "acc_stderr"))
    shown = reasoning.describe("both", found["both"])
    assert shown == f"both: 18 items: acc {found['both']['acc']:.4g} ± {found['both']['acc_stderr']:.2g}"
    with pytest.raises(ConfigError, match="give the files of its tasks"):
        reasoning.load_tasks([str(mine / "both.yaml")])


@pytest.mark.slow
def test_the_command_gives_what_lm_evals_command_gives(run, task, tiny_llama_folder, tmp_path):
    given = ",".join([task(CHOICE), task(ROLLING), task(ANSWERING)])
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", given,
        "--num_fewshot", "0", "--batch_size", "4", "--limit", "7",
        "--model_args", f"pretrained={tiny_llama_folder},dtype=float32", "--output_path", str(tmp_path / "theirs"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "other")}
    subprocess.run(command, env={**os.environ, **offline}, check=True, capture_output=True)
    (file,) = (tmp_path / "theirs").glob("**/results_*.json")
    theirs = json.loads(file.read_text())["results"]
    sets = ["--set", "evaluation.batch_size=4", "--set", "evaluation.limit=7", "--set", "run.device=cpu"]
    code, out, err = run("evaluate", tiny_llama_folder, "--tasks", given, "--out", tmp_path / "out", *sets)
    assert code == 0, err
    found = json.loads(out[-1])
    assert found["data"] == {} and found["tasks"]["tasks"].keys() == theirs.keys() and len(theirs) == 3
    for name, figures in found["tasks"]["tasks"].items():
        values = {key.removesuffix(",none"): value for key, value in theirs[name].items() if "," in key}
        assert values == {k: "N/A" if figures[k] is None else figures[k] for k in values} and len(values) >= 2
    assert any(line.startswith("tiny_choice: 7 items: acc 0.") for line in out)


MISTAKES = {
    "metadata": ({"generation_kwarg": {}}, "TypeError: TaskConfig.__init__() got an unexpected keyword"),
    "column": ({"doc_to_text": "{{quest}}"}, "UndefinedError: 'quest' is undefined"),
    "split": ({"test_split": "validation"}, "KeyError: 'validation'"),
    "file": ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "FileNotFoundError: Unable to find"),
    "hub": ({"dataset_path": "nobody/nothing", "dataset_kwargs": None}, "load it once where there is a network"),
    "code": ({"unsafe_code": True}, "runs code that the model writes"),
    "shape": ({"task": None}, "ValueError: Unknown config shape"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_task_file_that_cannot_be_asked(mistake, task, run, tmp_path):
    changes, said = MISTAKES[mistake]
    code, out, err = run("evaluate", "no-such-model", "--tasks", task(CHOICE, **changes), "--out", tmp_path / "out")
    assert code == 2 and not out and said in err[-1] and "tiny_choice" in err[-1]
    assert all("examples/s" in line or not line for line in err[:-1]), err


def test_other_mistakes_take_one_line_before_a_model_is_loaded(task, run, tmp_path, monkeypatch):
    (tmp_path / "broken.yaml").write_text("task: [a\nb: c\n")
    same = f"{task(CHOICE)},{task(CHOICE, 'again')}"
    for given, said in {
        tmp_path / "none.yaml": "cannot read the task file",
        tmp_path / "broken.yaml": "ParserError: while parsing a flow sequence",
        same: "the task 'tiny_choice' is in",
        ",": "--tasks names no task",
        "helaswag": "lm-eval has no task 'helaswag'; close to it: hellaswag",
    }.items():
        code, out, err = run("evaluate", "no-such-model", "--tasks", given, "--out", tmp_path / "out")
        assert code == 2 and not out and said in err[-1], err
    code, _, err = run("evaluate", "m", "--tasks", task(CHOICE), "--teacher", "t", "--out", tmp_path / "out")
    assert code == 2 and "tasks have no use for it; give --data too" in err[-1]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("evaluate", "no-such-model", "--tasks", "hellaswag", "--out", tmp_path / "out")
    assert code == 2 and len(err) == 1 and "pip install 'mskd[eval]'" in err[0]
