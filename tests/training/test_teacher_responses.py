"""The teacher's responses to the training prompts: drawn once, kept, the same however the drawing was cut up."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import build_llama, build_tokenizer

from mskd.config import ConfigError, parse
from mskd.config.hardware import detect
from mskd.config.phases import KdPhase, SeqkdPhase, TeacherResponses
from mskd.data.instructions import Example, Splits
from mskd.models import Teacher
from mskd.sampling.rollout import Interrupted
from mskd.store.hashes import stream_seed
from mskd.training.job import Job
from mskd.training.work import teacher_responses as responses

PROMPTS = [tuple(range(4 + i, 8 + 2 * i)) for i in range(20)]


@pytest.fixture
def job(tmp_path):
    tokenizer = build_tokenizer()
    models = {"teacher": {"source": "x"}, "student": {"source": "x"}}
    phase = SeqkdPhase(steps=1)
    tree = {"models": models, "chain": {"paths": [["teacher", "student"]]}, "phases": [phase.model_dump()]}
    return Job(
        name="hop", directory=tmp_path, seed=0, phases=(phase,), student=build_llama(tokenizer, layers=1, seed=1),
        tokenizer=tokenizer, ends=(tokenizer.eos_token_id,), text=(),
        config=parse(tree), hardware=detect("cpu"), accelerator=Accelerator(cpu=True),
        teacher=Teacher(build_llama(tokenizer, layers=2, seed=2).requires_grad_(False), "fp32"),
        data=Splits(tuple(Example(str(p), p, (9, 2), ("x",)) for p in PROMPTS), (), (), ""),
    )  # fmt: skip


def asked(**changes):
    return TeacherResponses(max_new_tokens=6, batch_size=1, **changes)


def files(job):
    return {p.name: p.read_text() for p in sorted((job.directory / "responses").iterdir())}


def test_they_are_the_teachers_draws_and_are_never_drawn_again(job, monkeypatch):
    examples = responses.answered(job, asked(), index=3, seed=5)
    assert [e.prompt_ids for e in examples] == PROMPTS and all(1 <= len(e.response_ids) <= 6 for e in examples)
    assert all(e.response_ids[-1] == 2 or len(e.response_ids) == 6 for e in examples)
    for i, (prompt, found) in enumerate(zip(PROMPTS, examples, strict=True)):  # alone, from the model itself
        u = responses.uniforms(stream_seed(5, "teacher_responses"), torch.tensor([i]), torch.tensor(range(6)))
        ids, drawn = list(prompt), []
        while len(drawn) < 6 and drawn[-1:] != [2]:
            with torch.no_grad():
                mass = job.teacher.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).cumsum(0)
            drawn.append(int((mass <= u[len(drawn)]).sum()))
            ids.append(drawn[-1])
        assert tuple(drawn) == found.response_ids
    assert list(files(job)) == ["3-00000.jsonl", "3-00001.jsonl", "3-00002.jsonl"]
    line = json.loads(files(job)["3-00001.jsonl"].splitlines()[0])
    assert line["example"] == 8 and line["by"] == "teacher" and tuple(line["ids"]) == examples[8].response_ids
    monkeypatch.setattr(responses, "sample", None)
    assert responses.answered(job, asked(), index=3, seed=5) == examples


def test_greedy_is_greedy_and_a_share_of_the_datas_responses_is_kept(job):
    examples = responses.answered(job, asked(top_k=1, data_share=0.4), index=0, seed=1)
    kept = [e for e in examples if e.response_ids == (9, 2)]
    assert 3 <= len(kept) <= 13  # of 20
    by = [json.loads(line)["by"] for text in files(job).values() for line in text.splitlines()]
    assert by.count("data") == len(kept) and by.count("teacher") == 20 - len(kept)
    for e in [e for e in examples if e not in kept][:4]:
        ids = list(e.prompt_ids)
        for token in e.response_ids:
            with torch.no_grad():
                assert int(job.teacher.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_a_stop_keeps_the_parts_that_are_done_and_the_rest_comes_out_the_same(job, tmp_path):
    whole = responses.answered(replace(job, directory=tmp_path / "whole"), asked(), index=0, seed=5)
    calls = iter(range(1000))
    stopped = replace(job, stop=lambda: next(calls) > 70)
    with pytest.raises(Interrupted):
        responses.answered(stopped, asked(), index=0, seed=5)
    done = files(job)
    assert 0 < len(done) < 3
    told = []
    assert responses.answered(job, asked(), index=0, seed=5, tick=lambda *at: told.append(at)) == whole
    assert [at for at, _ in told] == [8 * i for i in range(len(done), 3)]
    assert files(job) == files(replace(job, directory=tmp_path / "whole"))


def test_two_processes_share_the_parts_out(job, tmp_path):
    whole = responses.answered(replace(job, directory=tmp_path / "whole"), asked(), index=0, seed=5)

    def of(rank):
        two = SimpleNamespace(num_processes=2, process_index=rank, wait_for_everyone=lambda: None)
        return replace(job, accelerator=two)

    with pytest.raises(FileNotFoundError):  # the other one's part, which is waited for in truth
        responses.answered(of(1), asked(), index=0, seed=5)
    assert list(files(job)) == ["0-00001.jsonl"]
    assert responses.answered(of(0), asked(), index=0, seed=5) == whole


def test_the_students_vocabulary_bounds_the_teachers(job):
    job.student.resize_token_embeddings(40)
    examples = responses.answered(job, asked(), index=0, seed=5)
    assert max(t for e in examples for t in e.response_ids) < 40


@pytest.mark.parametrize("content", ["", "no json\n", '{"example": 0, "ids": [1]}\n', b"\xff\n"])
def test_a_damaged_part_is_one_line(job, content):
    responses.answered(job, asked(), index=0, seed=5)
    file = job.directory / "responses" / "0-00001.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"^damaged: .*0-00001\.jsonl: .*; delete it and run the same") as caught:
        responses.answered(job, asked(), index=0, seed=5)
    assert "\n" not in str(caught.value)


def test_one_other_token_in_a_part_is_found_and_never_trained_on(job):
    whole = responses.answered(job, asked(), index=0, seed=5)
    file = job.directory / "responses" / "0-00001.jsonl"
    first, *rest = file.read_text().splitlines()
    changed = json.loads(rest[1])
    changed["ids"][0] += 1
    file.write_text("\n".join([first, rest[0], json.dumps(changed), *rest[2:]]) + "\n")
    with pytest.raises(ConfigError, match=r"^damaged: .*0-00001\.jsonl: its lines are not those that were written"):
        responses.answered(job, asked(), index=0, seed=5)
    file.unlink()
    assert responses.answered(job, asked(), index=0, seed=5) == whole


def test_parts_of_earlier_versions_have_no_digest_and_are_read(job):
    whole = responses.answered(job, asked(), index=0, seed=5)
    for file in (job.directory / "responses").iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        del lines[0]["digest"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert responses.answered(job, asked(), index=0, seed=5) == whole


def test_a_phase_trains_on_them_where_it_says_so(job):
    from mskd.training.work.source import source_of

    two = replace(job, phases=(SeqkdPhase(steps=1, batch_size=20, teacher_responses=asked()), KdPhase(steps=1)))
    examples = responses.answered(two, asked(), index=0, seed=5)
    (batch, loss), *rest = source_of(two, 0, 5).work(0)
    assert loss.term == "sft"
    trained = sum(len(b.targets) for b, _ in [(batch, loss), *rest])
    assert trained == sum(len(e.response_ids) for e in examples)
    assert source_of(two, 1, 5).examples is job.data.train
