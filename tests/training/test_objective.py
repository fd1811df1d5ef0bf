"""The objective against plain-torch oracles, written from its formulas: full logits, sequence by sequence, float64."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from mskd.config.phases import DistillmPhase, GkdPhase, KdPhase, MinillmPhase
from mskd.models import Head, Student, Teacher, head_of
from mskd.models.batch import SequenceBatch
from mskd.sampling.rollout import Rollout, sample
from mskd.training import objective

EOS = 1
PROMPTS = [[5, 2, 7], [3], [9, 8, 7, 6, 5, 4, 3], [2, 2], [4, 4, 4, 4, 4], [10], [6, 5], [8, 3, 2, 9]]


def gpt2(vocab_size, seed, std=0.5):
    """A GPT-2, since float64 goes all the way through it: Llama's norm and rotary embedding compute in fp32."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=std,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).double().eval()


def teacher_of(model):
    return Teacher(model.requires_grad_(False), "fp32")


def moved(model, seed, by=0.03):
    """A copy of a model that has learnt a little since."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    for p in other.parameters():
        p.data += by * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return other


def rolled_out(student, teacher, *, pad_id=0, temperature=1.0, mix_alpha=0.2, prompts=PROMPTS):
    rollout = sample(
        student, teacher, prompts, eos_id=EOS, pad_id=pad_id, max_new_tokens=12, mix_alpha=mix_alpha,
        temperature=temperature, top_p=1.0, top_k=0, batch_size=5, seed=3, sequence_ids=range(len(prompts)),
    )  # fmt: skip
    return (
        scored(rollout, teacher, MinillmPhase(mix_alpha=mix_alpha, temperature=temperature)) if mix_alpha else rollout
    )


def scored(rollout, model, phase):
    frozen = Teacher(model, "fp32")
    return objective.score(rollout, frozen.hidden(rollout.to_batch(EOS)), frozen.head, phase)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_equal(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# -- the oracle: formulas, and nothing of mskd in them ---------------------------------------------------------------


def oracle_logprobs(model, prompt, response, temperature=1.0):
    """log q(. | prefix) before each response token, [T, V], from a forward of this sequence alone."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def oracle_advantages(rewards, preset):
    """rewards: one list a sequence."""
    out = []
    for rho in rewards:
        T = len(rho)
        for t in range(T):
            if preset == "minillm":  # the mean of what comes after t
                later = rho[t + 1 :]
                out.append(sum(later) / len(later) if later else 0.0)
            else:
                clipped = [min(max(r / 0.5, -100.0), 100.0) for r in rho]
                out.append(sum(0.95 ** (u - t) * clipped[u] for u in range(t, T)) / (T - t))
    if preset == "lmops":
        mean = sum(out) / len(out)
        var = sum((x - mean) ** 2 for x in out) / len(out)
        out = [(x - mean) / math.sqrt(var + 1e-8) for x in out]
    return out


def oracle_token(lq, lp, y, old, A, w, preset, eps=0.2):
    """Loss of one token, its reverse KL, and whether the clip holds."""
    K = (lq.exp() * (lq - lp)).sum()
    x = w * (lq[y] - old).exp()
    policy = torch.maximum(-A * x, -A * x.clamp(1 - eps, 1 + eps))
    held = bool(-A * x.clamp(1 - eps, 1 + eps) > -A * x)
    return (w if preset == "minillm" else 1.0) * K + policy, K, held


