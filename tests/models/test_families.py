"""Every family end to end: what is sampled and recorded is what transformers' own generation and forward give."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILY_CONFIGS, PAD, V, build, greedily_the_same
from transformers import PreTrainedModel

from mskd.config.hardware import detect
from mskd.models import copy_as, layers_of, load_model, load_teacher
from mskd.models.prune import cut
from mskd.models.quantize import quantize_layers
from mskd.sampling.rollout import Rollout, sample

# The longest is beyond every sliding window (3 and 4) before it samples, all are far beyond after it.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [30, 31, 32, 33, 34]]
NEW = 24
NEVER = V + 1  # an end token that no model has


@pytest.fixture(params=FAMILY_CONFIGS)
def family(request) -> PreTrainedModel:
    return build(FAMILY_CONFIGS[request.param])


def run(student, teacher=None, **changes) -> Rollout:
    settings = dict(
        eos_id=NEVER, pad_id=PAD, max_new_tokens=NEW, mix_alpha=0.0, temperature=1.0, top_p=1.0, top_k=1,
        batch_size=4, seed=0, sequence_ids=range(len(PROMPTS)),
    )  # fmt: skip
    return sample(student, teacher, PROMPTS, **settings | changes)


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """transformers' greedy continuation, one sequence at a time, no cache."""
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=NEW, do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=PAD)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def logprobs(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Of the response tokens, from plain forwards of whole sequences."""
    found = []
    for prompt, response in zip(rollout.prompts(), rollout.responses(), strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def test_greedy_samples_are_transformers_own(family):
    for prompt, response in zip(PROMPTS, run(family).responses(), strict=True):
        assert greedily_the_same(family, prompt, greedy(family, prompt), response)


@pytest.mark.parametrize("keep", [[0, 2], [1]])
def test_greedy_samples_of_a_cut_model_are_transformers_own(family, keep):
    small = cut(family, keep)
    for prompt, response in zip(PROMPTS, run(small).responses(), strict=True):
        assert greedily_the_same(small, prompt, greedy(small, prompt), response)


def test_recorded_logprobs_are_those_of_plain_forwards(family):
    """Student and teacher in lockstep, rows that leave the batch, caches that shrink."""
    teacher = build(copy.deepcopy(family.config), seed=1)
    settings = dict(mix_alpha=0.4, top_k=0, top_p=0.9999, batch_size=3)  # cut: the teacher decodes every token
    end = run(family, teacher, **settings).responses()[1][5]
    rollout = run(family, teacher, eos_id=end, **settings)
    assert rollout.response_lengths[1] <= 6 and rollout.response_lengths.max() > 6
    torch.testing.assert_close(rollout.old_logprobs, logprobs(family, rollout), atol=2e-4, rtol=0)
    torch.testing.assert_close(rollout.teacher_logprobs, logprobs(teacher, rollout), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen2-sliding", "gemma2", "gemma3", "gemma3-capped", "mistral"])
def test_the_window_and_the_caps_are_seen_in_these_logprobs(name):
    """The test above would fail for a cache, mask or head that leaves them out."""
    config = FAMILY_CONFIGS[name]
    rollout = run(build(config), top_k=0)
    for change in ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, change, None) is not None:
            other = copy.deepcopy(config)
            setattr(other, change, type(getattr(config, change))(1000))
            changed = logprobs(build(other), rollout)
            assert (changed - rollout.old_logprobs).abs().max() > 0.05, change


def test_an_int8_teacher_scores_as_its_own_forward(family, tmp_path):
    family.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, "int8", detect("cpu"))
    rollout = run(family, teacher, mix_alpha=0.4, top_k=0, top_p=0.9999)  # cut: the teacher decodes every token
    torch.testing.assert_close(rollout.teacher_logprobs, logprobs(teacher.model, rollout), atol=2e-4, rtol=0)
    exact = load_model(tmp_path)
    assert (rollout.teacher_logprobs - logprobs(exact, rollout)).abs().max() > 1e-4  # it is int8 indeed
    quantize_layers(layers_of(exact))
    assert torch.equal(logprobs(exact, rollout), logprobs(teacher.model, rollout))


def test_a_16_bit_copy_samples_near_its_source(family):
    rollout = run(copy_as(family, torch.bfloat16), top_k=0)
    assert rollout.old_logprobs.dtype == torch.float32
    assert (rollout.old_logprobs - logprobs(family, rollout)).abs().mean() < 0.1
