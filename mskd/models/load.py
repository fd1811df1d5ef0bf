"""Language models as mskd uses them: a backbone and an lm_head as data; a student that trains, a frozen teacher.

    model = load_model(folder)                          # fp32, dropout off
    hidden, cache = backbone(model, input_ids, mask)    # [B, T, H], after the final norm and any output projection
    logits = hidden @ head_of(model).weight.T           # plus bias, scale and soft-cap, where the head has them
    teacher = load_teacher(folder, "int8", detect())    # frozen, 8-bit

A model family is one row of FAMILIES. A family whose head is not known there is refused, never guessed.
B sequences, T tokens, N valid tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mskd.config import ConfigError, Precision
from mskd.config.hardware import Hardware
from mskd.models.offload import Waiting
from mskd.models.quantize import import_bitsandbytes, quantize_layers
from mskd.models.sources import check_folder, content_hash, first_line, quiet, read_json, resolve_source
from mskd.store.checkpoint import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mskd.data.instructions import SequenceBatch

__all__ = [
    "FAMILIES", "Family", "Head", "Size", "Student", "Teacher", "backbone", "check_offload", "check_precision",
    "check_same_tokenizer", "content_hash", "copy_as", "decoder_of", "family_of", "head_of", "layers_of", "load_model",
    "load_teacher", "load_tokenizer", "num_layers", "num_parameters", "resolve_source", "save_model", "size_of",
]  # fmt: skip


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
        raise _unknown(f"{cls.__module__}.{cls.__name__}")
    config: Any = model.config
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ConfigError(
            f"this {cls.__name__} attends to later tokens too (config.json); "
            "only models that predict the next token from those before it can be distilled"
        )
    return FAMILIES[cls.__name__]


def _unknown(cls: str) -> ConfigError:
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
        kind = type(head).__name__
        raise ConfigError(f"the lm_head of this {type(model).__name__} is a {kind}, not a plain nn.Linear")
    softcap = getattr(model.config, family.softcap) if family.softcap else None
    return Head(head.weight, head.bias, softcap=softcap)


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
    `past_key_values` itself, grown, where it was given. Raises ConfigError for an unknown family.
    """
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


def _hidden_at(model: PreTrainedModel, inputs: SequenceBatch) -> Tensor:
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


def num_layers(model_or_config: Any) -> int:
    """Transformer layers of a model, or of its configuration."""
    return int(getattr(model_or_config, "config", model_or_config).num_hidden_layers)


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once, int8 weights as one each."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Size:
    """How big the model of a folder is, known without loading its weights."""

    layers: int
    parameters: int
    per_layer: int

    def cut_to(self, layers: int | None) -> int:
        """Parameters with so many of its layers kept; None: all."""
        return self.parameters - (0 if layers is None else (self.layers - layers) * self.per_layer)


def size_of(folder: Path, *, trust_remote_code: bool = False) -> Size:
    """Layers and parameters of the model of a folder, from its configuration. Raises ConfigError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(folder, folder)
    read_json(folder / "config.json")
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as e:
        raise ConfigError(f"cannot load the model in {folder}: {first_line(e)}") from None
    layers = layers_of(model)
    return Size(len(layers), num_parameters(model), num_parameters(layers[0]))


# -- student and teacher --------------------------------------------------------------------------


class Student(nn.Module):
    """A trained model with its loss inside `forward`, so that data parallelism sees backbone and head in one call."""

    def __init__(self, model: PreTrainedModel, *, gradient_checkpointing: bool = False):
        super().__init__()
        family_of(model)
        self.model = model
        model.train()  # dropout is off in `load_model`; checkpointing works in training mode only
        if gradient_checkpointing:
            # its name up to transformers 5.2x, then its new name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def forward(
        self, inputs: SequenceBatch, loss: Callable[[Tensor, Head], tuple[Tensor, dict[str, Tensor]]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `loss(hidden, head)` gives; hidden [N, H] at inputs.positions, in autocast's dtype where it is on."""
        hidden = _hidden_at(self.model, inputs)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        return loss(hidden, head_of(self.model))


@dataclass(frozen=True)
class Teacher:
    """A frozen model: no parameter requires a gradient, eval mode. Made by `load_teacher`."""

    model: PreTrainedModel
    precision: Precision
    waiting: Waiting | None = None  # its weights but the head's, where they wait in host memory
    top1: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)  # evaluation's, by batch

    @property
    def head(self) -> Head:
        return head_of(self.model)

    def on_device(self) -> AbstractContextManager[None]:
        """Inside, the whole model is on its device; `hidden` does this by itself. The head is there all the time."""
        return nullcontext() if self.waiting is None else self.waiting.lent()

    @torch.no_grad()
    def hidden(self, inputs: SequenceBatch) -> Tensor:
        """Hidden states [N, Ht] at inputs.positions, in the teacher's dtype, whatever autocast is on."""
        with self.on_device(), torch.autocast(inputs.input_ids.device.type, enabled=False):
            return _hidden_at(self.model, inputs)


