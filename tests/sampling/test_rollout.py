"""Sampling: the distribution that is really drawn, the log-probabilities recorded, the ownership of random numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mskd.config import ConfigError
from mskd.config.phases import MinillmPhase
from mskd.models import Teacher, backbone
from mskd.sampling import decode, slots
from mskd.sampling.draw import _inverse_cdf, draw, uniforms
from mskd.sampling.rollout import Interrupted, sample
from mskd.training import objective

EOS, PAD = 1, 0


def llama(vocab_size, *, seed=0, layers=2, std=0.5, dtype=torch.float64, **kwargs):
    """A random Llama with next-token distributions far from uniform. Its norms and rotary embedding compute in fp32."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=std,
        **kwargs,
    )
    return seeded(LlamaForCausalLM, config, seed, dtype)


def gpt2(vocab_size, *, seed=0, std=0.5):
    """A random GPT-2, float64 all the way through: GEMMs of other shapes change no more than its last digits."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=16, n_layer=2, n_head=4, initializer_range=std,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return seeded(GPT2LMHeadModel, config, seed)


def seeded(kind, config, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).to(dtype).eval()


def run(student, teacher, prompts, **changes):
    settings = dict(
        eos_id=EOS, pad_id=PAD, max_new_tokens=6, mix_alpha=0.0, temperature=1.0, top_p=1.0, top_k=0,
        batch_size=8, seed=3, sequence_ids=range(len(prompts)),
    )  # fmt: skip
    return sample(student, teacher, prompts, **(settings | changes))


def scored(rollout, teacher, **phase):
    """With what the frozen teacher's one pass after sampling gives."""
    frozen = Teacher(teacher, "fp32")
    return objective.score(rollout, frozen.hidden(rollout.to_batch(PAD)), frozen.head, MinillmPhase(**phase))


PROMPTS = [[5, 2, 7], [3], [9, 8, 7, 6, 5, 4, 3], [2, 2], [4, 4, 4, 4, 4], [10], [6, 5], [8, 3, 2, 9]]


def full_logprobs(model, sequence, *, temperature=1.0, vocab_size=None):
    """log q of every next token after each prefix, without cache, padding or batch. [T, V]."""
    logits = model(torch.tensor([sequence])).logits[0, :, :vocab_size]
    return (logits / temperature).log_softmax(-1)


def truncate(p, top_k, top_p):
    """The distribution p [V] cut to its k likeliest tokens, then to the likeliest that hold top_p of what is left."""
    ranked = sorted(range(len(p)), key=lambda v: -p[v])[: top_k or len(p)]
    total, mass, kept = sum(p[v] for v in ranked), 0.0, []
    for v in ranked:
        if mass < top_p * total:
            kept.append(v)
        mass += p[v]
    return [p[v] / sum(p[k] for k in kept) if v in kept else 0.0 for v in range(len(p))]


def mixture(q, p, alpha, top_k=0, top_p=1.0):
    mixed = q if p is None else [alpha * b + (1 - alpha) * a for a, b in zip(q, p, strict=True)]
    return truncate(mixed, top_k, top_p)


def chi_square(counts, probabilities, n):
    """p-value of the counts; outcomes that are expected less than 5 times are put together."""
    assert all(c == 0 for c, p in zip(counts, probabilities, strict=True) if p == 0)
    big = [(c, n * p) for c, p in zip(counts, probabilities, strict=True) if n * p >= 5]
    rest = n - sum(c for c, _ in big), n - sum(e for _, e in big)
    cells = big + ([rest] if rest[1] > 1e-6 else [])
    if len(cells) == 1:
        return 1.0
    scale = n / sum(e for _, e in cells)
    return stats.chisquare([c for c, _ in cells], [e * scale for _, e in cells]).pvalue


# -- random numbers -------------------------------------------------------------------------------


