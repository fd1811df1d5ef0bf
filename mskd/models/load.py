"""A causal language model out of its folder, as it is trained or copied for sampling.

model = load_model(folder)                          # fp32, dropout off
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from mskd.config import ConfigError
from mskd.models.heads import FAMILIES, unknown_family
from mskd.models.sources import check_folder, first_line, quiet, read_json

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
        raise unknown_family(names[0])
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
