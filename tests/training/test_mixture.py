"""gkd and distillm: whose responses a round holds; and all baselines in one chain, killed and resumed."""

import importlib
import itertools
import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from chain_setup import environment, tree, weights, write_rows
from tiny import build_llama, build_tokenizer

from mskd.config import parse, to_toml
from mskd.config.hardware import detect
from mskd.config.phases import OBJECTIVES
from mskd.data.instructions import Example, Splits
from mskd.models import Student, Teacher, load_model
from mskd.run.chain import distill
from mskd.run.nodes import Node
from mskd.store import checkpoint
from mskd.training.job import Job
from mskd.training.work.data_parallel import lanes
from mskd.training.work.on_mixture import OnMixture
from mskd.training.work.source import source_of

SMALL = {"batch_size": 4, "micro_batch_size": 2, "lr": 3e-3}
DATA = (9, 8, 2)  # the data's response to every prompt


def mixture(name="gkd", *, text=(), **changes):
    """The source of a gkd or distillm phase over 24 prompts, and its job."""
    tokenizer = build_tokenizer()
    phase = OBJECTIVES[name].model_validate(
        {"objective": name, "steps": 8, "rollouts": 8, "rollout_batch_size": 3, "max_new_tokens": 6, **SMALL, **changes}
    )
    models = {"teacher": {"source": "x"}, "student": {"source": "x"}}
    tree = {"models": models, "chain": {"paths": [["teacher", "student"]]}, "phases": [phase.model_dump()]}
    tree |= {"data": {"validation": 1}, "run": {"save_every_s": 0.0}}
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(4, 300) for _ in range(draw.randint(2, 20))) for _ in range(24)]
    job = Job(
        name="round", directory=Path(), seed=0, phases=(phase,), student=build_llama(tokenizer, layers=2, seed=1),
        tokenizer=tokenizer, ends=(tokenizer.eos_token_id,),
        data=Splits(tuple(Example("", p, DATA, ()) for p in prompts), (), (), ""), text=text,
        teacher=Teacher(build_llama(tokenizer, layers=3, seed=2).requires_grad_(False), "fp32"),
        config=parse(tree), hardware=detect("cpu"), accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    return source_of(job, 0, 5), job


def values(job, micros):
    student = Student(job.student).eval()
    return torch.stack([student(batch, loss.over(1.0))[0].detach() for batch, loss in micros])


def test_a_round_holds_the_students_share_and_the_rest_is_the_datas():
    source, job = mixture(student_share=0.5)
    assert isinstance(source, OnMixture)
    shares = [len(source.own(number)) / 8 for number in range(200)]
    assert sum(shares) / 200 == pytest.approx(0.5, abs=0.05) and len(set(shares)) > 3
    source.work(0)
    own = source.own(0)
    assert 0 < len(own) < 8
    from_data = [i for i, e in source.sequences.items() if e.response_ids == DATA]
    assert from_data == [i for i in range(8) if i not in own]
    alone = source.sampler([source.sequences[own[0]].prompt_ids], [own[0]], temperature=1.0).responses()
    assert tuple(alone[0]) == source.sequences[own[0]].response_ids  # the student's own draw, alone as in the round
    first = dict(source.sequences)
    source.work(1)
    assert source.sequences == first  # one round, two steps
    source.work(2)
    assert source.sequences != first and source.round == 1


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 8)])
def test_the_ends_of_the_share(share, count, monkeypatch):
    source, _ = mixture(student_share=share)
    if not share:
        monkeypatch.setattr("mskd.training.work.student_sampler.sample", None)
    source.work(0)
    assert len(source.own(0)) == count
    assert sum(e.response_ids == DATA for e in source.sequences.values()) == 8 - count


def test_a_round_that_goes_on_from_its_saved_state_has_the_same_losses():
    source, job = mixture("distillm", text=tuple(tuple(range(4, 20 + n)) for n in range(5)))
    again, _ = mixture("distillm", text=job.text)
    source.work(0)
    micros = source.work(1)
    assert {loss.term for _, loss in micros} == {"divergence", "lm"}
    state = source.state(1)
    assert source.state(2) == {} and state
    with torch.no_grad():
        for p in again.job.student.parameters():
            p.mul_(1.5)  # what it would sample now is something else
    again.restore(1, state)
    other = again.work(1)
    assert torch.equal(values(job, micros), values(job, other))


def test_a_round_does_not_depend_on_the_number_of_processes():
    whole, job = mixture()
    whole.work(0)
    found = {}
    for rank in range(2):
        part, _ = mixture()
        acc = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        part.job = part.sampler.job = replace(job, accelerator=acc)
        part.work(0)
        assert set(part.sequences) == set(lanes(part.job, part.phase))
        found |= part.sequences
    assert found == whole.sequences


def test_a_phase_that_comes_again_is_a_stage_of_its_own(tmp_path):
    phases = [OBJECTIVES[name].model_validate({"objective": name, "steps": 1}) for name in ("kd", "sft", "kd", "gkd")]
    top = Node("teacher", "teacher", "", tmp_path, None, ())
    hop = Node("teacher>student", "student", "", tmp_path, None, tuple(phases), top, top)
    assert hop.phase_names == ["kd", "sft", "kd 2", "gkd"]
    assert [name for name, _ in hop.stages()] == ["after kd", "after sft", "after kd 2", "final"]
    assert [folder.name for _, folder in hop.stages()] == ["0-kd", "1-sft", "2-kd", "model"]


# -- in a chain ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def one_hop(model, rows, phases, **changes):
    return tree(model, rows, chain={"paths": [["teacher", "student"]]}, phases=phases, **changes)