def oracle_minillm(student, teacher, old_student, sequences, preset, temperature, alpha, logits=None):
    """(sum over tokens / tokens, statistics). logits: leaves [T, V] a sequence in place of the student's forward."""
    rewards, constants = [], []
    for prompt, response in sequences:
        with torch.no_grad():
            old = oracle_logprobs(old_student, prompt, response, temperature)
            lp = oracle_logprobs(teacher, prompt, response, temperature)
        y = torch.tensor(response)
        q_old, p = (x.gather(1, y[:, None])[:, 0] for x in (old, lp))
        w = q_old.exp() / (alpha * p.exp() + (1 - alpha) * q_old.exp())
        rewards.append((p - q_old).tolist())
        constants.append((lp, q_old, w))
    advantages = iter(oracle_advantages(rewards, preset))
    total, n, stats = (
        torch.zeros((), dtype=torch.float64),
        0,
        {"reverse_kl": 0.0, "clipped": 0, "ratio": 0.0, "entropy": 0.0},
    )
    for i, ((prompt, response), (lp, old, w)) in enumerate(zip(sequences, constants, strict=True)):
        if logits is None:
            lq = oracle_logprobs(student, prompt, response, temperature)
        else:
            lq = (logits[i] / temperature).log_softmax(-1)
        for t, y in enumerate(response):
            loss, K, held = oracle_token(lq[t], lp[t], y, old[t], next(advantages), w[t], preset)
            total, n = total + loss, n + 1
            stats["reverse_kl"] += float(K.detach())
            stats["clipped"] += held
            stats["ratio"] += float((lq[t][y] - old[t]).exp().detach())
            stats["entropy"] += float(-(lq[t].exp() * lq[t]).sum().detach())
    return total / n, stats | {"tokens": n}


def oracle_supervised(student, teacher, sequences, kd_ratio, temperature=1.0):
    """((1 - kd_ratio) CE + kd_ratio T^2 KL(p || q) at T) / tokens."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for prompt, response in sequences:
        lq1 = oracle_logprobs(student, prompt, response)
        lq, lp = (oracle_logprobs(m, prompt, response, temperature) for m in (student, teacher))
        for t, y in enumerate(response):
            kl = (lp[t].exp() * (lp[t] - lq[t])).sum()
            total, n = total + (1 - kd_ratio) * -lq1[t, y] + kd_ratio * temperature**2 * kl, n + 1
    return total / n


# -- both presets against the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, EOS])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("preset", ["minillm", "lmops"])
def test_presets_equal_the_oracle(preset, temperature, pad_id):
    """Loss, statistics and every parameter's gradient, over ragged micro-batches of one optimizer batch."""
    phase = MinillmPhase(objective=preset, temperature=temperature)
    old, teacher = gpt2(12, 1), gpt2(12, 2)
    student = moved(old, 3)
    rollout = rolled_out(old, teacher, pad_id=pad_id, temperature=temperature, mix_alpha=phase.mix_alpha)
    sequences = list(zip(rollout.prompts(), rollout.responses(), strict=True))
    assert len({len(r) for _, r in sequences}) > 2 and any(r[-1] == EOS for _, r in sequences)

    expected, expected_stats = oracle_minillm(student, teacher, old, sequences, preset, temperature, phase.mix_alpha)
    expected.backward()
    wanted = gradients(student)
    assert 0 < expected_stats["clipped"] < expected_stats["tokens"]
    student.zero_grad()

    frozen, trained = teacher_of(teacher), Student(student)
    hidden = frozen.hidden(rollout.to_batch(pad_id))
    advantages = objective.advantages(rollout, phase)
    n = len(advantages)
    totals = {}
    for places in ([4, 0, 7], [6, 1, 2, 3, 5]):
        part, flat = rollout.select(places), rollout.token_indices(places)
        loss = objective.minillm_loss(part, advantages[flat], hidden[flat], frozen.head, phase)
        value, stats = trained(part.to_batch(pad_id), loss.over(n))
        value.backward()
        for name, x in {"loss": value.detach(), **stats}.items():
            assert not x.requires_grad
            totals[name] = totals.get(name, 0.0) + float(x)
    assert totals["loss"] == pytest.approx(float(expected.detach()), abs=1e-9)
    for name, x in expected_stats.items():
        assert totals[name] == pytest.approx(x, abs=1e-4 if name == "clipped" else 1e-9), name
    assert_equal(gradients(student), wanted)
    means = objective.means(totals, {"minillm": float(n)})
    assert means["tokens"] == n and means["loss"] == totals["loss"]
    assert means["reverse_kl"] == pytest.approx(expected_stats["reverse_kl"] / n)


