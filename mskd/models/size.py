"""How big a model is, with and without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mskd.config import ConfigError
from mskd.models.folder.architecture import check_architecture
from mskd.models.folder.quantised import check_codes
from mskd.models.heads import layers_of
from mskd.models.sources import check_folder, first_line, quiet

if TYPE_CHECKING:
    pass


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
    vocabulary: int  # rows of the embedding
    config: Any  # transformers'

    def cut_to(self, layers: int | None) -> int:
        """Parameters with so many of its layers kept; None: all."""
        return self.parameters - (0 if layers is None else (self.layers - layers) * self.per_layer)


def size_of(folder: Path) -> Size:
    """Layers, parameters and rows of the embedding of a folder's model, from its configuration. Raises ConfigError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(folder, folder)
    check_architecture(folder)
    check_codes(folder)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as e:
        raise ConfigError(f"cannot load the model in {folder}: {first_line(e)}") from None
    layers: Any = layers_of(model)
    embedding: Any = model.get_input_embeddings()
    return Size(len(layers), num_parameters(model), num_parameters(layers[0]), embedding.num_embeddings, config)