def metrics(out):
    (file,) = out.glob("hops/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


ANSWERS = {"max_new_tokens": 8, "batch_size": 3}
PHASES = {
    "seqkd": {"teacher_responses": ANSWERS},
    "kd on the teacher's responses": {"objective": "kd", "teacher_responses": ANSWERS},
    "gkd": {"max_new_tokens": 8, "student_share": 0.5},
    "gkd beta 1": {"objective": "gkd", "beta": 1.0, "max_new_tokens": 8, "teacher_responses": ANSWERS},
    "distillm": {"max_new_tokens": 8, "divergence": "skew_reverse_kl"},
}


@pytest.mark.parametrize("name", PHASES)
def test_each_objective_lowers_its_own_loss(tiny_llama_folder, rows, tmp_path, name):
    phase = {"objective": name, "steps": 30, **SMALL, "eval_every": 30, **PHASES[name]}
    base = one_hop(tiny_llama_folder, rows, [phase], evaluation={"max_new_tokens": 1, "limit": 1})
    distill(parse(base), tmp_path, echo=lambda line: None)
    losses = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    assert len(losses) == 30 and sum(losses[-8:]) < 0.92 * sum(losses[:8])


def test_two_stages_then_minillm_each_entered_with_the_best_weights_of_the_one_before(
    tiny_llama_folder, rows, tmp_path
):
    best = {"keep": "best", "eval_every": 2}
    phases = [
        {"objective": "seqkd", "steps": 6, **SMALL, **best, "teacher_responses": ANSWERS},
        {"objective": "sft", "steps": 6, **SMALL, **best},
        {"objective": "minillm", "steps": 2, "rollouts": 4, "batch_size": 4, "max_new_tokens": 6, "ppo_epochs": 1,
         "warmup_steps": 0},
    ]  # fmt: skip
    prepare = [{"objective": "sft", "steps": 12, **SMALL, "keep": "best", "eval_every": 4, "lr": 0.1}]
    base = one_hop(tiny_llama_folder, rows, phases, evaluation={"max_new_tokens": 1, "limit": 1})
    base["models"]["teacher"]["prepare"] = [{**prepare[0], "lr": 1e-5}]
    base["models"]["student"]["prepare"] = prepare
    distill(parse(base), tmp_path, echo=lambda line: None)
    folders = [*tmp_path.glob("hops/*"), *tmp_path.glob("models/teacher-*"), *tmp_path.glob("models/student-*")]
    assert len(folders) == 3
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for i, objective in enumerate(["seqkd", "sft"] if "hops" in str(folder) else ["sft"]):
            seen = [line["eval/loss"] for line in lines if line["objective"] == objective and "eval/loss" in line]
            entering = folder / "phases" / f"{i}-{objective}"
            model = load_model(entering if entering.is_dir() else folder / "model")
            assert nll_of(model, base, tiny_llama_folder) == pytest.approx(min(seen), rel=1e-4)
            assert len(seen) == 3
            if objective == "seqkd":  # a random teacher's responses lead a student away that was trained on the data's
                assert min(seen) < seen[-1]


def nll_of(model, base, folder):
    """Mean negative log-likelihood of the validation responses' tokens, from full logits."""
    from mskd.data.instructions import load_data
    from mskd.models import load_tokenizer

    config = parse(base)
    total, tokens = 0.0, 0
    for e in load_data(config.data, load_tokenizer(folder), seed=config.seed).validation:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(e.prompt_ids) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(e.prompt_ids) :], reduction="sum"))
        tokens += len(e.response_ids)
    return total / tokens


def test_killed_while_the_teacher_answers_within_a_round_and_while_the_student_answers(
    tiny_llama_folder, rows, tmp_path, monkeypatch
):
    phases = [
        {"objective": "seqkd", "steps": 2, **SMALL, "teacher_responses": {"max_new_tokens": 8, "batch_size": 1}},
        {"objective": "gkd", "steps": 4, **SMALL, "rollouts": 8, "max_new_tokens": 8},
        {"objective": "distillm", "steps": 2, **SMALL, "max_new_tokens": 8},
    ]
    base = one_hop(tiny_llama_folder, rows, phases, evaluation={"max_new_tokens": 1, "limit": 1})
    base["run"]["save_every_s"] = 0.0
    (tmp_path / "tiny.toml").write_text(to_toml(parse(base)))
    distill(parse(base), tmp_path / "whole", echo=lambda line: None)
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from mskd.sampling import slots; real = slots.draw; left = [80]\n"  # of about 17 x 8 draws of the teacher
        "def dying(*args, **kwargs):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **kwargs)\n"
        "slots.draw = dying\n"
        "import mskd; mskd.distill(mskd.load(sys.argv[1]), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.toml"), str(out)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (hop,) = out.glob("hops/*")
    answers = list((hop / "responses").glob("0-*"))
    assert 0 < len(answers) < 3 and checkpoint.load_state(hop / "state") is None
    for name, call, step in (
        ("mskd.training.hop.backward", 4, 1),
        ("mskd.sampling.slots.draw", 5, 2),
    ):  # in a round, in a sampling
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(name, dying_at(name, call))
            distill(parse(base), out, echo=lambda line: None)
        state = checkpoint.load_state(hop / "state")
        assert (state.meta["progress"]["phase"], state.meta["progress"]["step"]) == (1, step)
        assert ("rollout.0.ids" in state.tensors) == (step == 1)
    distill(parse(base), out, echo=lambda line: None)
    assert weights(out) == weights(tmp_path / "whole")
    assert len(list((hop / "responses").iterdir())) == 3


class Killed(BaseException):
    """What no handler takes for an error to save after."""


def dying_at(name, call):
    """The function of that name, which ends the run at its call-th call."""
    module, _, function = name.rpartition(".")
    real, calls = getattr(importlib.import_module(module), function), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    return dying
