"""The model that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mskd.models.batch import SequenceBatch
from mskd.models.heads import Head, family_of, head_of, hidden_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        hidden = hidden_at(self.model, inputs)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        return loss(hidden, head_of(self.model))
