"""Folders as users bring them: quantised, adapters, shards, tied heads, other names of a class, code of their own."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILY_CONFIGS, build
from safetensors.torch import load_file, save_file
from tiny import build_llama, build_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

from mskd.config import ConfigError
from mskd.config.hardware import detect
from mskd.models import (
    SequenceBatch,
    head_of,
    load_model,
    load_teacher,
    load_tokenizer,
    num_parameters,
    resolve_source,
    save_model,
    size_of,
)
from mskd.models.folder.stored import exact_dtype, stored_dtype

PROMPTS, RESPONSES = [[5, 6, 7, 8], [11, 12]], [[20, 21, 9, 40, 2], [22, 23, 24]]
BATCH = SequenceBatch.from_sequences(PROMPTS, RESPONSES, 2)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
MLX = {"group_size": 64, "bits": 4}


@pytest.fixture
def folder(tmp_path, tiny_llama_folder) -> Path:
    """A copy of the tiny model that the test may change."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model", copy_function=shutil.copyfile))


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}))


def refused(folder: Path) -> str:
    """The line in which every way into a folder refuses it."""
    lines = set()
    for load in (lambda: resolve_source(str(folder)), lambda: load_model(folder), lambda: size_of(folder)):
        with pytest.raises(ConfigError) as error:
            load()
        lines.add(str(error.value))
    (line,) = lines
    assert "\n" not in line
    return line


def reverse_kl(p, q) -> float:
    """KL(q || p) of two models' next-token distributions at the response tokens, nats a token, float64."""

    def logprobs(model):
        hidden = model.hidden(BATCH) if hasattr(model, "hidden") else None
        if hidden is None:
            with torch.no_grad():
                rows = model(BATCH.input_ids).logits.flatten(0, 1)[BATCH.positions]
            return rows.double().log_softmax(-1)
        return (hidden.double() @ head_of(model.model).weight.double().T).log_softmax(-1)

    q, p = logprobs(q), logprobs(p)
    return float((q.exp() * (q - p)).sum(-1).mean())


# -- quantised already -----------------------------------------------------------------------------

BNB = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4, double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
}


def bitsandbytes_folder(folder: Path, config: BitsAndBytesConfig, family: str = "llama-tied") -> Path:
    given = copy.deepcopy(FAMILY_CONFIGS[family])
    if family != "gpt2":
        given.hidden_size, given.head_dim, given.intermediate_size = 64, 16, 128  # bitsandbytes' blocks are of 64
    build(given).save_pretrained(folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder / "codes")
    build_tokenizer().save_pretrained(folder / "codes")
    return folder / "codes"


@pytest.mark.parametrize("kind", BNB)
def test_a_bitsandbytes_folder_is_the_model_that_it_is(kind, tmp_path):
    codes = bitsandbytes_folder(tmp_path, BNB[kind])
    theirs = AutoModelForCausalLM.from_pretrained(codes, device_map={"": "cpu"})
    ours = load_model(codes)
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and all(p.requires_grad for p in ours.parameters())
    assert not hasattr(ours.config, "quantization_config")
    # bitsandbytes rounds activations too, to 8 bits, and on some CPUs to bf16, which is not of the weights.
    assert reverse_kl(theirs, ours) < 0.01 and reverse_kl(theirs, shuffled(ours)) > 0.5
    for precision in ("fp32", "int8"):
        teacher = load_teacher(codes, precision, detect("cpu"))
        assert reverse_kl(ours, teacher) < (1e-9 if precision == "fp32" or kind == "8 bits" else 0.01)
    if kind == "8 bits":
        assert reverse_kl(load_model(tmp_path / "plain"), ours) < 0.01
    assert (stored_dtype(codes), exact_dtype(codes)) == (torch.float32, torch.float32)
    assert size_of(codes).parameters == num_parameters(ours)


def shuffled(model):
    """The model with a layer's codes in another order: what the divergence of a wrong reading looks like."""
    wrong = copy.deepcopy(model)
    weight = wrong.model.layers[1].mlp.down_proj.weight.data
    weight.copy_(weight.flip(0))
    return wrong


