"""Tiny random models of every family that mskd knows, and of the variants that change what comes before the lm_head."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

V, PAD = 96, 1
SMALL = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
ROPE = SMALL | dict(intermediate_size=48, num_key_value_heads=2, pad_token_id=PAD, initializer_range=0.2)
# Caps and windows so tight that leaving one out is seen; no other soft-cap than 2.5 may be guessed.
GEMMA = ROPE | dict(head_dim=8, query_pre_attn_scalar=5, sliding_window=4, final_logit_softcapping=2.5)
OPT = SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, pad_token_id=PAD, init_std=0.2, dropout=0.1)
FAMILY_CONFIGS = {
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2),
    "opt": OPTConfig(**OPT),
    "opt-projected": OPTConfig(**OPT | dict(word_embed_proj_dim=16)),
    "opt-norm-after": OPTConfig(**OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "llama": LlamaConfig(**ROPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**ROPE, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**ROPE),
    "qwen2-sliding": Qwen2Config(**ROPE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": Qwen3Config(**ROPE, head_dim=8),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=1.5, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**GEMMA | dict(final_logit_softcapping=None), sliding_window_pattern=2),
    "gemma3-capped": Gemma3TextConfig(**GEMMA, sliding_window_pattern=3, tie_word_embeddings=False),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=48, initializer_range=0.2, hidden_dropout=0.1),
    "gpt-neox-serial": GPTNeoXConfig(**SMALL, intermediate_size=48, initializer_range=0.2, use_parallel_residual=False),
    "mistral": MistralConfig(**ROPE, sliding_window=4),
}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected.

    Sums in another order, as GEMMs of another shape or on another processor make them, leave 1e-6 in these models.
    One token of padding that is seen leaves 0.3 and more.
    """
    return float((found - expected).norm() / expected.norm())


def greedily_the_same(model: PreTrainedModel, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two greedy continuations are one, or part where the logits of their tokens are less than 1e-4 apart.

    Rounding chooses there. What follows has another prefix.
    """
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *one[:i]]])).logits[0, -1]
            return abs(float(logits[a] - logits[b])) < 1e-4
    return True


def build(config, seed: int = 0) -> PreTrainedModel:
    """A random model with biases and norms that are not trivial, so that leaving one out is seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # a test may change its model's
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
