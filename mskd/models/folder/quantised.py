"""Folders whose weights are quantised already, loaded as plain weights: each code times its scale, in fp32.

options = loading_options(folder)          # for from_pretrained; {} where the weights are plain
model = plain(model)                       # what it gave, as a model of plain layers

So a teacher, a student or a cut of one is what it would be from the plain folder, and bitsandbytes' 8-bit rows give an
int8 teacher the very codes that the file holds. Kinds that were not tried are refused where a folder is first looked at
(`sources.check_folder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mskd.config import ConfigError
from mskd.models.folder.stored import FLOATS, tensors
from mskd.models.quantize import import_bitsandbytes
from mskd.models.sources import quantised_as, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_codes(folder: Path) -> None:
    """ConfigError where weights are stored as integers or 8-bit floats, and config.json does not say what they mean."""
    code = _first_code(folder) if quantised_as(folder) is None else None
    if code is not None:
        raise ConfigError(
            f"{folder} stores {code[0]} as {code[1]}, and its config.json has no quantization_config that says what "
            "the numbers mean; give a folder with floating weights"
        )


def _first_code(folder: Path) -> tuple[str, str] | None:
    """The name and the dtype of a weight that is no floating one of 16 bits or more."""
    found = ((name, dtype) for name, dtype, _ in tensors(folder) if name.endswith(".weight") and dtype not in FLOATS)
    return next(found, None)


def loading_options(folder: Path) -> dict[str, Any]:
    """What from_pretrained must be told of the folder. Raises ConfigError where bitsandbytes is needed and missing."""
    kind = quantised_as(folder)
    if kind is None:
        return {}
    if _first_code(folder) is None:  # the weights are plain: a merge of adapters left the entry behind
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        del config.quantization_config
        return {"config": config}
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    if kind == "bitsandbytes":
        import_bitsandbytes(f"the weights in {folder} need", "a folder with plain weights")
    else:
        from transformers import FineGrainedFP8Config

        given = read_json(folder / "config.json")["quantization_config"]
        kept = given.get("modules_to_not_convert") or given.get("ignored_layers")
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=kept)
    return options


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain layers in fp32, trainable; one that has none else is returned as it is."""
    from transformers.pytorch_utils import Conv1D

    if getattr(model, "hf_quantizer", None) is None:
        return model
    # GPT-2's transposed layers, of which bitsandbytes keeps the transpose
    transposed = [name for name, m in model.named_modules() if getattr(m, "source_cls", None) is Conv1D]
    model.dequantize(dtype=torch.float32)  # type: ignore[no-untyped-call]
    for name in transposed:
        linear: Any = model.get_submodule(name)
        back = Conv1D(linear.out_features, linear.in_features)
        back.weight, back.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias
        model.set_submodule(name, back)
    return model.requires_grad_(True)