@pytest.mark.parametrize("preset", ["minillm", "lmops"])
def test_gradients_of_the_logits_equal_the_oracle(preset):
    """An identity for a head makes the hidden states logits."""
    phase = MinillmPhase(objective=preset)
    old, teacher = gpt2(12, 1), gpt2(12, 2)
    rollout = rolled_out(old, teacher)
    sequences = list(zip(rollout.prompts(), rollout.responses(), strict=True))
    with torch.no_grad():
        leaves = [3.0 * oracle_logprobs(moved(old, 3), *s) for s in sequences]
        teacher_logits = torch.cat([oracle_logprobs(teacher, *s) for s in sequences])
    for leaf in leaves:
        leaf.requires_grad_()
    expected, _ = oracle_minillm(None, teacher, old, sequences, preset, 1.0, phase.mix_alpha, logits=leaves)
    expected.backward()
    logits = torch.cat([leaf.detach() for leaf in leaves]).requires_grad_()
    eye = Head(torch.eye(12, dtype=torch.float64))
    loss = objective.minillm_loss(rollout, objective.advantages(rollout, phase), teacher_logits, eye, phase)
    value, _ = loss.over(len(logits))(logits, eye)
    value.backward()
    assert_equal(value, expected)
    assert_equal(logits.grad, torch.cat([leaf.grad for leaf in leaves]))


def oracle_mixed(lq, lp, name, number):
    """Divergence of one token, from the papers' definitions; p teacher, q student."""
    p, q = lp.exp(), lq.exp()

    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    if name == "skew_kl":
        return kl(p, number * p + (1 - number) * q)
    if name == "skew_reverse_kl":
        return kl(q, (1 - number) * p + number * q)
    if number in (0, 1):
        return kl(p, q) if number == 0 else kl(q, p)
    m = number * p + (1 - number) * q
    return number * kl(p, m) + (1 - number) * kl(q, m)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "number", "statistic"),
    [
        ("gkd", 0.0, "forward_kl"),
        ("gkd", 0.3, "jsd"),
        ("gkd", 1.0, "reverse_kl"),
        ("skew_kl", 0.1, "skew_kl"),
        ("skew_reverse_kl", 0.25, "skew_reverse_kl"),
    ],
)
def test_gkd_and_distillm_equal_the_oracle(name, number, statistic, temperature):
    student, teacher = gpt2(12, 1), gpt2(12, 2)
    responses = [[3, 4, EOS], [EOS], [7, 7, 2, 9, 11, EOS], [5, 6]]
    sequences = list(zip(PROMPTS, responses, strict=False))
    n = sum(len(r) for r in responses)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, response in sequences:
        lq = oracle_logprobs(student, prompt, response, temperature)
        lp = oracle_logprobs(teacher, prompt, response, temperature).detach()
        total = total + sum(oracle_mixed(*row, name, number) for row in zip(lq, lp, strict=True))
    (total / n).backward()
    wanted = gradients(student)
    student.zero_grad()
    if name == "gkd":
        phase = GkdPhase(steps=1, beta=number, temperature=temperature)
    else:
        phase = DistillmPhase(steps=1, divergence=name, skew=number, temperature=temperature)
    frozen, trained, found = teacher_of(teacher), Student(student), 0.0
    for part in (sequences[:1], sequences[1:]):
        batch = SequenceBatch.from_sequences([p for p, _ in part], [r for _, r in part], EOS)
        loss = objective.divergence_loss(batch, frozen.hidden(batch), frozen.head, phase)
        value, stats = trained(batch, loss.over(n))
        value.backward()
        assert set(stats) == {"tokens", statistic}
        found += float(stats[statistic])
    assert found == pytest.approx(float(total.detach()), abs=1e-9)
    assert_equal(gradients(student), wanted)


