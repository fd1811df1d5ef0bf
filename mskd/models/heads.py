"""A model's parts as data: its decoder's hidden states and its lm_head, family by family.

    hidden, cache = backbone(model, input_ids, mask)    # [B, T, H], after the final norm and any output projection
    logits = hidden @ head_of(model).weight.T           # plus bias, scale and soft-cap, where the head has them

A model family is one row of FAMILIES. A family whose head is not known there is refused, never guessed.
B sequences, T tokens, N valid tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mskd.config import ConfigError
from mskd.models.batch import SequenceBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """An lm_head as data: z = scale * (h W^T + b); logits = z, or with a soft-cap softcap * tanh(z / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Family:
    """Where a family's class keeps its parts. Its head must be a plain linear layer on the decoder's output."""

    decoder: str  # the module from tokens to the state that the lm_head takes
    layers: str = "layers"  # the decoder's list of layers
    softcap: str | None = None  # the name, in the configuration, of the soft-cap of its logits
    packs: bool = True  # its masks keep sequences apart whose positions begin anew within a row


FAMILIES = {
    "GPT2LMHeadModel": Family("transformer", "h"),
    "GPTNeoXForCausalLM": Family("gpt_neox"),
    "Gemma2ForCausalLM": Family("model", softcap="final_logit_softcapping"),
    "Gemma3ForCausalLM": Family("model", softcap="final_logit_softcapping"),  # text only
    "LlamaForCausalLM": Family("model"),
    "MistralForCausalLM": Family("model"),
    "OPTForCausalLM": Family("model.decoder", packs=False),  # applies project_out and a final norm where it has them
    "Qwen2ForCausalLM": Family("model"),
    "Qwen3ForCausalLM": Family("model"),
}


def family_of(model: nn.Module) -> Family:
    """The row of FAMILIES of a transformers model.

    Raises ConfigError for a class that is not in it, and for a model whose tokens see what comes after them.
    """
    cls = type(model)
    if cls.__name__ not in FAMILIES or not cls.__module__.startswith("transformers.models."):
        raise unknown_family(f"{cls.__module__}.{cls.__name__}")
    config: Any = model.config
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ConfigError(
            f"this {cls.__name__} attends to later tokens too (config.json); "
            "only models that predict the next token from those before it can be distilled"
        )
    return FAMILIES[cls.__name__]


def unknown_family(cls: str) -> ConfigError:
    return ConfigError(f"the lm_head of {cls} is not understood and not guessed; known: {', '.join(FAMILIES)}")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module from tokens to the state before the lm_head. Raises ConfigError for an unknown family."""
    return model.get_submodule(family_of(model).decoder)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers, first to last. Raises ConfigError for an unknown family."""
    return getattr(decoder_of(model), family_of(model).layers)


def head_of(model: PreTrainedModel) -> Head:
    """The lm_head of a model; the weight is the parameter itself, so gradients reach it. Raises ConfigError."""
    family, head = family_of(model), model.get_output_embeddings()  # GPT-NeoX's has another name up to 5.2x
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"  # an adapter's class is called Linear too
        raise ConfigError(
            f"the lm_head of this {type(model).__name__} is a {kind}, not a plain nn.Linear; merge an adapter, or take "
            "it off the lm_head"
        )
    softcap = getattr(model.config, family.softcap) if family.softcap else None
    return Head(head.weight, head.bias, softcap=softcap)


def steady_positions(config: Any) -> int | None:
    """Positions up to which a rotary embedding is the same for every batch; None where it always is.

    Past them longrope and dynamic turn the whole batch by other frequencies, chosen by its longest sequence: what a
    sequence gives would depend on its neighbours, and a KV cache would hold keys of both kinds.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in ropes.values() if all(isinstance(r, dict) for r in ropes.values()) else [ropes]:
        kind = rope.get("rope_type")
        own = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        if kind == "longrope":
            limits.append(int(rope.get("original_max_position_embeddings") or own))
        elif kind == "dynamic":
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def check_positions(config: Any, needed: int, what: str) -> None:
    """ConfigError where `needed` positions of a model are more than `steady_positions`; what: who needs them."""
    limit = steady_positions(config)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"{what} needs {needed} positions, and past {limit} the rotary embedding of this {config.model_type} model "
            "depends on the batch (rope_type longrope or dynamic), so nothing longer is read; lower data.max_tokens, "
            f"data.max_prompt_tokens or max_new_tokens to {limit} together"
        )


def backbone(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool = False,
) -> tuple[Tensor, Any]:
    """Hidden states right before the lm_head, and the KV cache.

    input_ids [B, T] int64; attention_mask [B, past + T], 1 = counts, padding on either side, None = all count;
    position_ids [B, T], default: the number of counting tokens before each; without a mask they may begin anew within a
    row, where another sequence begins. Returns hidden [B, T, H] and a cache: None without use_cache;
    `past_key_values` itself, grown, where it was given. Raises ConfigError for an unknown family, and for more tokens
    than `steady_positions`.
    """
    if position_ids is None and steady_positions(model.config) is not None:
        # Where positions are given, several sequences of a row begin anew, and the run has checked the longest.
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        check_positions(model.config, past + input_ids.shape[1], "a batch")
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, -input_ids.shape[1] :]
    out = decoder_of(model)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
    )
    return out.last_hidden_state, out.past_key_values if use_cache else None


def hidden_at(model: PreTrainedModel, inputs: SequenceBatch) -> Tensor:
    """Hidden states [N, H] at inputs.positions.

    Padding is on the right and attention is causal, so what counts never sees it. No mask is the fastest attention.
    """
    mask = None if inputs.position_ids is None else _packed_mask(model, inputs.input_ids, inputs.position_ids)
    hidden, _ = backbone(model, inputs.input_ids, mask, inputs.position_ids)
    return hidden.flatten(0, 1).index_select(0, inputs.positions)


def _packed_mask(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
    """The mask of rows that hold several sequences, where the family's class does not make it from their positions.

    flash-attn needs none: it takes one row, and every family hands it the positions, from which it knows the sequences.
    """
    if family_of(model).packs:
        return None
    from transformers.masking_utils import create_causal_mask

    # Shape, dtype and device are what is read of the states.
    states = torch.empty(*input_ids.shape, 0, dtype=head_of(model).weight.dtype, device=input_ids.device)
    options: dict[str, Any] = {"inputs_embeds": states, "position_ids": position_ids}
    mask: Any = create_causal_mask(config=model.config, attention_mask=None, past_key_values=None, **options)
    return mask
