"""A smaller model out of a bigger one: keep the layers of greatest block influence (ShortGPT, Men et al., 2024).

keep = choose_layers(block_influence(model, batches), 22)
student = cut(model, keep)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mskd.config import ConfigError
from mskd.models.batch import SequenceBatch
from mskd.models.heads import backbone, decoder_of, family_of, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Iterable[SequenceBatch]) -> list[float]:
    """Influence of every layer: 1 - mean cosine of its input and its output (ShortGPT, eq. 1), over all valid tokens.

    Raises ConfigError where the batches hold no token.
    """
    layers = layers_of(model)
    total = torch.zeros(len(layers), dtype=torch.float64)
    count = 0
    mask: Tensor

    def watch(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            total[index] += cosine[mask].double().sum().cpu()

        return hook

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = batch.to(model.device)
            mask = batch.attention_mask.bool()
            backbone(model, batch.input_ids, batch.attention_mask)
            count += int(mask.sum())
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ConfigError("there is no text to measure the layers' influence on; give at least one sample")
    return (1 - total / count).tolist()


def choose_layers(influence: Sequence[float], layers: int) -> list[int]:
    """Indices of the `layers` layers of greatest influence, in order; of equals the earlier. Raises ConfigError."""
    if not 1 <= layers <= len(influence):
        most = len(influence)
        raise ConfigError(f"layers = {layers}, but the model that it is cut from has {most}; allowed: 1 to {most}")
    return sorted(sorted(range(len(influence)), key=lambda i: -influence[i])[:layers])


def cut(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` with only the layers `keep` (ascending indices); config and KV-cache indices fit it.

    Raises ConfigError for layers that the model does not have, and for a GPT-2 whose layers depend on their number.
    """
    layers = layers_of(model)
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= len(layers):
        raise ConfigError(f"cannot keep layers {list(keep)} of a model of {len(layers)}; give ascending indices from 0")
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and list(keep) != list(range(len(keep))):
        raise ConfigError(
            "this model scales attention by layer number (scale_attn_by_inverse_layer_idx): no layer can go"
        )
    owner, attribute = decoder_of(model), family_of(model).layers
    setattr(owner, attribute, nn.ModuleList(layers[i] for i in keep))
    try:
        small = copy.deepcopy(model)  # of the kept layers only, tied weights stay tied
    finally:
        setattr(owner, attribute, layers)
    for index, layer in enumerate(layers_of(small)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    small.config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None) is not None:
        small.config.layer_types = [config.layer_types[i] for i in keep]
    if hasattr(config, "max_window_layers"):  # Qwen: the first so many layers attend to everything
        gone = set(range(len(layers))) - set(keep)
        small.config.max_window_layers -= sum(i < config.max_window_layers for i in gone)
    return small
