"""A causal language model out of its folder, as it is trained or copied for sampling.

model = load_model(folder)                          # fp32, dropout off
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from mskd.config import ConfigError
from mskd.models.folder.architecture import check_architecture
from mskd.models.folder.quantised import check_codes, loading_options, plain
from mskd.models.sources import check_folder, first_line, quantised_as, quiet, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the floating parameters, in place. Buffers stay: rotary frequencies and int8 scales need their fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def copy_as(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy for sampling with its parameters in `dtype`; `.to(dtype)` would round rotary frequencies too."""
    return cast(copy.deepcopy(model), dtype).requires_grad_(False).eval()


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    quantization_config: Any = None,
) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode, every dropout set to 0 for good.

    dtype: of the parameters; "auto" is the checkpoint's own, fp32 where its weights are quantised. Raises ConfigError:
    no model, pickles only, damaged or missing weights, unknown architecture, codes that cannot be made plain weights.
    """
    folder = Path(folder)
    check_folder(folder, folder)
    check_architecture(folder)
    check_codes(folder)
    stored = loading_options(folder)
    if stored and quantization_config is not None:
        raise ConfigError(f"{folder} is quantised already ({quantised_as(folder)}); use precision int8, not llm_int8")
    options: dict[str, Any] = {"dtype": dtype, **stored}
    if quantization_config is not None:
        options |= {"quantization_config": quantization_config, "device_map": {"": device}}
    model = _read(folder, attention, options)
    if stored:
        with quiet():
            model = cast(plain(model), dtype if isinstance(dtype, torch.dtype) else torch.float32)
    _no_dropout(model)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # where pad == eos it drops the end token's gradient; padding never counts here
    return model.eval() if quantization_config is not None else model.to(device).eval()  # type: ignore[arg-type]


def _read(folder: Path, attention: str, options: dict[str, Any]) -> Any:
    """What from_pretrained makes of a folder, every weight in its place and every place filled."""
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                attn_implementation=_attention(read_json(folder / "config.json"), attention),
                trust_remote_code=False,
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
    left_out = _left_out(model, report["unexpected_keys"])
    if left_out:
        raise ConfigError(f"the weights in {folder} do not fit config.json, whose model has no place for {left_out}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight.data_ptr() != embedding.weight.data_ptr():
        raise ConfigError(
            f"config.json in {folder} ties the lm_head to the embedding, and the weights hold another lm_head; set "
            "tie_word_embeddings to false there if that head is meant, else take it out of the weights"
        )
    return model


def _attention(config: dict[str, Any], attention: str) -> str:
    """Gemma 2 soft-caps its attention scores. SDPA cannot: transformers 5.10 leaves the cap out there, 5.23 refuses."""
    return "eager" if attention == "sdpa" and config.get("model_type") == "gemma2" else attention


def _left_out(model: PreTrainedModel, keys: Iterable[str]) -> str | None:
    """The first key of a checkpoint that no parameter takes although it belongs to a layer that the model has.

    A bias or a scale that is left out makes another model. Old checkpoints' masks belong to no layer with parameters.
    """
    modules = dict(model.named_modules())
    for key in sorted(keys):
        owner = key.rpartition(".")[0]
        layer = modules.get(owner) or modules.get(f"{model.base_model_prefix}.{owner}")
        if layer is not None and not any(True for _ in layer.children()) and any(True for _ in layer.parameters()):
            return key
    return None


def _no_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):  # plain numbers in OPT's and Llama's classes
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
