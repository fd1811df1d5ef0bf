"""mskd.models: every family's head, padding, gradients, 8-bit teachers, folders good and bad."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILY_CONFIGS, PAD, SMALL, V, apart, build
from safetensors.torch import load_file, save_file
from tiny import build_tokenizer
from tokenizers import normalizers
from torch import nn
from transformers import CohereConfig, Gemma3TextConfig, GraniteConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mskd.config import ConfigError
from mskd.config.hardware import Hardware, detect
from mskd.models import (
    Head,
    Student,
    backbone,
    check_same_tokenizer,
    content_hash,
    copy_as,
    decoder_of,
    head_of,
    layers_of,
    load_model,
    load_teacher,
    load_tokenizer,
    num_layers,
    num_parameters,
    quantize,
    save_model,
    size_of,
)
from mskd.models.batch import SequenceBatch
from mskd.models.folder.declared import declared_ends, decoding_settings
from mskd.models.quantize import Int8Linear

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, PAD]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25, 2], []]


@pytest.fixture(params=FAMILY_CONFIGS)
def family(request) -> PreTrainedModel:
    return build(FAMILY_CONFIGS[request.param])


@pytest.fixture(scope="module")
def cpu() -> Hardware:
    return detect("cpu")


@pytest.fixture
def folder(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A model folder of the test's own, which it may damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def batch() -> SequenceBatch:
    return SequenceBatch.from_sequences(PROMPTS, RESPONSES, PAD)


def logits_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Of a head without a scale, as every family's is."""
    logits = F.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


# -- heads and backbones --------------------------------------------------------------------------


def test_backbone_and_head_are_the_model(family):
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = family(ids).logits
        hidden, cache = backbone(family, ids)
    assert cache is None
    assert head_of(family).scale == 1
    assert torch.equal(logits_of(hidden, head_of(family)), expected)
    assert num_layers(family) == num_layers(family.config) == len(layers_of(family)) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side):
    sequences = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15]]
    ids = torch.full((3, 7), PAD)
    mask = torch.zeros(3, 7, dtype=torch.int64)
    for row, s in enumerate(sequences):
        at = slice(7 - len(s), 7) if side == "left" else slice(0, len(s))
        ids[row, at], mask[row, at] = torch.tensor(s), 1
    with torch.no_grad():
        padded, _ = backbone(family, ids, mask)
        for row, s in enumerate(sequences):
            alone, _ = backbone(family, torch.tensor([s]))
            assert apart(padded[row][mask[row].bool()], alone[0]) < 1e-4


def test_decoding_with_a_cache_and_left_padding_is_the_full_forward(family):
    sequences = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]]
    ids, mask = torch.tensor([sequences[0], [PAD] * 3 + sequences[1]]), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        hidden, cache = backbone(family, ids[:, :5], mask[:, :5], use_cache=True)
        for t in (6, 7):
            hidden, cache = backbone(family, ids[:, t - 1 : t], mask[:, :t], past_key_values=cache, use_cache=True)
        for row, s in enumerate(sequences):
            alone, _ = backbone(family, torch.tensor([s]))
            assert apart(hidden[row, -1], alone[0, -1]) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SMALL, intermediate_size=48, logit_scale=0.25),
        GraniteConfig(**SMALL, intermediate_size=48, logits_scaling=4.0),
    ],
    ids=["cohere", "granite"],
)
def test_an_unknown_head_is_refused(config, tmp_path, cpu):
    model = build(config)
    for use in (head_of, layers_of, decoder_of, Student, lambda m: backbone(m, torch.tensor([[3]]))):
        with pytest.raises(ConfigError, match="is not understood and not guessed; known: GPT2LMHeadModel, GPTNeoX"):
            use(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not understood"):
        load_teacher(tmp_path, "int8", cpu)


def test_a_replaced_head_or_class_is_refused():
    model = build(FAMILY_CONFIGS["llama"])
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match="is a torch.nn.modules.container.Sequential, not a plain nn.Linear"):
        head_of(model)
    theirs = type("LlamaForCausalLM", (nn.Module,), {"__module__": "transformers_modules.somebody"})()
    with pytest.raises(ConfigError, match="transformers_modules.somebody.LlamaForCausalLM is not understood"):
        head_of(theirs)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path, cpu):
    config = Gemma3TextConfig(**SMALL, intermediate_size=48, head_dim=8, use_bidirectional_attention=True)
    model = build(config)
    for use in (head_of, layers_of, Student, lambda m: backbone(m, torch.tensor([[3]]))):
        with pytest.raises(ConfigError, match="Gemma3ForCausalLM attends to later tokens too"):
            use(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="attends to later tokens too"):
        load_teacher(tmp_path, "fp32", cpu)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gemma2_is_loaded_with_the_attention_that_caps_its_scores(attention, tmp_path):
    model = build(FAMILY_CONFIGS["gemma2"])
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, attention=attention)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert apart(again(ids).logits, model(ids).logits) < 1e-5
        for layer in layers_of(model):
            layer.self_attn.attn_logit_softcapping = None
        assert (again(ids).logits - model(ids).logits).abs().max() > 0.01  # it matters here


