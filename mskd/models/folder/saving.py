"""A model written as an ordinary transformers folder, which stops by itself where it was trained to.

save_model(model, tokenizer, folder, ends=(411, 2), dtype=torch.bfloat16)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mskd.models.sources import quiet
from mskd.store.files import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    ends: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write safetensors, config, generation config and tokenizer; the model itself stays as it is.

    ends: the ids that end an answer; `generate` stops at each, and the first one is the saved tokenizer's eos. Default:
    the tokenizer's eos alone. Other settings of the model's generation config are not written, since it
    was not trained under them. dtype: of the floating weights in the file, default: as they are.
    Raises OSError, with its errno, where the folder cannot be written, FloatingPointError where a weight is too big for
    the dtype.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ends = ends or (tokenizer.eos_token_id,)
    written = _twin(model, dtype)
    _declare(written, tokenizer, ends)
    with quiet(), disk_errors(folder):
        written.save_pretrained(folder)
        _ending_with(tokenizer, ends[0]).save_pretrained(folder)


def _twin(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of the same weights on the CPU, in `dtype` or in their own; what is there already is shared, not copied.

    The model itself cannot be cast and cast back: data parallelism would lose its hooks on the parameters.
    """
    with quiet(), torch.device("meta"):
        config = copy.deepcopy(model.config)
        vars(config).pop("auto_map", None)  # of code that is not in the folder
        twin: Any = type(model)._from_config(config)
    cast: dict[int, Tensor] = {}  # by address: tied weights stay one
    state = {
        name: cast.setdefault(weight.data_ptr(), _cast(name, weight.detach(), dtype or weight.dtype))
        for name, weight in model.state_dict().items()
    }
    twin.load_state_dict(state, assign=True)
    if _tied(model):
        twin.tie_weights()
    return twin


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if not weight.is_floating_point():
        return weight.cpu()
    cast = weight.to("cpu", dtype)
    if dtype == torch.float16 and bool((cast.isinf() & weight.cpu().isfinite()).any()):
        raise FloatingPointError(f"{name} holds numbers beyond fp16's 65504; set train.save_dtype = 'bf16' or 'fp32'")
    return cast


def _declare(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
    """What the folder says of ends: generation_config.json, and config.json for the tools that read only that."""
    from transformers import GenerationConfig

    eos = ends[0] if len(ends) == 1 else list(ends)
    model.config.eos_token_id = eos
    begin = getattr(model.generation_config, "bos_token_id", None)
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )


def _ending_with(tokenizer: PreTrainedTokenizerBase, end: int) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it whose eos is the token `end`."""
    if tokenizer.eos_token_id == end:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.eos_token = str(tokenizer.convert_ids_to_tokens(end))
    return own
