"""How the weights of a model's folder are stored, read from the headers of its safetensors files.

stored_dtype(folder)        # torch.bfloat16
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mskd.config import ConfigError
from mskd.models.sources import first_line, quantised_as

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}


def tensors(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype as safetensors spells it, shape) of every tensor. Raises ConfigError for a damaged file."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    yield name, str(part.get_dtype()), part.get_shape()
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"the weights in {folder} are damaged: {first_line(e)}") from None


def exact_dtype(folder: Path) -> torch.dtype:
    """A dtype that holds every weight of the folder's model as it is loaded: fp32 where they are quantised."""
    return stored_dtype(folder) if quantised_as(folder) is None else torch.float32


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most of a folder's floating weights, by bytes, of fp32, bf16 and fp16; fp32 where it has none."""
    found: Counter[torch.dtype] = Counter()
    for _, dtype, shape in tensors(folder):
        if dtype in FLOATS:
            found[FLOATS[dtype]] += math.prod(shape) * BITS[dtype]
    return found.most_common(1)[0][0] if found else torch.float32