def test_an_int8_teacher_of_8_bit_rows_has_the_files_own_codes(tmp_path):
    codes = bitsandbytes_folder(tmp_path, BNB["8 bits"], "llama")
    stored = load_file(codes / "model.safetensors")
    layer = load_teacher(codes, "int8", detect("cpu")).model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.weight, stored["model.layers.1.mlp.up_proj.weight"])
    torch.testing.assert_close(layer.scale * 127, stored["model.layers.1.mlp.up_proj.SCB"], atol=0, rtol=1e-6)


def test_gpt2s_transposed_layers_come_back_and_are_saved_as_they_were(tmp_path):
    codes = bitsandbytes_folder(tmp_path, BNB["8 bits"], "gpt2")
    plain, ours = load_model(tmp_path / "plain"), load_model(codes)
    assert type(ours.transformer.h[0].attn.c_proj) is Conv1D
    assert reverse_kl(plain, ours) < 0.01
    save_model(ours, build_tokenizer(), tmp_path / "again")
    assert reverse_kl(load_model(tmp_path / "again"), ours) == 0
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_llm_int8_of_a_quantised_folder_is_refused(tmp_path):
    codes = bitsandbytes_folder(tmp_path, BNB["nf4"])
    with pytest.raises(ConfigError, match=r"is quantised already \(bitsandbytes\); use precision int8, not llm_int8"):
        load_teacher(codes, "llm_int8", detect("cpu"))


@pytest.mark.parametrize("block", [16, None], ids=["blocks", "tensors"])
def test_an_fp8_folder_is_the_model_that_it_is(block, folder):
    expected = load_model(folder)
    weights, stored = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        if "_proj" not in name or "layers.3" in name:
            stored[name] = weight
            continue
        size = (block, block) if block else tuple(weight.shape)
        blocks = weight.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0])).transpose(1, 2)  # [O/b, I/b, b, b]
        scale = blocks.abs().amax((2, 3)) / 448
        code = (blocks / scale[:, :, None, None]).to(torch.float8_e4m3fn)
        restored = (code.float() * scale[:, :, None, None]).transpose(1, 2).reshape(weight.shape)
        expected.get_parameter(name).data = restored
        stored[name] = code.transpose(1, 2).reshape(weight.shape).contiguous()
        stored[f"{name}_scale_inv"] = scale if block else scale[0, 0]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    given = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    given |= {"weight_block_size": [block, block] if block else None, "modules_to_not_convert": ["model.layers.3"]}
    configure(folder, quantization_config=given)
    ours = load_model(folder)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=0, rtol=1e-6)
    assert reverse_kl(expected, load_teacher(folder, "fp32", detect("cpu"))) < 1e-9
    assert exact_dtype(folder) == torch.float32


@pytest.mark.parametrize("given", [GPTQ, AWQ, COMPRESSED, MLX], ids=["gptq", "awq", "compressed-tensors", "mlx"])
def test_other_kinds_of_quantised_folders_are_refused_by_name(given, folder):
    configure(folder, quantization_config=given)
    kind = given.get("quant_method", "a kind without quant_method")
    line = refused(folder)
    assert f"is quantised already ({kind}), and mskd reads only bitsandbytes and fp8 so" in line
    assert "give the folder or hub id of the model with plain weights" in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_a_word_of_what_they_mean_are_refused(dtype, folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, size_of):
        with pytest.raises(ConfigError, match=f"stores {name} as .*no quantization_config"):
            load(folder)


@pytest.mark.parametrize("key", ["self_attn.q_proj.bias", "mlp.up_proj.weight_scale"])
def test_a_weight_of_a_layer_that_the_model_would_leave_out_is_refused(key, folder):
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.1.{key}"] = torch.ones(32 if "q_proj" in key else 64)
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old checkpoints: nothing misses it
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"whose model has no place for model.layers.1.{key}"):
        load_model(folder)
    del weights[f"model.layers.1.{key}"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["alone", "config", "whole model"])