def test_uniforms_are_splitmix64():
    M = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M
        return x ^ (x >> 31)

    def draw_one(seed, sequence, position):
        key = seed & M
        for counter in (0, sequence, position):
            key = mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & M)
        return ((key >> 12) + 0.5) / 2**52

    # The first output of splitmix64 seeded with 0, as published with the generator.
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    ids, positions = [0, 1, 7, 2**40 + 3, 2**63 - 1], [0, 1, 255]
    for seed in (0, 1, 2**63 + 11, 2**64 - 1):
        found = uniforms(seed, torch.tensor(ids)[:, None], torch.tensor(positions)[None])
        assert found.tolist() == [[draw_one(seed, i, t) for t in positions] for i in ids]


def test_uniforms_are_uniform_and_independent():
    u = torch.stack([uniforms(s, torch.arange(200)[:, None], torch.arange(200)[None]) for s in range(5)])
    flat = u.flatten()
    assert 0 < flat.min() and flat.max() < 1 and len(flat.unique()) == len(flat)
    assert stats.kstest(flat.numpy(), "uniform").pvalue > 1e-3
    for axis in range(3):  # neighbours in seed, sequence and position
        a, b = u.narrow(axis, 0, u.shape[axis] - 1).flatten(), u.narrow(axis, 1, u.shape[axis] - 1).flatten()
        table = torch.histogramdd(torch.stack([a, b], 1), bins=[16, 16], range=[0.0, 1.0, 0.0, 1.0]).hist
        assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-3
    # The lowest bits too: they decide within a block of unlikely tokens.
    low = (flat * 2**40) % 1
    assert stats.kstest(low.numpy(), "uniform").pvalue > 1e-3


# -- one draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [3, 256, 700])
@pytest.mark.parametrize(
    "alpha, top_k, top_p", [(0.0, 0, 1.0), (0.3, 0, 1.0), (0.3, 5, 1.0), (0.3, 0, 0.7), (0.0, 9, 0.8)]
)
def test_draw_samples_exactly_what_it_records(V, alpha, top_k, top_p):
    g = torch.Generator().manual_seed(V)
    s, t = (2 * torch.randn(V, generator=g, dtype=torch.float64) for _ in range(2))
    n = 20_000
    teacher = t.expand(n, V) if alpha else None
    u = uniforms(0, torch.arange(n), torch.tensor(0))
    token, old, mixed, scored = draw(s.expand(n, V), teacher, u, mix_alpha=alpha, top_p=top_p, top_k=top_k)
    q, p = s.log_softmax(0), t.log_softmax(0)
    expected = mixture(q.exp().tolist(), p.exp().tolist() if alpha else None, alpha, top_k, top_p)
    assert chi_square(token.bincount(minlength=V).tolist(), expected, n) > 1e-3
    torch.testing.assert_close(mixed, torch.tensor(expected, dtype=torch.float64).log()[token], rtol=0, atol=1e-12)
    torch.testing.assert_close(old, q[token], rtol=0, atol=1e-12)
    assert (scored is None) == (teacher is None)
    if scored is not None:
        torch.testing.assert_close(scored, p[token], rtol=0, atol=1e-12)
    weights = (old - mixed).exp()
    assert weights.min() > 0 and weights.max() <= 1 / (1 - alpha) + 1e-12


def test_draw_is_the_inverse_cdf_at_its_edges():
    """Every token at both ends of its interval of u; tokens of probability 0 between them never."""
    V = 600
    weights = torch.zeros(V, dtype=torch.float64)
    possible = torch.tensor([0, 3, 255, 256, 257, 511, 512, 599])
    weights[possible] = torch.tensor([0.125, 0.25, 0.0625, 0.0625, 0.125, 0.125, 0.125, 0.125], dtype=torch.float64)
    ends = weights[possible].cumsum(0)
    u = torch.cat([ends - weights[possible] + 1e-12, ends - 1e-12])
    token, *_ = draw(weights.log().expand(len(u), V), None, u, mix_alpha=0.0, top_p=1.0, top_k=0)
    assert token.tolist() == possible.tolist() * 2
    # Intervals are half open: u at an end belongs to the next possible token, across blocks too.
    exact, total = _inverse_cdf(weights.expand(len(ends) - 1, V), ends[:-1])
    assert exact.tolist() == possible[1:].tolist() and total.tolist() == [1.0] * len(exact)