# -- the student ----------------------------------------------------------------------------------


def cross_entropy(inputs: SequenceBatch):
    def loss(hidden, head):
        nll = F.cross_entropy(logits_of(hidden, head), inputs.targets)
        return nll, {"nll": nll.detach()}

    return loss


def hf_loss(model: PreTrainedModel, inputs: SequenceBatch) -> torch.Tensor:
    """The same loss through the model's own forward, attention mask and shifted labels."""
    labels = torch.full_like(inputs.input_ids, -100)
    labels.view(-1)[inputs.positions + 1] = inputs.targets
    return model(inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_student_has_the_gradients_of_the_plain_model(family, checkpointing, tmp_path):
    family.save_pretrained(tmp_path)
    inputs, model = batch(), load_model(tmp_path)
    expected = hf_loss(model, inputs)
    expected.backward()
    theirs = grads(model)
    model.zero_grad()
    student = Student(model, gradient_checkpointing=checkpointing)
    assert model.training  # OPT's and GPT-2's dropout of 0.1 must not be on all the same
    got, stats = student(inputs, cross_entropy(inputs))
    got.backward()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.equal(stats["nll"], got.detach())
    ours = grads(model)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():  # that of a key's bias is 0 but for rounding
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


def test_the_end_token_trains_where_it_pads_too(tiny_llama_folder):
    model = load_model(tiny_llama_folder)
    eos = model.config.eos_token_id
    assert eos == model.config.pad_token_id
    prompt = SequenceBatch.from_sequences([[eos, 9]], [[10]], eos)
    hidden_of = Student(model)
    loss, _ = hidden_of(prompt, lambda hidden, head: (hidden.square().sum() * 1e-2, {}))
    loss.backward()
    assert model.get_input_embeddings().weight.grad[eos].abs().sum() > 0


def test_student_hands_the_loss_autocasts_dtype(tiny_llama_folder):
    student, inputs = Student(load_model(tiny_llama_folder)), batch()
    seen = []

    def loss(hidden, head):
        seen.append((hidden.dtype, head.weight.dtype))
        return hidden.sum(), {}

    student(inputs, loss)
    with torch.autocast("cpu", torch.bfloat16):
        student(inputs, loss)
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


def test_copies_for_sampling_keep_their_rotary_frequencies(tiny_llama_folder):
    model = load_model(tiny_llama_folder)
    small = copy_as(model, torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not any(p.requires_grad for p in small.parameters())


# -- teachers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp32", "bf16", "llm_int8"])
def test_teacher_is_frozen_and_near_the_model(precision, tiny_llama_folder, cpu):
    teacher, inputs = load_teacher(tiny_llama_folder, precision, cpu), batch()
    model = load_model(tiny_llama_folder)
    assert teacher.precision == precision
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert num_parameters(teacher.model) == num_parameters(model)
    hidden = teacher.hidden(inputs)
    assert not hidden.requires_grad
    assert hidden.shape == (len(inputs.positions), model.config.hidden_size)
    got = logits_of(hidden, teacher.head).float().log_softmax(-1)
    with torch.no_grad():
        full = model(inputs.input_ids, attention_mask=inputs.attention_mask).logits
    expected = full.flatten(0, 1)[inputs.positions].log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1)
    limit = {"fp32": 1e-6, "int8": 0.02, "bf16": 0.02, "llm_int8": 0.1}[precision]
    assert -1e-6 < kl.mean() < limit
    if precision != "fp32":
        assert kl.max() > 1e-7  # it is another precision indeed


def test_int8_is_close_for_every_family_and_keeps_head_and_embedding(family, tmp_path, cpu):
    family.save_pretrained(tmp_path)
    teacher, inputs = load_teacher(tmp_path, "int8", cpu), batch()
    inside = [m for m in layers_of(teacher.model).modules() if isinstance(m, nn.Linear | Conv1D)]
    assert not inside
    assert sum(isinstance(m, Int8Linear) for m in teacher.model.modules()) >= 3 * 4
    assert torch.equal(teacher.head.weight, family.get_output_embeddings().weight)
    with torch.no_grad():
        hidden, _ = backbone(family, inputs.input_ids)
    exact = hidden.flatten(0, 1)[inputs.positions]
    assert (teacher.hidden(inputs) - exact).norm() / exact.norm() < 0.05


def test_int8_does_not_depend_on_the_batch(tiny_llama_folder, cpu):
    teacher = load_teacher(tiny_llama_folder, "int8", cpu)
    inputs = batch()
    together = teacher.hidden(inputs)
    alone = [
        teacher.hidden(SequenceBatch.from_sequences([p], [r], PAD)) for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert apart(torch.cat(alone), together) < 1e-4  # activations quantised by their batch would be 1e-2 apart


def test_int8_weights_depend_on_the_checkpoint_alone(tiny_llama_folder, cpu):
    in_fp32 = load_teacher(tiny_llama_folder, "int8", cpu)
    in_bf16 = load_teacher(tiny_llama_folder, "int8", replace(cpu, teacher_dtype=torch.bfloat16))
    one, two = (dict(t.model.model.named_modules()) for t in (in_fp32, in_bf16))
    for name, module in one.items():
        if isinstance(module, Int8Linear):
            assert torch.equal(module.weight, two[name].weight)
            assert torch.equal(module.scale, two[name].scale)
    assert in_bf16.hidden(batch()).dtype == in_bf16.head.weight.dtype == torch.bfloat16
    assert in_bf16.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_teacher_ignores_autocast(tiny_llama_folder, cpu):
    teacher = load_teacher(tiny_llama_folder, "int8", cpu)
    plain = teacher.hidden(batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.hidden(batch()), plain)


def test_what_this_machine_cannot_run_is_refused(tiny_llama_folder, cpu, monkeypatch):
    volta = replace(cpu, llm_int8=False, reasons={"int8": "LLM.int8 needs sm_75 or newer, this is sm_70"})
    with pytest.raises(ConfigError, match="needs sm_75 or newer, this is sm_70; use int8"):
        load_teacher(tiny_llama_folder, "llm_int8", volta)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for precision in ("int8", "llm_int8"):
        with pytest.raises(ConfigError, match="8-bit teachers need bitsandbytes, .*pip install bitsandbytes"):
            load_teacher(tiny_llama_folder, precision, cpu)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_is_its_formula(dtype, bias, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(37, 24) * torch.logspace(-3, 0, 37)[:, None]
    weight[5] = 0
    b = torch.randn(37, dtype=dtype) if bias else None
    layer = Int8Linear(*quantize.quantize(weight), b)
    exact_weight = layer.weight.double() * layer.scale.double()[:, None]
    assert layer.weight.dtype == torch.int8
    assert ((exact_weight - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    x = torch.randn(3, 7, 24).to(dtype)
    expected = F.linear(x.double(), exact_weight, None if b is None else b.double())
    same_dtype = F.linear(x, exact_weight.to(dtype), b)
    whole = layer(x)
    assert whole.dtype == dtype
    limit = 2 * (same_dtype - expected).norm() + torch.finfo(dtype).eps * expected.norm()
    assert (whole - expected).norm() <= limit
    # A block is the same GEMM as a layer of its rows alone, so it has the same bits; the whole is another GEMM.
    monkeypatch.setattr(quantize, "BLOCK_BYTES", 5 * 24 * x.element_size())  # 8 blocks, the last one of 2 rows
    rows = [slice(i, i + 5) for i in range(0, 37, 5)]
    parts = [Int8Linear(layer.weight[r], layer.scale[r], None if b is None else b[r])(x) for r in rows]
    assert torch.equal(layer(x), torch.cat(parts, -1))
    assert (layer(x) - expected).norm() <= limit


def test_int8_linear_does_not_overflow_in_fp16():
    layer = Int8Linear(*quantize.quantize(torch.full((4, 512), 0.01)), None)
    out = layer(torch.full((1, 512), 10.0, dtype=torch.float16))  # 512 * 10 * 127 is far beyond 65504
    torch.testing.assert_close(out, torch.full((1, 4), 51.2, dtype=torch.float16), atol=0.5, rtol=0)


def test_a_weight_with_nan_is_not_quantised():
    with pytest.raises(ConfigError, match="q_proj: it holds inf or NaN"):
        quantize.quantize(torch.tensor([[1.0, float("nan")]]), "q_proj")


# -- folders --------------------------------------------------------------------------------------


def test_saved_and_loaded_again_is_bit_identical(family, tmp_path):
    tokenizer = build_tokenizer()
    save_model(family, tokenizer, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert type(again) is type(family)
    ours, theirs = family.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert apart(again(ids).logits, family(ids).logits) < 1e-5  # weights read from a file may lie off a boundary
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert load_tokenizer(tmp_path / "m").get_vocab() == tokenizer.get_vocab()
    size = size_of(tmp_path / "m")
    assert (size.layers, size.parameters) == (3, num_parameters(family))


def test_further_end_tokens_survive_saving_and_settings_of_generate_do_not(tmp_path):
    model = build(FAMILY_CONFIGS["llama"])
    own = dict(temperature=0.6, top_p=0.9, do_sample=True, repetition_penalty=5.0, max_length=9, eos_token_id=[2, 7])
    model.generation_config.update(**own)
    save_model(model, build_tokenizer(), tmp_path, ends=(2, 7))
    model.generation_config.do_sample = False  # of checkpoints that transformers itself refuses to write again
    save_model(model, build_tokenizer(), tmp_path / "again", ends=(2, 7))
    model.generation_config.do_sample = True
    assert decoding_settings(tmp_path) == {}
    saved = load_model(tmp_path)
    assert (saved.generation_config.eos_token_id, saved.generation_config.pad_token_id) == ([2, 7], 2)
    assert {name: getattr(model.generation_config, name) for name in own} == own  # the model is as it was
    expected = [5, 6, 8]
    with torch.no_grad():
        while len(expected) < 12 and expected[-1] not in (2, 7):
            expected.append(int(saved(torch.tensor([expected])).logits[0, -1].argmax()))
        assert saved.generate(torch.tensor([[5, 6, 8]]), max_new_tokens=9)[0].tolist() == expected


def test_a_saved_model_ends_with_the_trained_end(tmp_path):
    model, tokenizer = build(FAMILY_CONFIGS["llama"]), build_tokenizer()
    save_model(model, tokenizer, tmp_path, ends=(3, 2))
    for file in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / file).read_text())["eos_token_id"] == [3, 2]
    assert load_tokenizer(tmp_path).eos_token == "<|reserved|>" and tokenizer.eos_token == "<|im_end|>"
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert declared_ends(tmp_path) == (3, 2)
    (tmp_path / "generation_config.json").unlink()
    assert declared_ends(tmp_path) == (3, 2)  # config.json's
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match="eos_token_id is '</s>'; it must be an id or a list of ids"):
        declared_ends(tmp_path)


def test_a_full_disk_is_an_os_error(tmp_path):
    model, tokenizer = build(FAMILY_CONFIGS["llama"]), build_tokenizer()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_model(model, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG


def test_content_hash_is_of_the_content(folder, tmp_path):
    first = content_hash(folder)
    assert len(first) == 64
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    config = json.loads((copy / "config.json").read_text())
    config |= {"_name_or_path": "/somewhere/else", "transformers_version": "5.10.4"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    (copy / "README.md").write_text("a card")
    assert content_hash(copy) == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    second = content_hash(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    third = content_hash(copy)
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert len({first, second, third, content_hash(copy)}) == 4
    assert content_hash(folder) == first


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"')


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "perpetuum-mobile"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "cannot read .*config.json"),
        (remove_config, "there is no config.json"),
        (only_pickles, r"only pickled weights \(pytorch_model.bin\), which mskd never reads"),
        (no_weights, "no weights at all"),
        (truncate, "the weights in .* are damaged"),
        (garbage, "the weights in .* are damaged"),
        (lose_a_weight, "do not fit config.json: model.layers.1.mlp.up_proj.weight missing"),
        (reshape_a_weight, "do not fit config.json: model.norm.weight missing or misshapen"),
        (another_architecture, "perpetuum-mobile"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_damaged_folder_is_one_clear_line(damage, message, folder):
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


# -- tokenizers -----------------------------------------------------------------------------------


def test_a_tokenizer_has_end_and_padding(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(ConfigError, match="cannot load the tokenizer in") as error:
        load_tokenizer(tmp_path / "c")
    assert "\n" not in str(error.value)


def test_tokenizers_that_differ_are_told_apart():
    check_same_tokenizer(build_tokenizer(), build_tokenizer(), "a", "b")
    other_end, other_token, other_cut = build_tokenizer(), build_tokenizer(), build_tokenizer()
    other_end.eos_token = "<|endoftext|>"
    check_same_tokenizer(build_tokenizer(), other_end, "a", "b")  # a run has one end, whatever a tokenizer's own is
    other_token.add_tokens(["zebra"])
    other_cut.backend_tokenizer.normalizer = normalizers.Lowercase()
    for other, why in (
        (other_token, "320 and 321 tokens; 'zebra' is None and 320"),
        (other_cut, "they cut the same text differently"),
    ):
        with pytest.raises(ConfigError, match=f"a and b have different tokenizers .*{why}"):
            check_same_tokenizer(build_tokenizer(), other, "a", "b")