@pytest.mark.parametrize("kd_ratio, temperature", [(1.0, 1.0), (0.5, 2.0), (0.3, 0.7), (0.0, 1.0)])
def test_kd_sft_and_plain_text_equal_the_oracle(kd_ratio, temperature):
    student, teacher = gpt2(12, 1), gpt2(12, 2)
    responses = [[3, 4, EOS], [EOS], [7, 7, 2, 9, 11, EOS], [5, 6], [8, EOS], [2, 3, 4, 5], [10], [9, 9, EOS]]
    sequences = list(zip(PROMPTS, responses, strict=True))
    expected = oracle_supervised(student, teacher, sequences, kd_ratio, temperature)
    expected.backward()
    wanted = gradients(student)
    frozen, trained = teacher_of(teacher), Student(student)
    batches = [
        SequenceBatch.from_sequences([p for p, _ in part], [r for _, r in part], EOS)
        for part in (sequences[:3], sequences[3:])
    ]
    n = sum(len(r) for r in responses)

    def check(make, scale=1.0):
        student.zero_grad()
        total, stats = 0.0, {}
        for batch in batches:
            loss = make(batch, frozen.hidden(batch))
            value, found = trained(batch, loss.over(n))
            value.backward()
            total += float(value.detach())
            for name, x in found.items():
                stats[name] = stats.get(name, 0.0) + float(x)
        assert total == pytest.approx(scale * float(expected.detach()), abs=1e-9)
        assert_equal(gradients(student), [scale * g for g in wanted])
        return stats

    phase = KdPhase(steps=1, kd_ratio=kd_ratio, temperature=temperature)
    stats = check(lambda batch, hidden: objective.kd_loss(batch, hidden, frozen.head, phase))
    assert set(stats) == {"tokens"} | ({"nll"} if kd_ratio < 1 else set()) | ({"forward_kl"} if kd_ratio > 0 else set())
    nll = float(
        sum(-oracle_logprobs(student, p, r).gather(1, torch.tensor(r)[:, None]).sum() for p, r in sequences).detach()
    )
    if kd_ratio < 1:
        assert stats["nll"] == pytest.approx(nll, abs=1e-9) and stats["tokens"] == n
    if kd_ratio == 0:
        assert check(lambda batch, hidden: objective.sft_loss(batch))["nll"] == pytest.approx(nll, abs=1e-9)
    if temperature == 1:
        text = MinillmPhase(kd_ratio=kd_ratio, lm_weight=0.25)
        stats = check(lambda batch, hidden: objective.lm_loss(batch, hidden, frozen.head, text), scale=0.25)
        assert stats["lm_tokens"] == n and all(name.startswith("lm_") for name in stats)


def test_plain_text_term_has_the_gradient_of_the_soft_cross_entropy():
    """The released code's -sum p log q differs from the reported KL by the teacher's entropy alone."""
    student, teacher = gpt2(12, 1), gpt2(12, 2)
    prompts, responses = [[3], [4]], [[5, 6, 7], [8, 9, 2, 3]]
    batch = SequenceBatch.from_sequences(prompts, responses, 0)
    lq = torch.cat([oracle_logprobs(student, p, r) for p, r in zip(prompts, responses, strict=True)])
    with torch.no_grad():
        lp = torch.cat([oracle_logprobs(teacher, p, r) for p, r in zip(prompts, responses, strict=True)])
    (-(lp.exp() * lq).sum() / 7).backward()
    wanted = gradients(student)
    student.zero_grad()
    frozen = teacher_of(teacher)
    loss = objective.lm_loss(batch, frozen.hidden(batch), frozen.head, MinillmPhase(kd_ratio=1.0))
    value, _ = Student(student)(batch, loss.over(7))
    value.backward()
    assert_equal(gradients(student), wanted)
    assert_equal(value.detach() - (lp.exp() * lp).sum() / 7, -(lp.exp() * lq).sum().detach() / 7)


# -- rewards, returns, whitening ------------------------------------------------------------------------------------


