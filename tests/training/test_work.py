"""Forwards of little padding: how sequences are cut and packed, and that losses and gradients stay what they were."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import FAMILY_CONFIGS, PAD, V, apart, build
from tiny import build_llama, build_tokenizer
from transformers import AttentionInterface

from mskd.config import ConfigError, parse
from mskd.config.hardware import detect
from mskd.config.phases import KdPhase, MinillmPhase
from mskd.data.instructions import Example, Splits
from mskd.data.packing import REAL, cut, fill_rows
from mskd.models import Student, Teacher, check_offload
from mskd.models.batch import SequenceBatch
from mskd.models.offload import Waiting
from mskd.training import objective
from mskd.training.hop import backward, real_tokens
from mskd.training.job import Job
from mskd.training.work.microbatches import forwards, lay_out
from mskd.training.work.on_policy import OnPolicy


def lengths_of(kind, n, seed=0):
    draw = random.Random(seed)
    return {
        "even": [37] * n,
        "uniform": [draw.randint(32, 384) for _ in range(n)],
        "one long": [*[draw.randint(8, 16) for _ in range(n - 1)], 500],
        "powers": [2 ** draw.randint(0, 9) for _ in range(n)],
    }[kind]


def share(lengths, forwards):
    padded = sum(len(part) * max(lengths[i] for i in part) for part in forwards)
    return sum(lengths) / padded


@pytest.mark.parametrize("kind", ["even", "uniform", "one long", "powers"])
@pytest.mark.parametrize(("n", "most"), [(1, 8), (7, 3), (64, 16)])
def test_forwards_are_real_to_95_percent_and_hold_each_sequence_once(kind, n, most):
    lengths = lengths_of(kind, n)
    for batching in ("bucket", "pack"):
        forwards = cut(lengths, most, batching)
        assert sorted(i for part in forwards for i in part) == list(range(n))
        assert max(map(len, forwards)) <= most
    assert share(lengths, cut(lengths, most, "bucket")) >= REAL
    for part in cut(lengths, most, "pack"):
        own = [lengths[i] for i in part]
        rows = fill_rows(own)
        assert sorted(i for row in rows for i in row) == list(range(len(own)))
        assert sum(own) >= REAL * len(rows) * max(sum(own[i] for i in row) for row in rows)
    assert len(fill_rows(lengths, most=1)) == 1


def every_cut(lengths, most):
    """All ways to cut lengths, in order of length, into spans of at most `most`."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for bits in range(2 ** (len(order) - 1)):
        spans, start = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or bits >> (end - 1) & 1:
                spans.append(order[start:end])
                start = end
        if max(map(len, spans)) <= most:
            yield spans


@pytest.mark.parametrize("seed", range(4))
def test_of_all_cuts_the_buckets_are_the_fewest_and_then_the_tightest(seed):
    draw = random.Random(seed)
    lengths, most = [draw.randint(1, 60) for _ in range(10)], draw.randint(2, 10)
    good = [(len(c), -share(lengths, c)) for c in every_cut(lengths, most) if share(lengths, c) >= REAL]
    found = cut(lengths, most, "bucket")
    assert (len(found), -share(lengths, found)) == pytest.approx(min(good))


def test_nothing_to_cut():
    assert cut([], 4, "bucket") == cut([], 4, "pack") == fill_rows([]) == []


