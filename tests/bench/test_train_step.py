"""The benchmark of a whole round: its sides agree, its schedule is the scripts', its gate refuses, its parts add up."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import lmops, parts, train_step
from bench.harness import ROOT, read_results
from bench.lengths import Answers, random_prompts, uniform
from bench.lmops import Lmops, Mixed
from bench.mskd_round import Mskd
from bench.parts import Parts, held
from bench.plain_loss import plain_loss
from bench.round_case import Case
from bench.shapes import SHAPES, random_model
from mskd.config.hardware import detect
from mskd.sampling.rollout import sample

END = 511  # of the tiny models
SAMPLING = {"eos_id": END, "pad_id": END, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5}


@pytest.fixture(scope="module")
def case():
    return Case("tiny", 1, replace(train_step.SMOKE, rollouts=6, batch=3), detect("cpu"))


@pytest.fixture(scope="module")
def models():
    upper, lower = SHAPES["tiny"][1]
    return random_model(lower, seed=0), random_model(upper, seed=1)


# -- lengths.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers():
    prompts = random_prompts(uniform(20, (2, 9), 1), END + 1, 2)
    return prompts, Answers(prompts, uniform(20, (1, 30), 3), END)


@pytest.mark.parametrize("mix_alpha", [0.0, 0.2])
@pytest.mark.parametrize("batch_size", [3, 20])
def test_mskd_samples_answers_of_the_given_lengths(models, answers, mix_alpha, batch_size):
    prompts, lengths = answers
    options = {**SAMPLING, "max_new_tokens": 30, "mix_alpha": mix_alpha, "batch_size": batch_size}
    rollout = lengths.sample(*models, prompts, **options, sequence_ids=range(20))
    assert rollout.response_lengths.tolist() == lengths.of(prompts)
    free = sample(*models, prompts, **options, sequence_ids=range(20))
    with pytest.raises(ValueError, match="an answer of"):
        lengths.check(prompts, free.responses())


def test_transformers_samples_answers_of_the_given_lengths(models, answers):
    prompts, lengths = answers
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(p)) + list(p) for p in prompts])
    out = models[0].generate(
        ids,
        attention_mask=(ids != END).long(),
        do_sample=True,
        max_new_tokens=30,
        logits_processor=lengths.processors(prompts),
    )
    responses = [row[: row.index(END) + 1] for row in out[:, width:].tolist()]
    lengths.check(prompts, responses)
    with pytest.raises(ValueError, match="end tokens at"):
        lengths.check(prompts, [[END] * len(r) for r in responses])


# -- parts.py ---------------------------------------------------------------------------------------


def test_a_part_inside_another_stops_its_clock(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 7.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(ticks))
    clock = Parts(torch.device("cpu"))
    with clock("outer"):
        clock.timed("inner", lambda: None)()
    assert clock.take() == {"outer": 1.0 + 4.0, "inner": 2.0}
    assert clock.take() == {}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_held_is_the_peak_and_not_what_is_left():
    size = 64 * 2**20
    with held(torch.device("cpu")) as memory:
        both = torch.ones(2 * size // 4)
        del both
        kept = torch.ones(size // 4)
    assert kept.sum() == size // 4
    assert memory.peak == pytest.approx(2 * size, rel=0.1)


# -- lmops.py ---------------------------------------------------------------------------------------


def test_the_teacher_beside_generate_gives_the_mixture(models):
    """Its cache, fed token by token with left-padded prompts, agrees with whole passes without padding."""
    student, teacher = models
    prompts = [(3, 1, 4, 1, 5), (9, 2)]
    ids = torch.tensor([[3, 1, 4, 1, 5], [END, END, END, 9, 2]])
    mixed = Mixed(teacher, (ids != END).long(), alpha=0.2)
    for token in ([7, 8], [11, 12], [20, 21]):
        got = mixed(ids, torch.stack([student(torch.tensor([p])).logits[0, -1] for p in prompts]))
        for row, p in zip(got, prompts, strict=True):
            q, t = (m(torch.tensor([p])).logits[0, -1].softmax(-1) for m in (student, teacher))
            torch.testing.assert_close(row, (0.8 * q + 0.2 * t).log(), atol=1e-4, rtol=0)
        prompts = [(*p, t) for p, t in zip(prompts, token, strict=True)]
        ids = torch.cat([ids, torch.tensor(token)[:, None]], 1)


def test_the_scripts_score_a_rollout_as_mskd_does(case):
    """Log q_old and the weights that mskd keeps are those that padded passes over full logits find."""
    phase = case.phase()
    stats, rollout = Mskd(case, phase).first_loss()
    case.student.zero_grad(set_to_none=True)
    store = Lmops(case, phase).store(rollout)
    old, mask = rollout.padded(rollout.old_logprobs)
    T = mask.shape[1]
    torch.testing.assert_close(store.old[:, :T][mask], rollout.old_logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(store.weights[:, :T][mask], rollout.importance_weights, atol=1e-4, rtol=0)
    assert not store.old[:, T:].any() and not store.rewards[:, :T][~mask].any()


def test_a_round_of_the_scripts_runs_every_step_and_trains(case):
    case.restore()
    phase, single = case.phase(lr=1e-3), []
    side = Lmops(case, phase)
    plain = side.loss

    def loss(batch):
        value = plain(batch)
        single.append(side.logged["reg_loss"])
        return value

    side.loss = loss
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        side.run(case.prompts)
    assert len(single) == phase.ppo_epochs * phase.rollouts // phase.batch_size
    assert single[-1] < single[0]
    assert set(case.parts.take()) == {"rollout", "second rollout", "teacher", "scoring", "loss", "optimizer"}
    assert set(side.logged) == {"rev_kl", "pg_loss", "reg_loss", "rl_loss", "reward"}
    case.restore()


def test_an_objective_that_the_scripts_have_not_is_refused(case):
    with pytest.raises(ValueError, match="no whitening"):
        Lmops(case, case.phase(whiten=True))


# -- the comparison ---------------------------------------------------------------------------------


def test_the_sides_agree_and_a_wrong_one_is_not_timed(case, monkeypatch):
    assert train_step.check(case, None) == {}
    entropy = lmops._entropy
    monkeypatch.setattr(lmops, "_entropy", lambda logits, cut: 1.001 * entropy(logits, cut))
    wrong = train_step.check(case, None)
    assert list(wrong) == ["lmops"] and "error" in wrong["lmops"]
    rows = train_step.timed(case, case.phase(), {"mskd": lambda: None, "lmops": pytest.fail}, wrong, rounds=1)
    assert [row["provider"] for row in rows if "ms_p50" in row] == ["mskd"]
    assert [row["provider"] for row in rows if "wrong" in row] == ["lmops"]


def test_the_gate_sees_a_weight_that_is_wrong_in_mskd(case, monkeypatch):
    from mskd.sampling.rollout import Rollout

    true = Rollout.importance_weights.fget
    monkeypatch.setattr(Rollout, "importance_weights", property(lambda self: true(self).clamp(max=1.0)))
    assert list(train_step.check(case, None)) == ["mskd"]


def test_the_plain_policy_term_is_the_formula(case):
    """At q = q_old: minus the mean of A w, w clipped, where A is the discounted return over the tokens left."""
    phase = case.phase()
    _, rollout = Mskd(case, phase).first_loss()
    case.student.zero_grad(set_to_none=True)
    total, single = plain_loss(case.student, case.teacher, rollout, phase)
    lengths = rollout.response_lengths.tolist()
    rewards = (rollout.teacher_logprobs - rollout.old_logprobs).div(phase.reward_scaling).split(lengths)
    low, high, expected = 1 - phase.clip, 1 + phase.clip, 0.0
    for r, w in zip(rewards, rollout.importance_weights.split(lengths), strict=True):
        for t in range(len(r)):
            future = sum(phase.gamma**k * float(r[t + k]) for k in range(len(r) - t)) / (len(r) - t)
            expected -= future * float(w[t].clamp(min=low) if future < 0 else w[t].clamp(max=high))
    assert (total - single).item() == pytest.approx(expected / len(rollout.old_logprobs), rel=1e-3, abs=1e-5)


def test_smoke_gives_a_row_for_every_side(tmp_path):
    pytest.importorskip("trl")
    command = [sys.executable, "-m", "bench.train_step", "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    rows = document["rows"]
    assert [row["provider"] for row in rows] == ["mskd", "lmops", "mskd", "trl"] and document["left_out"] == {}
    for row in rows:
        assert 0.7 * row["ms_p20"] < 1e3 * sum(row["seconds"].values()) < 1.3 * row["ms_p80"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["answer_tokens"] / row["ms_p50"])
    assert "prompts of (2, 8) tokens, answers of (2, 12)" in done.stdout
    (path,) = tmp_path.glob("*.json")
    assert len(read_results(path)["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hop", "9"], "smollm2 has the hops 1 to 2"),
        (["--rollouts", "6", "--batch", "4"], "rollouts must be a multiple of batch"),
        (["--phases", "0"], "no number may be below 1"),
        (["--recipe", "llama"], "invalid choice: 'llama'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_step.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