def test_returns_of_the_issue():
    rewards, mask = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.ones(1, 3)
    paper = objective.returns(rewards, mask, gamma=1.0, include_current=False)
    assert paper.tolist() == [[2.5, 3.0, 0.0]]
    lmops = objective.returns(rewards, mask, gamma=0.95, include_current=True)
    assert_equal(lmops, torch.tensor([[(1 + 1.9 + 2.7075) / 3, 2.425, 3.0]], dtype=torch.float64))
    assert [round(x, 4) for x in lmops[0].tolist()] == [1.8692, 2.425, 3.0]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.booleans(),
)
def test_returns_equal_their_definition(masks, gamma, include_current):
    """For any mask, with NaN where it is 0."""
    mask = torch.tensor(masks)
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = objective.returns(rewards.masked_fill(~mask, torch.nan), mask, gamma=gamma, include_current=include_current)
    expected = torch.zeros_like(rewards)
    for b, row in enumerate(masks):
        places = [t for t, m in enumerate(row) if m]
        for i, t in enumerate(places):
            later = [float(rewards[b, u]) for u in places[i if include_current else i + 1 :]]
            expected[b, t] = sum(gamma**k * r for k, r in enumerate(later)) / max(len(later), 1)
    assert_equal(found, expected, 1e-12)


def test_rewards_are_scaled_then_clipped():
    p, q = torch.tensor([-1.0, -300.0, 0.0]), torch.tensor([-3.0, -1.0, -120.0])
    assert objective.rewards(p, q, scaling=0.5, clip=100.0).tolist() == [4.0, -100.0, 100.0]
    assert objective.rewards(p, q).tolist() == [2.0, -299.0, 120.0]


def test_whitening_counts_valid_values_only_and_all_processes():
    g = torch.Generator().manual_seed(0)
    x, mask = 3 + 5 * torch.randn(6, 9, generator=g, dtype=torch.float64), torch.rand(6, 9, generator=g) < 0.6
    white = objective.whiten(x.masked_fill(~mask, torch.nan), mask)
    valid = x[mask]
    assert_equal(white[mask], (valid - valid.mean()) / (valid.var(correction=0) + 1e-8).sqrt())
    assert not white[~mask].any()
    assert objective.whiten(torch.full((4,), 2.0)).tolist() == [0.0] * 4
    assert objective.whiten(torch.zeros(0)).shape == (0,)

    # Three processes, one of them without any valid value.
    parts, found, shared, barrier = [slice(0, 2), slice(2, 6), slice(6, 6)], {}, {}, threading.Barrier(3)

    def work(rank):
        def reduce(t):
            shared[rank] = t
            barrier.wait()
            total = sum(shared[r] for r in range(3))
            barrier.wait()
            return total

        found[rank] = objective.whiten(x[parts[rank]], mask[parts[rank]], reduce=reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert_equal(torch.cat([found[r] for r in range(3)]), white, 1e-12)


def test_advantages_of_a_round_are_not_those_of_its_parts():
    """Whitened once over the round: the order of the sequences changes nothing, a part alone would."""
    phase = MinillmPhase(objective="lmops")
    rollout = rolled_out(gpt2(12, 1), gpt2(12, 2))
    whole = objective.advantages(rollout, phase)
    assert abs(whole.mean()) < 1e-12 and whole.std(correction=0) == pytest.approx(1, abs=1e-6)
    places = [3, 1, 7, 0, 2, 6, 5, 4]
    assert_equal(objective.advantages(rollout.select(places), phase), whole[rollout.token_indices(places)], 1e-12)
    assert not torch.allclose(objective.advantages(rollout.select([0, 1]), phase), whole[rollout.token_indices([0, 1])])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_fills_what_an_unmixed_rollout_lacks(temperature):
    """log p at the same temperature, over the common vocabulary, though the teacher's is padded further."""
    student, teacher = gpt2(12, 1), gpt2(16, 2)
    with torch.no_grad():
        teacher.lm_head.weight[12:] *= 40
    rollout = rolled_out(student, teacher, mix_alpha=0.0, temperature=temperature)
    phase = MinillmPhase(temperature=temperature)
    with pytest.raises(ValueError, match="objective.score first"):
        objective.advantages(rollout, phase)
    frozen = teacher_of(teacher)
    scored = objective.score(rollout, frozen.hidden(rollout.to_batch(EOS)), frozen.head, phase)
    expected = []
    for prompt, response in zip(rollout.prompts(), rollout.responses(), strict=True):
        logits = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :12]
        expected.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    assert_equal(scored.teacher_logprobs, torch.cat(expected))
    assert objective.advantages(scored, phase).shape == scored.old_logprobs.shape
    with pytest.raises(ValueError, match="rows given"):
        objective.score(rollout, torch.zeros(1, 16, dtype=torch.float64), frozen.head, phase)
    with pytest.raises(ValueError, match="teacher's hidden states"):
        objective.lm_loss(rollout.to_batch(0), None, None, MinillmPhase(objective="lmops"))


