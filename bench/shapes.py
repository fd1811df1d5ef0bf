"""Chains of the shapes that recipes train, with random weights: what a benchmark of time needs of a model.

    student = random_model(SHAPES["smollm2"][-1], seed=0)          # fp32, eval mode, no dropout

The largest model of a chain comes first. Sizes are those of the published models; "smollm2" is the demo's chain, cut
from SmolLM2-135M. No weights are fetched.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel


def _smollm2(layers: int, hidden: int = 576, heads: int = 9, vocabulary: int = 49152) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def _gpt2(layers: int, hidden: int, heads: int) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _opt(layers: int, hidden: int, heads: int, **options: Any) -> OPTConfig:
    return OPTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        dropout=0.0,
        **options,
    )


# name -> (how the models are called, their configurations), largest first
SHAPES: dict[str, tuple[str, tuple[PreTrainedConfig, ...]]] = {
    "smollm2": ("SmolLM2 30 > 22 > 16 layers", tuple(_smollm2(layers) for layers in (30, 22, 16))),
    "gpt2": ("GPT-2 1.5B > 760M > 120M", (_gpt2(48, 1600, 25), _gpt2(36, 1280, 20), _gpt2(12, 768, 12))),
    "opt": (
        "OPT 1.3B > 350M",
        (_opt(24, 2048, 32), _opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False)),
    ),
    "tiny": ("tiny 3 > 2 layers", tuple(_smollm2(layers, hidden=48, heads=3, vocabulary=512) for layers in (3, 2))),
}


def random_model(
    config: PreTrainedConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """A causal language model of this configuration, the same weights for the same seed; eval mode, no dropout.

    The last token of the vocabulary ends a sequence and pads (see lengths.py).
    """
    end = config.vocab_size - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = None, end, end
    return model.to(device=device, dtype=dtype).eval()
