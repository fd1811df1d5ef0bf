"""mskd.models.prune: the layer that does least goes first; an ordinary, smaller model of the same family is left."""

from __future__ import annotations

import pytest
import torch
from families import FAMILY_CONFIGS, apart, build, greedily_the_same
from tiny import build_llama, build_tokenizer
from transformers import GPT2Config, PreTrainedModel

from mskd.config import ConfigError
from mskd.models import backbone, layers_of, load_model, num_layers, save_model
from mskd.models.batch import SequenceBatch
from mskd.models.prune import block_influence, choose_layers, cut

BATCHES = [
    SequenceBatch.from_sequences([[5, 6, 7, 8, 9, 10], [11, 12]], [[20, 21], [22]], 1),
    SequenceBatch.from_sequences([[13, 14, 15]], [[16]], 1),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [30, 31, 32, 33, 34, 35, 36]])


@pytest.fixture(params=FAMILY_CONFIGS)
def family(request) -> PreTrainedModel:
    return build(FAMILY_CONFIGS[request.param])


def make_identity(model: PreTrainedModel, index: int) -> None:
    """A layer whose attention and MLP add nothing to the residual stream."""
    names = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "attention.dense", "dense_4h_to_h")
    for name, module in layers_of(model)[index].named_modules():
        if name.endswith(names):
            module.weight.data.zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", [name for name in FAMILY_CONFIGS if name != "opt-norm-after"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_identity_layer_is_the_first_to_go(name, index):
    model = build(FAMILY_CONFIGS[name])
    make_identity(model, index)
    influence = block_influence(model, BATCHES)
    assert len(influence) == 3
    assert influence[index] == pytest.approx(0, abs=1e-5)
    assert all(value > 1e-3 for i, value in enumerate(influence) if i != index)
    keep = choose_layers(influence, 2)
    assert keep == [i for i in range(3) if i != index]
    assert apart(logits(cut(model, keep)), logits(model)) < 1e-5


def test_influence_is_its_formula_over_valid_tokens():
    model = build_llama(build_tokenizer(), layers=3)
    cosines: list[list[torch.Tensor]] = [[], [], []]
    for prompt in ([5, 6, 7, 8, 9, 10, 20, 21], [11, 12, 22], [13, 14, 15, 16]):  # the batches, each row alone
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            last = _before_norm(model, torch.tensor([prompt]))
        for i, (a, b) in enumerate(zip(states[:3], [*states[1:3], last], strict=True)):
            cosines[i].append((a * b).sum(-1).flatten() / (a.norm(dim=-1) * b.norm(dim=-1)).flatten())
    expected = [1 - float(torch.cat(c).mean()) for c in cosines]
    assert block_influence(model, BATCHES) == pytest.approx(expected, abs=1e-5)


def _before_norm(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    try:
        return backbone(model, ids)[0]
    finally:
        model.model.norm = norm


def test_measuring_leaves_no_trace():
    model = build_llama(build_tokenizer()).train()
    block_influence(model, BATCHES)
    assert model.training
    assert not any(layer._forward_hooks for layer in layers_of(model))
    with pytest.raises(ConfigError, match="no text to measure"):
        block_influence(model, [])


def test_choosing_layers():
    assert choose_layers([0.5, 0.1, 0.4, 0.1, 0.9], 3) == [0, 2, 4]
    assert choose_layers([0.5, 0.1, 0.1, 0.1], 2) == [0, 1]
    assert choose_layers([0.2, 0.1], 2) == [0, 1]
    for layers in (3, 0, -1):
        with pytest.raises(ConfigError, match=f"layers = {layers}, but the model .* has 2; allowed: 1 to 2"):
            choose_layers([0.2, 0.1], layers)


def test_keeping_all_layers_is_the_same_model(family):
    before = family.config.to_dict()
    same = cut(family, range(3))
    assert torch.equal(logits(same), logits(family))
    assert same.config.to_dict() == before


@pytest.mark.parametrize("keep", [[1], [0, 2], [1, 2]])
def test_a_cut_model_is_an_ordinary_model(family, keep, tmp_path):
    before, config = logits(family), family.config.to_dict()
    small = cut(family, keep)
    assert torch.equal(logits(family), before)  # the source is as it was
    assert family.config.to_dict() == config
    assert num_layers(family) == 3
    assert num_layers(small) == len(layers_of(small)) == len(keep)
    for ours, theirs in zip(layers_of(small), [layers_of(family)[i] for i in keep], strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    save_model(small, build_tokenizer(), tmp_path)
    again = load_model(tmp_path)
    assert apart(logits(again), logits(small)) < 1e-5  # weights read from a file may lie off a boundary of memory
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(IDS))
    found, expected = small.generate(IDS, use_cache=True, **options), again.generate(IDS, use_cache=False, **options)
    for prompt, one, other in zip(IDS.tolist(), expected.tolist(), found.tolist(), strict=True):
        assert greedily_the_same(small, prompt, one[len(prompt) :], other[len(prompt) :])


def test_sliding_windows_stay_with_their_layers():
    model = build(FAMILY_CONFIGS["qwen2-sliding"])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    for keep, first in (([0, 2], 1), ([1, 2], 0)):
        config = cut(model, keep).config
        assert config.layer_types == [model.config.layer_types[i] for i in keep]
        assert config.max_window_layers == first  # from it transformers would derive the same


def test_tied_weights_stay_tied():
    small = cut(build_llama(build_tokenizer()), [0, 3])
    assert small.lm_head.weight is small.model.embed_tokens.weight


@pytest.mark.parametrize("keep", [[], [0, 4], [1, 0], [-1, 0], [2, 2]])
def test_layers_that_are_not_there(keep):
    with pytest.raises(ConfigError, match="cannot keep layers"):
        cut(build_llama(build_tokenizer()), keep)


def test_a_model_whose_layers_depend_on_their_number():
    model = build(GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True))
    assert num_layers(cut(model, [0, 1])) == 2
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx"):
        cut(model, [0, 2])