def test_a_forward_without_tokens_is_worth_nothing():
    """A process may have none: its loss is 0 and its gradient too, in every term."""
    student, frozen = gpt2(12, 1), teacher_of(gpt2(12, 2))
    phase = MinillmPhase(objective="lmops")
    empty = rolled_out(student, frozen.model).select([])
    nothing = torch.zeros(0, 16, dtype=torch.float64)
    batch = empty.to_batch(0)
    for loss in (
        objective.minillm_loss(empty, objective.advantages(empty, phase), nothing, frozen.head, phase),
        objective.lm_loss(batch, nothing, frozen.head, phase),
        objective.sft_loss(batch),
    ):
        hidden = nothing.clone().requires_grad_()
        value, stats = loss.over(7.0)(hidden, head_of(student))
        assert float(value.detach()) == 0 and all(float(x) == 0 for x in stats.values())
        value.backward()
        assert all(p.grad is None or not p.grad.any() for p in student.parameters())


# -- what the objective is for --------------------------------------------------------------------------------------


def test_importance_weights_are_bounded_and_average_to_one():
    """0 < w <= 1/(1 - alpha), and E[w_t | prefix] = 1 under p~, summed over the vocabulary for every prefix."""
    alpha, V, T = 0.3, 5, 2
    student, teacher = gpt2(V, 1, 0.3), gpt2(V, 2, 0.3)
    prompt, n = [3, 2], 3000
    rollout = sample(
        student, teacher, [prompt] * n, eos_id=-1, pad_id=0, max_new_tokens=T, mix_alpha=alpha, temperature=1.0,
        top_p=1.0, top_k=0, batch_size=n, seed=0, sequence_ids=range(n),
    )  # fmt: skip
    rollout = scored(rollout, teacher, MinillmPhase(mix_alpha=alpha))
    weights, _ = rollout.padded(rollout.importance_weights)
    assert weights.min() > 0 and weights.max() <= 1 / (1 - alpha) + 1e-12 and weights.max() > 1.05
    seen = {}
    for response, row in zip(rollout.responses(), weights.tolist(), strict=True):
        for t in range(T):
            seen[tuple(response[: t + 1])] = row[t]
    assert len(seen) == V + V * V  # every sequence was drawn
    for prefix in [(), *((v,) for v in range(V))]:
        with torch.no_grad():
            q, p = (m(torch.tensor([prompt + list(prefix)])).logits[0, -1].softmax(-1) for m in (student, teacher))
        mixed = alpha * p + (1 - alpha) * q
        assert sum(float(mixed[v]) * seen[(*prefix, v)] for v in range(V)) == pytest.approx(1, abs=1e-9)