def test_an_adapter_is_refused_by_the_name_of_its_base(beside, folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/base"}))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    if beside != "whole model":
        (folder / "model.safetensors").unlink()
    if beside == "alone":
        (folder / "config.json").unlink()
    line = refused(folder)
    assert "is an adapter of a/base; merge it first (peft's AutoPeftModelForCausalLM.from_pretrained, " in line


# -- shards, tied heads, padding -------------------------------------------------------------------


def test_shards_with_an_index_are_one_model(tmp_path):
    model, tokenizer = build_llama(build_tokenizer()), build_tokenizer()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert (
        len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
        and (tmp_path / "model.safetensors.index.json").exists()
    )
    assert reverse_kl(model, load_model(tmp_path)) == 0 and stored_dtype(tmp_path) == torch.float32
    (last, *_) = sorted(tmp_path.glob("model-*.safetensors"))[::-1]
    last.unlink()
    with pytest.raises(ConfigError, match="cannot load the model in"):
        load_model(tmp_path)


@pytest.mark.parametrize("twice", [False, True])
def test_a_tied_head_may_be_stored_once_or_twice(twice, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    if twice:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert reverse_kl(build_llama(build_tokenizer()), model) == 0
    save_model(model, build_tokenizer(), tmp_path / "again", dtype=torch.bfloat16)
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    assert reverse_kl(load_model(tmp_path / "again"), model) < 0.05


def test_a_tied_head_that_is_stored_as_another_is_refused_and_an_untied_one_kept(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 0.5 + 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="ties the lm_head to the embedding, and the weights hold another lm_head"):
        load_model(folder)
    configure(folder, tie_word_embeddings=False)
    model = load_model(folder)
    save_model(model, build_tokenizer(), tmp_path / "again")
    assert reverse_kl(load_model(tmp_path / "again"), model) == 0 < reverse_kl(build_llama(build_tokenizer()), model)


def test_plain_weights_under_a_quantization_config_that_was_left_behind_are_read_as_they_are(folder):
    left = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    for given in (left, left | {"load_in_4bit": False, "load_in_8bit": True}, fp8):  # of a merge of adapters, say
        configure(folder, quantization_config=given)
        model = load_model(folder)
        assert reverse_kl(build_llama(build_tokenizer()), model) == 0 and not hasattr(
            model.config, "quantization_config"
        )


def test_a_tokenizer_without_padding_pads_with_its_end_and_is_saved_so(folder, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    save_model(load_model(folder), loaded, tmp_path / "again")
    assert loaded.pad_token == load_tokenizer(tmp_path / "again").pad_token == "<|im_end|>"
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["pad_token_id"] == 2


# -- what class it is ------------------------------------------------------------------------------


def test_the_class_that_is_built_decides_not_its_name_in_config_json(folder):
    for named in ("InternLM3ForCausalLM", "LLaMAForCausalLM"):
        configure(folder, architectures=[named])
        assert reverse_kl(build_llama(build_tokenizer()), load_model(folder)) == 0
        assert size_of(folder).layers == 4
    configure(folder, architectures=None)
    load_model(folder)


def test_a_model_of_another_kind_is_refused_though_its_weights_would_fit(folder):
    config = build_llama(build_tokenizer()).config
    LlamaForSequenceClassification(config).save_pretrained(folder)  # its embedding would be taken for the tied head
    with pytest.raises(ConfigError, match="holds a LlamaForSequenceClassification, which is no causal language model"):
        load_model(folder)


def test_code_that_a_folder_brings_is_never_run(folder, tmp_path):
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    configure(
        folder, model_type="own", auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    )
    for load in (load_model, size_of):
        with pytest.raises(ConfigError, match="brings the code of a class of its own .* mskd runs no code"):
            load(folder)
    configure(folder, model_type="llama")  # transformers' own class, which is what is built
    model = load_model(folder)
    assert reverse_kl(build_llama(build_tokenizer()), model) == 0
    save_model(model, build_tokenizer(), tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not (tmp_path / "ran").exists()