def test_draw_keeps_ties_at_the_threshold():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).log().double().expand(1000, 5)
    u = uniforms(1, torch.arange(1000), torch.tensor(0))
    for cut in (dict(top_k=2, top_p=1.0), dict(top_k=0, top_p=0.4)):
        token, _, mixed, _ = draw(logits, None, u, mix_alpha=0.0, **cut)
        assert set(token.tolist()) == {1, 2, 3}
        torch.testing.assert_close(mixed, torch.full_like(mixed, -math.log(3)), rtol=0, atol=1e-12)


def test_draw_of_extreme_logits_has_no_inf_or_nan():
    """Logits as 16-bit models give them: up to the end of fp16's range, and -inf for columns that do not exist."""
    V, n = 300, 500
    logits = torch.zeros(n, V)
    logits[:, 7], logits[:, 9], logits[:, 100:200] = 65504.0, 65500.0, -torch.inf
    logits[: n // 2, 20:] = -65504.0
    teacher = torch.full((n, V), -65504.0)
    teacher[:, 50], teacher[:, 51] = 65504.0, 65503.0
    u = uniforms(0, torch.arange(n), torch.tensor(0))
    token, old, mixed, scored = draw(logits, teacher, u, mix_alpha=0.5, top_p=1.0, top_k=0)
    assert set(token.tolist()) == {7, 9, 50, 51}
    assert mixed.isfinite().all() and old.isfinite().all() and scored.isfinite().all()


# -- whole sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha, temperature, top_k, top_p",
    [
        (0.0, 1.0, 0, 1.0), (0.2, 1.0, 0, 1.0), (0.6, 0.7, 0, 1.0), (0.5, 0.7, 3, 1.0), (0.5, 1.3, 0, 0.8),
        (0.0, 1.0, 4, 0.9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lazy", [True, False])
def test_sequences_follow_the_exact_distribution(alpha, temperature, top_k, top_p, lazy):
    """All sequences of up to 3 tokens of a tiny model, enumerated without a cache, against 12,000 samples.

    Slots are refilled, and without a cut the lazy teacher gives first and later tokens.
    """
    if not lazy and (alpha == 0 or top_k or top_p < 1):
        pytest.skip("the same path as lazy")
    V, n, T = 5, 12_000, 3
    student, teacher = llama(V, seed=1, std=0.6), llama(V, seed=2, std=0.6)
    prompt = [3, 2]

    def distribution(prefix):
        q = full_logprobs(student, prefix, temperature=temperature)[-1].exp().tolist()
        p = full_logprobs(teacher, prefix, temperature=temperature)[-1].exp().tolist()
        return mixture(q, p if alpha else None, alpha, top_k, top_p)

    expected, open_ = {}, {(): 1.0}
    for t in range(T):
        following = {}
        for prefix, mass in open_.items():
            for v, p in enumerate(distribution(prompt + list(prefix))):
                target = expected if v == EOS or t == T - 1 else following
                target[(*prefix, v)] = mass * p
        open_ = following
    rollout = run(
        student, teacher, [prompt] * n, max_new_tokens=T, mix_alpha=alpha, temperature=temperature, top_k=top_k,
        top_p=top_p, batch_size=4000, lazy=lazy,
    )  # fmt: skip
    drawn = [tuple(r) for r in rollout.responses()]
    assert set(drawn) <= set(expected)
    counts = [0] * len(expected)
    place = {sequence: i for i, sequence in enumerate(expected)}
    for sequence in drawn:
        counts[place[sequence]] += 1
    assert chi_square(counts, list(expected.values()), n) > 1e-3
    if rollout.mixture_logprobs is None:
        rollout = scored(rollout, teacher, mix_alpha=alpha, temperature=temperature)
    # What is recorded is the probability of what was drawn, up to what a Llama's fp32 parts make of a GEMM's last bits.
    mass = rollout.padded(rollout.mixture_logprobs)[0].sum(1).exp()
    torch.testing.assert_close(mass, torch.tensor([expected[d] for d in drawn], dtype=torch.float64), rtol=1e-5, atol=0)


FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=24, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
            word_embed_proj_dim=8, max_position_embeddings=32,
        ),
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32,
        ),
    ),
    "sliding window": (
        MistralForCausalLM,
        MistralConfig(
            vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4, max_position_embeddings=32,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention, dtype", [("sdpa", torch.float64), ("eager", torch.float32)])
def test_recorded_logprobs_are_those_of_a_plain_forward(family, attention, dtype):
    """Cache, packing, refilled slots and the cut head change nothing, in any family.

    Eager attention in fp32: transformers takes its softmax in fp32, where the mask of an fp64 model overflows.
    """
    # Where anything computes in fp32, as norms and rotary embedding always do, other shapes of a GEMM give other last
    # bits: up to 4e-5 here. Tokens in a wrong slot, at a wrong position or under a wrong mask are off by 0.4 and more.
    atol = 1e-9 if dtype == torch.float64 and family in ("gpt2", "opt") else 1e-3
    kind, config = FAMILIES[family]
    config._attn_implementation = attention
    student, teacher = seeded(kind, config, 1, dtype), seeded(kind, config, 2, dtype)
    for model in (student, teacher):
        for p in model.parameters():
            p.data *= 4  # far from uniform
    rollout = run(student, teacher, PROMPTS * 3, max_new_tokens=20, batch_size=10, mix_alpha=0.4, temperature=0.8)
    assert rollout.response_lengths.unique().numel() > 2
    rollout = scored(rollout, teacher, mix_alpha=0.4, temperature=0.8)
    old, expected = [], []
    for prompt, response in zip(rollout.prompts(), rollout.responses(), strict=True):
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        for model, out in ((student, old), (teacher, expected)):
            logprobs = full_logprobs(model, prompt + response, temperature=0.8)
            out.append(logprobs[places, torch.tensor(response)])
    old, expected = torch.cat(old), torch.cat(expected)
    torch.testing.assert_close(rollout.old_logprobs, old, rtol=0, atol=atol)
    torch.testing.assert_close(rollout.teacher_logprobs, expected, rtol=0, atol=atol)
    mixed = (0.4 * expected.exp() + 0.6 * old.exp()).log()
    torch.testing.assert_close(rollout.mixture_logprobs, mixed, rtol=0, atol=atol)
    torch.testing.assert_close(rollout.importance_weights, (old - mixed).exp(), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def unequal():
    """Student, teacher and 20 prompts of 1 to 9 tokens whose answers have 1 to 40: slots are refilled all the time."""
    prompts = [[(7 * i + j) % 22 + 2 for j in range(1 + 5 * i % 9)] for i in range(20)]
    return gpt2(24, seed=1), gpt2(24, seed=2), prompts


MODES = {"student": dict(mix_alpha=0.0), "lazy": {}, "every token": dict(lazy=False), "cut": dict(top_p=0.95)}


@pytest.mark.parametrize("mode", MODES)
def test_samples_do_not_depend_on_batch_size_or_order(unequal, mode):
    student, teacher, prompts = unequal
    ids = [100 + 3 * i for i in range(20)]
    settings = dict(mix_alpha=0.3, max_new_tokens=40) | MODES[mode]
    whole = run(student, teacher, prompts, batch_size=16, sequence_ids=ids, **settings)
    lengths = whole.response_lengths
    assert lengths.unique().numel() > 6 and lengths.min() < 4 and lengths.max() > 20
    for batch_size in (1, 3, 20):
        other = run(student, teacher, prompts, batch_size=batch_size, sequence_ids=ids, **settings)
        assert_same(whole, other, 1e-10)
    backwards = run(student, teacher, prompts[::-1], batch_size=6, sequence_ids=ids[::-1], **settings)
    assert_same(whole, backwards.select(range(19, -1, -1)), 1e-10)
    again = run(student, teacher, prompts, batch_size=16, sequence_ids=ids, **settings)
    assert_same(whole, again, 0.0)
    assert run(student, teacher, prompts, sequence_ids=ids, seed=4, **settings).responses() != whole.responses()
    assert run(student, teacher, prompts, sequence_ids=range(20), **settings).responses() != whole.responses()


@pytest.mark.parametrize("mode", MODES)
def test_samples_do_not_depend_on_when_things_happen(unequal, mode, monkeypatch):
    """When finished sequences are found, how many wait for the teacher, how many tokens one pass takes."""
    settings = dict(mix_alpha=0.3, max_new_tokens=30, batch_size=5) | MODES[mode]
    whole = run(*unequal, **settings)
    with monkeypatch.context() as patch:
        patch.setitem(slots.LOOK_EVERY, "cpu", 8)  # as on a GPU: sequences run on after their end
        assert_same(whole, run(*unequal, **settings), 1e-10)
    for share in (0.01, 1.0):
        with monkeypatch.context() as patch:
            patch.setattr(slots, "WAITING", share)
            assert_same(whole, run(*unequal, **settings), 1e-10)
    monkeypatch.setattr(decode, "PASS_TOKENS", 4)
    assert_same(whole, run(*unequal, **settings), 1e-10)


@pytest.fixture
def passes(monkeypatch):
    """The spans of every call of each model, by the model."""
    found: dict = {}
    advance = decode.Decoder.advance

    def counted(self, tokens, spans):
        found.setdefault(self.model, []).append(list(spans))
        return advance(self, tokens, spans)

    monkeypatch.setattr(decode.Decoder, "advance", counted)
    return found


def test_the_batch_stays_full(unequal, passes):
    student, _, prompts = unequal
    rollout = run(student, None, prompts, max_new_tokens=40, batch_size=4)
    calls = passes[student]
    begun = 0
    for spans in calls:
        begun += sum(span.start == 0 for span in spans)
        assert len(spans) == 4 or begun == len(prompts)  # a free slot only once no prompt is left
    tokens = sum(span.end - span.start for spans in calls for span in spans)
    assert tokens == len(rollout.tokens) - len(prompts)  # each once, but for the last of every response
    assert len(calls) < sum(max(lengths) for lengths in rollout.response_lengths.split(4))


def test_the_lazy_teacher_runs_over_blocks(unequal, passes):
    """Each token passes through the teacher at most once, in far fewer calls; it gives alpha of the tokens."""
    student, teacher, prompts = unequal
    rollout = run(student, teacher, prompts, mix_alpha=0.2, max_new_tokens=40, batch_size=10)
    blocks = [span for spans in passes[teacher] for span in spans]
    assert len(passes[teacher]) < len(passes[student]) / 2
    assert abs(len(blocks) / len(rollout.old_logprobs) - 0.2) < 0.06
    for row in range(len(prompts)):
        own = [span for span in blocks if span.row == row]
        assert [s.start for s in own] == [0, *(s.end for s in own)][: len(own)]
    with pytest.raises(ValueError, match="objective.score first"):
        _ = rollout.importance_weights


def test_lazy_or_not_the_log_probabilities_mean_the_same(unequal):
    """The mixture's and the teacher's, recorded token by token, are those of one pass after sampling."""
    student, teacher, prompts = unequal
    rollout = run(student, teacher, prompts, mix_alpha=0.3, max_new_tokens=30, lazy=False)
    bare = replace(rollout, teacher_logprobs=None, mixture_logprobs=None)
    assert_same(rollout, scored(bare, teacher, mix_alpha=0.3), 1e-10)


def assert_same(a, b, tolerance):
    assert a.prompts() == b.prompts() and a.responses() == b.responses()
    for name in ("old_logprobs", "mixture_logprobs", "teacher_logprobs"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotary_embedding_that_follows_the_batch_is_exact_up_to_its_first_length_and_refused_past_it(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.1], "long_factor": [4.0, 7.0], "original_max_position_embeddings": 16}
    else:
        rope |= {"factor": 4.0}
    student = llama(24, seed=5, rope_parameters=rope)
    if kind == "dynamic":
        student.config.max_position_embeddings = 16
    rollout = run(student, None, PROMPTS, max_new_tokens=9, batch_size=3, eos_id=-1)  # 7 + 9 positions at most
    for i, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses(), strict=True)):
        expected, at = full_logprobs(student, [*prompt, *response]), rollout.select([i]).old_logprobs
        own = torch.stack([expected[len(prompt) - 1 + t, token] for t, token in enumerate(response)])
        torch.testing.assert_close(at, own, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="needs 17 positions, and past 16 the rotary embedding"):
        run(student, None, PROMPTS, max_new_tokens=10)
    with pytest.raises(ConfigError, match="a batch needs 17 positions"):
        backbone(student, torch.tensor([[3] * 17]))
    backbone(student, torch.tensor([[3] * 16]))


def test_a_response_ends_with_eos_or_at_the_limit():
    student = llama(6, seed=5)
    rollout = run(student, None, [[2 + i % 4] for i in range(200)], max_new_tokens=5, batch_size=64)
    ended = [r[-1] == EOS for r in rollout.responses()]
    assert any(ended) and not all(ended)
    for response, end in zip(rollout.responses(), ended, strict=True):
        assert EOS not in response[:-1]
        assert end or len(response) == 5
    # pad == eos changes nothing: the mask is the length, never the token
    same = run(student, None, [[2 + i % 4] for i in range(200)], max_new_tokens=5, batch_size=64, pad_id=EOS)
    assert same.responses() == rollout.responses()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_any_of_several_end_tokens_ends_a_response_and_changes_nothing_before_it(alpha):
    student, teacher, prompts = llama(6, seed=5), llama(6, seed=6), [[2 + i % 4] for i in range(100)]
    options = dict(max_new_tokens=7, batch_size=32, mix_alpha=alpha)
    endless = run(student, teacher, prompts, eos_id=-1, **options).responses()
    ends = {EOS, 3}
    first = [next((i for i, t in enumerate(r) if t in ends), 6) for r in endless]
    expected = [r[: i + 1] for r, i in zip(endless, first, strict=True)]
    assert {r[-1] for r in expected} > ends  # some end with each, some at the limit
    assert run(student, teacher, prompts, eos_id=ends, **options).responses() == expected
    one = run(student, teacher, prompts, eos_id=EOS, **options)
    assert one.responses() == run(student, teacher, prompts, eos_id=(EOS,), **options).responses()


def test_without_a_decoding_teacher_nothing_is_mixed_or_scored():
    student, teacher = llama(24, seed=1), llama(24, seed=2)
    alone, unmixed = run(student, None, PROMPTS), run(student, teacher, PROMPTS, mix_alpha=0.0)
    for rollout in (alone, unmixed):
        assert rollout.teacher_logprobs is None
        assert torch.equal(rollout.importance_weights, torch.ones_like(rollout.old_logprobs))
    assert alone.responses() == unmixed.responses()
    mixed = run(student, teacher, PROMPTS, mix_alpha=0.9)
    assert mixed.responses() != alone.responses()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padding_columns_of_the_wider_vocabulary_are_never_sampled(wider, alpha):
    """Huge logits in the padding columns: neither drawn nor part of any normalisation."""
    sizes = {"student": 24, "teacher": 24, wider: 32}
    models = {name: llama(size, seed=i, std=0.4) for i, (name, size) in enumerate(sizes.items())}
    models[wider].lm_head.weight.data[24:] = 50.0 * models[wider].lm_head.weight.data[:8]
    rollout = run(models["student"], models["teacher"], PROMPTS * 4, mix_alpha=alpha, batch_size=32)
    assert rollout.tokens.max() < 24 and rollout.vocab_size == 24
    expected = [
        full_logprobs(models["student"], p + r, vocab_size=24)[len(p) - 1 : -1].gather(1, torch.tensor(r)[:, None])[
            :, 0
        ]
        for p, r in zip(rollout.prompts(), rollout.responses(), strict=True)
    ]
    # 1e-6 is what a Llama's fp32 parts make of a GEMM's last bits; one column of padding that counts takes 100.
    torch.testing.assert_close(rollout.old_logprobs, torch.cat(expected), rtol=0, atol=1e-4)


def test_fp32_and_16_bit_models():
    """Recorded in fp32; a 16-bit head on CPU gives the log-probabilities of its own weights, not of rounded logits."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        student = llama(24, seed=1, dtype=dtype)
        teacher = llama(24, seed=2, dtype=dtype)
        rollout = scored(run(student, teacher, PROMPTS, mix_alpha=0.3), teacher, mix_alpha=0.3)
        assert rollout.old_logprobs.dtype == rollout.importance_weights.dtype == torch.float32
        assert rollout.importance_weights.max() <= 1 / 0.7 + 1e-5
        exact = student.double()
        expected = [
            full_logprobs(exact, p + r)[len(p) - 1 : -1].gather(1, torch.tensor(r)[:, None])[:, 0]
            for p, r in zip(rollout.prompts(), rollout.responses(), strict=True)
        ]
        error = (rollout.old_logprobs - torch.cat(expected)).abs().mean()
        assert error < tolerance


def test_stops_when_asked_and_leaves_the_model_as_it_was():
    student = llama(24, seed=1).train()
    asked = []

    def should_stop():
        asked.append(student.training)
        return len(asked) == 4

    with pytest.raises(Interrupted):
        run(student, None, PROMPTS, should_stop=should_stop, batch_size=4, max_new_tokens=20)
    assert asked == [False] * 4 and student.training
    assert student.config._attn_implementation == "sdpa"
    assert not any(p.grad is not None for p in student.parameters())


def test_dropout_is_off_while_sampling():
    kind, config = FAMILIES["gpt2"]
    student = seeded(kind, config)
    expected = run(student, None, PROMPTS).responses()
    assert config.resid_pdrop > 0 and run(student.train(), None, PROMPTS).responses() == expected


def test_bad_input():
    student = llama(24)
    with pytest.raises(ConfigError, match="no tokens"):
        run(student, None, [[3], []])
    with pytest.raises(ConfigError, match=r"need 67 positions.*64; lower max_new_tokens"):
        run(student, None, PROMPTS, max_new_tokens=60)
    with pytest.raises(ValueError, match="distinct sequence_ids"):
        run(student, None, [[3], [4]], sequence_ids=[1, 1])
    broken = llama(24)
    broken.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="not numbers"):
        run(broken, None, PROMPTS)


# -- the flat result ------------------------------------------------------------------------------


def test_rollout_is_flat_and_consistent():
    student, teacher = llama(24, seed=1), llama(24, seed=2)
    rollout = run(student, teacher, PROMPTS, mix_alpha=0.3, max_new_tokens=12, top_p=0.99)
    assert len(rollout) == len(PROMPTS) and rollout.prompts() == PROMPTS
    lengths = [len(r) for r in rollout.responses()]
    assert rollout.response_lengths.tolist() == lengths and rollout.response_offsets[-1] == len(rollout.old_logprobs)
    assert rollout.response_tokens.tolist() == sum(rollout.responses(), [])
    batch = rollout.to_batch(PAD)
    assert torch.equal(batch.targets, rollout.response_tokens)
    padded, mask = rollout.padded(rollout.old_logprobs)
    assert padded.shape == (len(PROMPTS), max(lengths)) and mask.sum(1).tolist() == lengths
    assert torch.equal(padded[mask], rollout.old_logprobs) and not padded[~mask].any()

    chosen = [5, 0, 2, 2]
    part, flat = rollout.select(chosen), rollout.token_indices(chosen)
    assert part.prompts() == [PROMPTS[i] for i in chosen]
    assert part.responses() == [rollout.responses()[i] for i in chosen]
    for name in ("old_logprobs", "mixture_logprobs", "teacher_logprobs", "importance_weights", "response_tokens"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[flat])
    assert replace(rollout, teacher_logprobs=None).select([1]).teacher_logprobs is None
    assert torch.equal(part.select([1]).tokens, rollout.select([0]).tokens)

    empty = rollout.select([])
    assert len(empty) == 0 and empty.prompts() == [] and empty.old_logprobs.shape == (0,)
    assert run(student, teacher, [], mix_alpha=0.3).offsets.tolist() == [0]