def enumerate_gradients(alpha, clip):
    """(expected gradient of the minillm preset's loss under p~, exact gradient of KL(q || p) of whole sequences).

    3 tokens, 2 positions, no end token: 9 sequences, all enumerated.
    """
    student, teacher = gpt2(3, 1, 0.3), gpt2(3, 2, 0.3)
    phase = MinillmPhase(mix_alpha=alpha, clip=clip)
    prompt, frozen, trained = [2, 0], teacher_of(teacher), Student(student)
    responses = [list(y) for y in itertools.product(range(3), repeat=2)]

    def sequence_logprobs(model):
        rows = [oracle_logprobs(model, prompt, y).gather(1, torch.tensor(y)[:, None])[:, 0] for y in responses]
        return torch.stack(rows)  # [9, 2]

    lq, lp = sequence_logprobs(student), sequence_logprobs(teacher)
    (lq.sum(1).exp() * (lq.sum(1) - lp.sum(1))).sum().backward()
    exact = torch.cat([g.flatten() for g in gradients(student)])
    student.zero_grad()
    old = lq.detach()
    mixed = (alpha * lp.exp() + (1 - alpha) * old.exp()).log()
    for i, y in enumerate(responses):
        rollout = Rollout(
            tokens=torch.tensor(prompt + y), offsets=torch.tensor([0, 4]), prompt_lengths=torch.tensor([2]),
            old_logprobs=old[i], mixture_logprobs=mixed[i], teacher_logprobs=lp[i], vocab_size=torch.tensor(3),
        )  # fmt: skip
        batch = rollout.to_batch(0)
        advantages = objective.advantages(rollout, phase)
        loss = objective.minillm_loss(rollout, advantages, frozen.hidden(batch), frozen.head, phase)
        value, _ = trained(batch, loss.over(1.0))
        (value * mixed[i].sum().exp()).backward()
    return torch.cat([g.flatten() for g in gradients(student)]), exact


def test_expected_gradient_is_that_of_the_sequence_reverse_kl():
    """Unmixed and at the first epoch the objective is the policy gradient of KL(q || p) exactly, for 2 positions.

    (With more, the paper divides the return by what is left of the response, which weights positions differently.)
    """
    expected, exact = enumerate_gradients(alpha=0.0, clip=0.2)
    assert exact.norm() > 0.1
    assert_equal(expected, exact, 1e-12)


def test_mixing_biases_the_gradient_in_proportion_to_alpha():
    """The weight of one position stands for the product over the prefix: an approximation, which the paper makes.

    Prefixes and later rewards then come from p~ instead of q. The relative error is of first order in alpha; at 0.2 the
    gradient still points the same way. Clip near 1, as a clip of 0.2 would cut weights over 1.2 even before any step.
    """
    errors = {}
    for alpha in (0.02, 0.2):
        expected, exact = enumerate_gradients(alpha, clip=0.99)
        errors[alpha] = float((expected - exact).norm() / exact.norm())
    assert 5 < errors[0.2] / errors[0.02] < 20
    assert 0.001 < errors[0.2] < 0.3
    assert torch.cosine_similarity(expected, exact, dim=0) > 0.97


def test_select_keeps_losses_of_a_sequence():
    """The loss of a batch is the sum of the losses of its sequences, whatever the micro-batches."""
    phase = MinillmPhase()
    student, frozen = gpt2(12, 1), teacher_of(gpt2(12, 2))
    rollout = rolled_out(student, frozen.model)
    advantages, hidden = objective.advantages(rollout, phase), frozen.hidden(rollout.to_batch(0))

    def value(places):
        flat, part = rollout.token_indices(places), rollout.select(places)
        loss = objective.minillm_loss(part, advantages[flat], hidden[flat], frozen.head, phase)
        return float(Student(student)(part.to_batch(0), loss.over(1.0))[0].detach())

    assert value(range(8)) == pytest.approx(sum(value([i]) for i in range(8)), abs=1e-9)
    with pytest.raises(ValueError, match="rows given"):
        objective.minillm_loss(rollout, advantages[1:], hidden, frozen.head, phase)
    assert replace(rollout, teacher_logprobs=None).select([0]).teacher_logprobs is None