def sequences(n=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = [(3 + i % 4, 2 + (5 * i) % 11) for i in range(n)]
    ids = [torch.randint(2, V, (p + r,), generator=draw).tolist() for p, r in sizes]
    return [x[:p] for x, (p, _) in zip(ids, sizes, strict=True)], [x[p:] for x, (p, _) in zip(ids, sizes, strict=True)]


def laid_out(prompts, responses, how):
    """Forwards over the sequences, and the order in which their targets come."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    parts = [list(range(len(prompts)))] if how == "padded" else cut(lengths, 4, how.split()[0])
    for part in parts:
        rows = fill_rows([lengths[i] for i in part], most=1 if how == "pack one row" else None)
        yield SequenceBatch.from_sequences(
            [prompts[i] for i in part], [responses[i] for i in part], PAD, rows=rows if "pack" in how else None
        )


def step(student, teacher, how):
    """Loss and gradients of one batch of sequences, all forwards together."""
    prompts, responses = sequences()
    batches = list(laid_out(prompts, responses, how))
    tokens = sum(len(b.targets) for b in batches)
    total = 0.0
    student.zero_grad(set_to_none=True)
    for batch in batches:
        phase = KdPhase(steps=1, kd_ratio=0.5)
        loss = objective.kd_loss(batch, teacher.hidden(batch), teacher.head, phase)
        value, _ = student(batch, loss.over(tokens))
        value.backward()
        total += float(value.detach())
    return total, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_padded_bucketed_and_packed_give_the_same_loss_and_gradients(family, attention):
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 soft-caps its attention scores, which SDPA cannot")
    models_ = build(FAMILY_CONFIGS[family], seed=1), build(FAMILY_CONFIGS[family], seed=2)
    for model in models_:
        model.set_attn_implementation(attention)
    student, teacher = Student(models_[0]).eval(), Teacher(models_[1].requires_grad_(False), "fp32")
    expected, wanted = step(student, teacher, "padded")
    for how in ("bucket", "pack", "pack one row"):
        loss, gradients = step(student, teacher, how)
        assert loss == pytest.approx(expected, rel=1e-5), how
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():  # that of a key's bias is 0 but for rounding
            assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, f"{how} {name}"


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_attention_is_told_the_positions_from_which_flash_attn_knows_the_sequences_of_a_row(family):
    told = []

    def spy(module, query, key, value, mask, position_ids=None, **options):
        told.append(position_ids)
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("spy", spy)
    model = build(FAMILY_CONFIGS[family])
    model.set_attn_implementation("spy")
    prompts, responses = sequences(3)
    batch = SequenceBatch.from_sequences(prompts, responses, PAD, rows=[[0, 1, 2]])
    Teacher(model, "fp32").hidden(batch)
    assert len(told) == model.config.num_hidden_layers
    assert all(torch.equal(positions, batch.position_ids) for positions in told)


def test_packed_rows_keep_the_order_of_the_targets():
    prompts, responses = [[5, 6], [7], [8, 9, 10]], [[11], [12, 13], [14]]
    batch = SequenceBatch.from_sequences(prompts, responses, PAD, rows=[[2, 1], [0]])
    assert batch.input_ids.tolist() == [[8, 9, 10, 14, 7, 12, 13], [5, 6, 11, PAD, PAD, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [7, 3]
    assert batch.targets.tolist() == [11, 12, 13, 14]
    assert batch.positions.tolist() == [8, 4, 5, 2]
    assert batch.input_ids.flatten()[batch.positions].tolist() == [6, 7, 12, 10]
    with pytest.raises(ValueError, match="each of the 3 sequences once"):
        SequenceBatch.from_sequences(prompts, responses, PAD, rows=[[0, 1], [1]])


# -- a round of an on-policy phase -----------------------------------------------------------------


def round_of(teacher_model=None, *, objective_name="minillm", text=(), **train):
    """A source of steps over a tiny Llama's own samples, and its job."""
    tokenizer = build_tokenizer()
    phase = MinillmPhase.model_validate(
        {"objective": objective_name, "steps": 8, "rollouts": 8, "rollout_batch_size": 3, "batch_size": 4,
         "micro_batch_size": 4, "ppo_epochs": 2, "max_new_tokens": 12, "warmup_steps": 0}
    )  # fmt: skip
    models = {"teacher": {"source": "x"}, "student": {"source": "x"}}
    tree = {"models": models, "chain": {"paths": [["teacher", "student"]]}, "phases": [phase.model_dump()]}
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(4, 300) for _ in range(draw.randint(2, 20))) for _ in range(12)]
    job = Job(
        name="round", directory=Path(), seed=0, phases=(phase,), student=build_llama(tokenizer, layers=2, seed=1),
        tokenizer=tokenizer, ends=(tokenizer.eos_token_id,),
        data=Splits(tuple(Example("", p, (), ()) for p in prompts), (), (), ""), text=text,
        teacher=Teacher((teacher_model or build_llama(tokenizer, layers=3, seed=2)).requires_grad_(False), "fp32"),
        config=parse(tree | {"train": train}), hardware=detect("cpu"), accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    return OnPolicy(job, phase, seed=5), job


def losses(job, micros):
    student = Student(job.student).eval()
    return [student(batch, loss.over(1.0))[0] for batch, loss in micros]


def test_hidden_states_kept_for_the_round_give_the_losses_of_a_fresh_pass_of_the_teacher():
    source, job = round_of()
    for step in range(4):
        kept = losses(job, source.work(step))
        number, inside = divmod(step, source.steps_per_round)
        chosen = source._batch(number, *divmod(inside, source.batches))
        parts = forwards(job, source.rollout.offsets.diff()[chosen].tolist(), source.phase.micro_batch_size)
        fresh = []
        for part in ([chosen[i] for i in p] for p in parts):
            rollout = source.rollout.select(part)
            batch = lay_out(job, rollout.prompts(), rollout.responses())
            hidden = job.teacher.hidden(batch)
            assert apart(source.teacher_hidden.get(part), hidden) < 1e-4
            advantages = source.advantages[source.rollout.token_indices(part)]
            loss = objective.minillm_loss(rollout, advantages, hidden, job.teacher.head, source.phase)
            fresh.append(losses(job, [(batch, loss)])[0])
        torch.testing.assert_close(torch.stack(kept), torch.stack(fresh), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_a_step_has_little_padding_the_plain_text_included_and_is_made_again_the_same(batching):
    text = tuple(tuple(range(4, 4 + n)) for n in (30, 30, 30, 7))
    source, job = round_of(objective_name="lmops", text=text, batching=batching)
    again, _ = round_of(objective_name="lmops", text=text, batching=batching)
    for step in range(4):
        micros = source.work(step)
        assert {loss.term for _, loss in micros} == {"minillm", "lm"}
        assert real_tokens(job.accelerator, micros) >= REAL
        if step == 2:  # a round that goes on from its saved state
            again.restore(step, source.state(step))
        if step >= 2:
            for (batch, loss), (other, other_loss) in zip(micros, again.work(step), strict=True):
                assert torch.equal(batch.input_ids, other.input_ids)
                assert torch.equal(*losses(job, [(batch, loss), (other, other_loss)]))


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_scores_of_a_round_come_in_the_order_of_its_sequences(batching):
    source, job = round_of(batching=batching)
    source.phase = source.phase.model_copy(update={"mix_alpha": 0.0})  # sampling then leaves the teacher out
    source.work(0)
    for i in range(len(source.rollout)):
        alone = source.rollout.select([i])
        batch = alone.to_batch(2)
        hidden = job.teacher.hidden(batch)
        assert apart(source.teacher_hidden.get([i]), hidden) < 1e-4
        scores = (hidden @ job.teacher.head.weight.T).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(alone.teacher_logprobs, scores, rtol=0, atol=1e-3)  # another's are off by 1


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        source, job = round_of()
        student = Student(job.student, gradient_checkpointing=checkpointing)
        backward(job.accelerator, student, source.work(0))
        found.append({n: p.grad for n, p in student.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


# -- where the teacher lies ------------------------------------------------------------------------


def test_a_teacher_that_waits_is_lent_whole_and_goes_home_again():
    model = build_llama(build_tokenizer(), layers=2)
    head = model.lm_head.weight
    batch = SequenceBatch.from_sequences(*sequences(), PAD)
    expected = Teacher(model, "fp32").hidden(batch)
    waiting = Waiting(model, stay=[head], device=torch.device("cpu"))  # lends copies, as to a GPU
    teacher = Teacher(model, "fp32", waiting)
    others = [p for p in [*model.parameters(), *model.buffers()] if p is not head]
    home, stayed = [p.data_ptr() for p in others], head.data_ptr()
    assert home == [t.data_ptr() for t in waiting.home]
    with teacher.on_device():
        lent = [p.data_ptr() for p in others]
        assert not set(lent) & set(home) and head.data_ptr() == stayed
        assert torch.equal(teacher.hidden(batch), expected)
        assert [p.data_ptr() for p in others] == lent
    assert [p.data_ptr() for p in others] == home
    with pytest.raises(KeyError), teacher.on_device():
        raise KeyError  # it goes home then too
    assert [p.data_ptr() for p in others] == home
    assert torch.equal(teacher.hidden(batch), expected)


def test_offloading_that_cannot_be_is_refused():
    cpu = detect("cpu")
    with pytest.raises(ConfigError, match="run.teacher_offload: on a CPU the teacher is in host memory already"):
        check_offload("int8", cpu)
    with pytest.raises(ConfigError, match="the weights of LLM.int8 cannot be moved; use int8"):
        check_offload("llm_int8", replace(cpu, device=torch.device("cuda")))
