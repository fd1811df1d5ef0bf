"""The end of an answer through a run: one in the data, while sampling, in the evaluation and in the saved files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from chain_setup import tree, write_rows
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, build_llama, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, pipeline

from mskd.config import parse, to_toml
from mskd.config.hardware import detect
from mskd.config.phases import SftPhase
from mskd.data.instructions import Example, Splits
from mskd.models import save_model
from mskd.models.folder.declared import answer_ends, decoding_settings
from mskd.models.folder.stored import tensors
from mskd.report import report
from mskd.run.chain import distill
from mskd.run.nodes import Graph
from mskd.sampling.rollout import Interrupted
from mskd.training import hop
from mskd.training.job import Job

TEXT_END, TURN_END, RESERVED = 0, 2, 3  # <|endoftext|>, <|im_end|>, <|reserved|>


def write_model(
    folder: Path, *, layers: int, seed: int, eos: str, template: str | None, dtype=torch.float32, **generation
) -> Path:
    """A tiny Llama with a tokenizer of the given end token and chat template, and a generation config."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    model = build_llama(tokenizer, layers=layers, seed=seed).to(dtype)
    model.generation_config = GenerationConfig(**{"eos_token_id": tokenizer.eos_token_id, **generation})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Instruction-tuned: its template ends a turn with <|im_end|>, and so does its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    return write_model(folder, layers=2, seed=1, eos="<|im_end|>", template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model in bf16 without a template, whose texts end with <|endoftext|>."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return write_model(folder, layers=2, seed=2, eos="<|endoftext|>", template=None, dtype=torch.bfloat16)


def graph_of(tmp_path, teacher, student, lines=None, **changes) -> Graph:
    data = write_rows(tmp_path / "rows.jsonl")
    models = {"teacher": {"source": str(teacher), "precision": "fp32"}, "student": {"source": str(student)}}
    given = tree(teacher, data, models=models, chain={"paths": [["teacher", "student"]]}, **changes)
    given["data"] = given["data"] | {"template": "chat"}
    return Graph(parse(given), tmp_path / "out", detect("cpu"), [].append if lines is None else lines.append)


def test_models_of_one_vocabulary_and_two_ends_have_one_said_in_a_line(teacher, base, tmp_path):
    lines: list[str] = []
    graph = graph_of(tmp_path, teacher, base, lines)
    assert graph.ends == (TURN_END, TEXT_END)  # the base model may still end by what its generation config declares
    assert lines == [
        "answers end with '<|im_end|>' (2), the template's end of turn, in place of '<|endoftext|>' (0) of student; "
        "'<|endoftext|>' (0), which the models declare, may end one too"
    ]
    assert {e.response_ids[-1] for e in graph.data.train} == {TURN_END}
    assert not any(TEXT_END in e.response_ids for e in graph.data.train)


def test_a_run_with_one_end_says_nothing_and_its_nodes_are_what_they_were(teacher, tmp_path):
    lines: list[str] = []
    graph = graph_of(tmp_path, teacher, teacher, lines)
    assert lines == [] and graph.ends == (TURN_END,)
    alone = graph.nodes["teacher>student"].hash
    other = write_model(
        tmp_path / "two", layers=2, seed=1, eos="<|im_end|>", template=CHAT_TEMPLATE, eos_token_id=[TURN_END, 41]
    )
    two = graph_of(tmp_path, other, other)
    assert two.ends == (TURN_END, 41)
    # The content of a model is its weights, config and tokenizer; the ends are part of what a hop's hash covers.
    assert two.nodes["teacher"].hash == graph.nodes["teacher"].hash
    assert two.nodes["teacher>student"].hash != alone


def test_an_end_that_only_the_template_writes_is_the_runs(tmp_path):
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|reserved|>")
    model = write_model(tmp_path / "m", layers=3, seed=1, eos="<|endoftext|>", template=template)
    lines: list[str] = []
    graph = graph_of(tmp_path, model, model, lines)
    assert graph.ends == (RESERVED, TEXT_END) and {e.response_ids[-1] for e in graph.data.train} == {RESERVED}
    assert lines[0].startswith("answers end with '<|reserved|>' (3), the template's end of turn, in place of ")


def test_ids_outside_the_vocabulary_end_nothing(tmp_path):
    folder = write_model(
        tmp_path, layers=1, seed=1, eos="<|im_end|>", template=None, eos_token_id=[TURN_END, 320, 9999]
    )
    assert answer_ends(TURN_END, [folder], len(build_tokenizer())) == (TURN_END,)


def test_settings_of_generate_are_left_behind_and_named(teacher, tmp_path):
    student = write_model(
        tmp_path / "m", layers=2, seed=2, eos="<|im_end|>", template=CHAT_TEMPLATE,
        repetition_penalty=1.1, temperature=0.6, top_k=20, top_p=1.0, do_sample=True,
    )  # fmt: skip
    lines: list[str] = []
    graph_of(tmp_path, teacher, student, lines)
    (line,) = lines
    assert line.startswith("student: its generation_config.json sets ")
    assert line.endswith("; what is made from it is trained, evaluated and saved without")
    for shown in ("repetition_penalty = 1.1", "temperature = 0.6", "top_k = 20", "do_sample = True"):
        assert shown in line
    assert "top_p" not in line


# -- ids that a model has no place for -------------------------------------------------------------


def grown(folder: Path, add) -> Path:
    """A tiny model of 320 tokens whose tokenizer was given one more without a resize."""
    write_model(folder, layers=3, seed=1, eos="<|im_end|>", template=CHAT_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def rows_with(path: Path, text: str) -> Path:
    lines = write_rows(path).read_text().splitlines()
    lines[5] = json.dumps({"instruction": "the fifth", "response": text})
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (lambda t: t.add_tokens(["<a>"]), "rows.jsonl: a row holds the token '<a>', id 320"),
        (lambda t: t.add_special_tokens({"pad_token": "[PAD]"}), "the padding holds the token '[PAD]', id 320"),
    ],
    ids=["word", "padding"],
)
@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_an_id_beyond_the_embedding_is_refused_before_anything_is_trained(command, add, says, tmp_path, run):
    model, data = grown(tmp_path / "model", add), rows_with(tmp_path / "rows.jsonl", "has an <a> in it")
    if command == "distill":
        given = tree(model, data, name="ids")
        (tmp_path / "run.toml").write_text(to_toml(parse(given)))
        code, out, err = run("distill", tmp_path / "run.toml", "--out", tmp_path / "out")
    else:
        code, out, err = run("evaluate", model, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and not any("Traceback" in line for line in err)
    assert (
        says in err[-1] and "has 320 rows for a tokenizer of 321 tokens: tokens were added without a resize" in err[-1]
    )
    assert not list((tmp_path / "out").glob("*/*/done.json"))


def test_tokens_beyond_the_embedding_that_no_row_holds_do_no_harm(tmp_path):
    model = grown(tmp_path / "model", lambda t: t.add_tokens(["<a>"]))  # Gemma 3's text models have one
    assert graph_of(tmp_path, model, model).ends == (TURN_END,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"data": {"max_tokens": 95, "max_prompt_tokens": 90}, "evaluation": {"max_new_tokens": 60}},
            "the longest prompt",
        ),
        ({}, "the longest row"),
    ],
)
def test_longrope_past_its_first_length_is_refused_before_anything_is_trained(changes, says, tmp_path, run):
    tokenizer = build_tokenizer()
    config = build_llama(tokenizer, layers=3).config
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    config.rope_parameters = rope | {"original_max_position_embeddings": 100}
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    long = [{"instruction": f"{i} more", "response": "word " * (9 if changes else 30)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    given = tree(tmp_path / "model", tmp_path / "rows.jsonl", name="long")
    given = {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in given.items()}
    (tmp_path / "run.toml").write_text(to_toml(parse(given)))
    code, out, err = run("distill", tmp_path / "run.toml", "--out", tmp_path / "out")
    assert (
        code == 2 and f"teacher: {says}" in err[-1] and "past 100 the rotary embedding of this llama model" in err[-1]
    )
    assert not list((tmp_path / "out").glob("*/*/done.json"))


# -- the whole way ---------------------------------------------------------------------------------

KD = {"batch_size": 4, "micro_batch_size": 4, "lr": 1e-2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def no_report():
    """Runs without the seconds that a report's figures take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda folder: folder)
        patch.setattr(report, "summary", lambda folder: {})
        yield


@pytest.fixture(scope="module")
def distilled(teacher, base, tmp_path_factory, no_report) -> tuple[Path, list[str]]:
    """The folder of a student that was distilled from a teacher which had learnt a few chats; what the run said."""
    root = tmp_path_factory.mktemp("distilled")
    rows = [{"instruction": f"task {word}", "response": f"Write {word}."} for word in ("one", "two", "six", "ten")]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    (root / "test.jsonl").write_text(json.dumps({"instruction": "task of the test", "response": "x"}))
    teacher_of = {"source": str(teacher), "precision": "fp32", "prepare": [{"objective": "sft", "steps": 60, **KD}]}
    given = {
        "name": "ends",
        "models": {"teacher": teacher_of, "student": {"source": str(base)}},
        "chain": {"paths": [["teacher", "student"]]},
        "data": {"source": str(root / "rows.jsonl"), "test": str(root / "test.jsonl"), "template": "chat"},
        "phases": [{"objective": "kd", "steps": 80, **KD}],
        "evaluation": {"max_new_tokens": 4},
        "run": {"device": "cpu"},
    }
    lines: list[str] = []
    run = distill(given, root / "out", echo=lines.append)
    return run.students["teacher > student"], lines


def test_the_saved_student_stops_by_itself(distilled):
    folder, _ = distilled
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "task six"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=40)[0, ids["input_ids"].shape[1] :].tolist()
    assert answer[-1] == TURN_END and TURN_END not in answer[:-1]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "Write six."
    ask = pipeline("text-generation", model=str(folder))
    (said,) = ask(chat, max_new_tokens=40, return_full_text=False)
    assert said["generated_text"] == "Write six."
    batch = ask([chat, [{"role": "user", "content": "task ten"}]], max_new_tokens=40, batch_size=2)
    assert [b[0]["generated_text"][-1]["content"] for b in batch] == ["Write six.", "Write ten."]


def test_the_saved_files_name_the_trained_end_and_nothing_of_how_to_sample(distilled):
    folder, lines = distilled
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [TURN_END, TEXT_END] and generation["pad_token_id"] == TURN_END
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [TURN_END, TEXT_END]
    assert decoding_settings(folder) == {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", TURN_END)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert sum(line.startswith("answers end with '<|im_end|>' (2)") for line in lines) == 1


def dtypes(folder: Path) -> set[str]:
    return {dtype for _, dtype, _ in tensors(folder)}


def test_the_student_is_saved_in_the_dtype_of_its_checkpoint_and_what_is_trained_on_is_not(distilled):
    folder, _ = distilled
    assert dtypes(folder) == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {torch.bfloat16}
    assert dtypes(next(folder.parents[2].glob("models/teacher-*")) / "model") == {"F32"}  # prepared, not yet distilled


def test_cuts_are_exact_and_save_dtype_changes_the_students_alone(base, teacher, tmp_path, no_report):
    models = {
        "teacher": {"source": str(teacher), "precision": "fp32"},
        "base": {"source": str(base)},
        "student": {"from": "base", "layers": 1},
    }
    phases = [{"objective": "kd", "steps": 1, "batch_size": 2, "warmup_steps": 0}]
    given = tree(
        teacher, write_rows(tmp_path / "rows.jsonl"), models=models, phases=phases, train={"save_dtype": "fp32"}
    )
    given["chain"], given["data"] = {"paths": [["teacher", "student"]]}, given["data"] | {"test": 1}
    distill(parse(given), tmp_path / "out", echo=lambda line: None)
    (cut,) = (tmp_path / "out").glob("models/student-*")
    assert dtypes(cut / "model") == {"BF16"}
    own, source = load_file(cut / "model" / "model.safetensors"), load_file(base / "model.safetensors")
    (kept,) = json.loads((cut / "model" / "layers.json").read_text())["kept"]
    for name, tensor in own.items():
        assert torch.equal(tensor, source[name.replace("layers.0.", f"layers.{kept}.")])
    (trained,) = (tmp_path / "out").glob("hops/student-*")
    assert dtypes(trained / "model") == {"F32"}


def test_an_unset_save_dtype_leaves_every_hash_as_it_was(teacher, tmp_path):
    unset, bf16 = (
        graph_of(tmp_path, teacher, teacher, **changes) for changes in ({}, {"train": {"save_dtype": "bf16"}})
    )
    key = "teacher>student"
    assert unset.nodes[key].hash != bf16.nodes[key].hash and unset.nodes["student"].hash == bf16.nodes["student"].hash
    assert "save_dtype" not in unset._common()["train"]


def test_weights_that_fp16_cannot_hold_are_not_saved_in_it(tmp_path):
    model = build_llama(build_tokenizer(), layers=1)
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    with pytest.raises(FloatingPointError, match="model.norm.weight holds numbers beyond fp16's 65504"):
        save_model(model, build_tokenizer(), tmp_path, dtype=torch.float16)


def test_a_run_that_was_stopped_goes_on_in_fp32_and_ends_with_the_same_16_bits(tmp_path):
    tokenizer, phase = build_tokenizer(), SftPhase(steps=4, batch_size=2, micro_batch_size=2, lr=1e-3, warmup_steps=0)
    examples = tuple(Example(str(i), (5 + i, 6, 7), (20, 30 + i, 2), ("x",)) for i in range(6))
    models = {"teacher": {"source": "x"}, "student": {"source": "x"}}
    config = parse({"models": models, "chain": {"paths": [["teacher", "student"]]}, "phases": [phase.model_dump()]})

    def train(folder: Path, stops: list[bool]) -> None:
        hop.train(
            Job(
                name="hop", directory=folder, seed=0, phases=(phase,), student=build_llama(tokenizer, layers=1),
                tokenizer=tokenizer, ends=(2,), teacher=None, data=Splits(examples, (), (), ""), text=(), config=config,
                hardware=detect("cpu"), accelerator=Accelerator(cpu=True), save_dtype=torch.bfloat16,
                stop=lambda: bool(stops) and stops.pop(0),
            )
        )  # fmt: skip

    train(tmp_path / "whole", [])
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", [False, False, True])
    assert dtypes(tmp_path / "stopped" / "state") == {"F32"} and not (tmp_path / "stopped" / "model").exists()
    train(tmp_path / "stopped", [])
    whole, stopped = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "stopped"))
    assert dtypes(whole.parent) == {"BF16"} and whole.read_bytes() == stopped.read_bytes()