def load_teacher(
    folder: Path, precision: Precision, hardware: Hardware, *, trust_remote_code: bool = False, offload: bool = False
) -> Teacher:
    """The frozen model of a folder, its layers' weights in `precision`, on hardware.device.

    int8: weight-only (see quantize.py), activations in hardware.teacher_dtype. Embedding and lm_head stay in it too:
    one is a lookup and no GEMM, they are often the same tensor, errors of the head go straight into the logits, and the
    fused losses take its weight as it is. offload: the layers wait in host memory while they do not compute. Raises
    ConfigError.
    """
    check_precision(precision, hardware)
    if offload:
        check_offload(precision, hardware)
    dtype, device = hardware.teacher_dtype, hardware.device
    options: dict[str, Any] = {"attention": hardware.attention, "trust_remote_code": trust_remote_code}
    if precision == "int8":
        # In the checkpoint's own dtype: int8 weights then depend on the checkpoint alone, not on this machine.
        model = load_model(folder, dtype="auto", **options)
        quantize_layers(layers_of(model))
        _cast(model, dtype)
        model.to(device)  # type: ignore[arg-type]
    elif precision == "llm_int8":
        from transformers import BitsAndBytesConfig

        # On a CPU it says for every layer that it casts activations to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

        quantization = BitsAndBytesConfig(load_in_8bit=True)
        model = load_model(folder, dtype=dtype, device=device, quantization_config=quantization, **options)
    else:
        own = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        model = load_model(folder, dtype=own, device=device, **options)
    head = head_of(model.requires_grad_(False).eval())
    stay = [t for t in (head.weight, head.bias) if t is not None]
    return Teacher(model, precision, Waiting(model, stay=stay, device=device) if offload else None)


def check_offload(precision: Precision, hardware: Hardware) -> None:
    """Raise ConfigError unless a teacher of this precision can wait in host memory (`run.teacher_offload`)."""
    if hardware.device.type == "cpu":
        raise ConfigError("run.teacher_offload: on a CPU the teacher is in host memory already; leave it off")
    if precision == "llm_int8":
        raise ConfigError("run.teacher_offload: the weights of LLM.int8 cannot be moved; use int8, or leave it off")


def check_precision(precision: Precision, hardware: Hardware) -> None:
    """Raise ConfigError unless a teacher of this precision can be loaded on this machine."""
    if precision == "llm_int8" and not hardware.llm_int8:
        raise ConfigError(f"precision = 'llm_int8': {hardware.reasons['int8']}; use int8")
    if precision in ("int8", "llm_int8"):
        import_bitsandbytes()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the floating parameters, in place. Buffers stay: rotary frequencies and int8 scales need their fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def copy_as(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy for sampling with its parameters in `dtype`; `.to(dtype)` would round rotary frequencies too."""
    return _cast(copy.deepcopy(model), dtype).requires_grad_(False).eval()


# -- folders --------------------------------------------------------------------------------------


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode, every dropout set to 0 for good.

    dtype: of the parameters; "auto" is the checkpoint's own. Raises ConfigError: no model, pickles only, damaged or
    missing weights, unknown architecture.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    check_folder(folder, folder)
    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    if names and names[0] not in FAMILIES:  # said before gigabytes are read
        raise _unknown(names[0])
    options: dict[str, Any] = {}
    if quantization_config is not None:
        options = {"quantization_config": quantization_config, "device_map": {"": device}}
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=_attention(config, attention),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, with their names
                **options,
            )
        except SafetensorError as e:
            raise ConfigError(f"the weights in {folder} are damaged: {first_line(e)}") from None
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as e:
            raise ConfigError(f"cannot load the model in {folder}: {first_line(e)}") from None
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(key for key, *shapes in report["mismatched_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"the weights in {folder} do not fit config.json: {missing[0]}{more} missing or misshapen")
    _no_dropout(model)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # where pad == eos it drops the end token's gradient; padding never counts here
    return model.eval() if quantization_config is not None else model.to(device).eval()


def _attention(config: dict[str, Any], attention: str) -> str:
    """Gemma 2 soft-caps its attention scores. SDPA cannot: transformers 5.10 leaves the cap out there, 5.23 refuses."""
    return "eager" if attention == "sdpa" and config.get("model_type") == "gemma2" else attention


def _no_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):  # plain numbers in OPT's and Llama's classes
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary transformers folder: safetensors, config, generation config, tokenizer. Its card is card.py's.

    Raises OSError, with its errno, where the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generation = model.generation_config
    if generation is not None:
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        if tokenizer.eos_token_id not in ends:
            generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
        if generation.temperature is not None or generation.top_p is not None or generation.top_k is not None:
            generation.do_sample = True  # or transformers refuses to write the sampling parameters
    with quiet(), disk_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# -- tokenizers -----------------------------------------------------------------------------------


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; it has an end token, and a padding token or that one for it. Raises ConfigError."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as e:  # the tokenizers package raises bare Exceptions
            raise ConfigError(f"cannot load the tokenizer in {folder}: {first_line(e)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token; responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


PROBE = "In 1984, Zoë's 12345 cats don't\trun.\n\n  x = [y**2]; 日本語 😀 <|im_end|></s>"


def check_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, name_a: str, name_b: str) -> None:
    """ConfigError unless two tokenizers have the same tokens, the same end token and cut a probe text alike."""
    why = None
    if a.eos_token_id != b.eos_token_id:
        why = f"their end tokens are {a.eos_token!r} ({a.eos_token_id}) and {b.eos_token!r} ({b.eos_token_id})"
    elif a.get_vocab() != b.get_vocab():
        ours, theirs = a.get_vocab(), b.get_vocab()
        odd = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        why = f"{len(ours)} and {len(theirs)} tokens; {odd!r} is {ours.get(odd)} and {theirs.get(odd)}"
    elif a(PROBE)["input_ids"] != b(PROBE)["input_ids"]:
        why = "they cut the same text differently"
    if why:
        raise ConfigError(f"{name_a} and {name_b} have different tokenizers ({why}); a hop needs the same one")
