"""A frozen model whose weights wait in host memory while the GPU does not need them.

    waiting = Waiting(model, stay=(head.weight,), device=device)   # pinned copies; what stays is left where it is
    with waiting.lent():
        model(input_ids)                                           # on the device

Frozen weights never change: sending them away drops the device's copy and moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class Waiting:
    """The tensors of a model, at home in host memory (pinned where the device is a GPU), lent to the device."""

    def __init__(self, model: nn.Module, *, stay: Iterable[Tensor], device: torch.device) -> None:
        left = {t.data_ptr() for t in stay}
        self.tensors = [t for t in chain(model.parameters(), model.buffers()) if t.data_ptr() not in left]
        self.home = [t.data.cpu().pin_memory() if device.type == "cuda" else t.data.cpu() for t in self.tensors]
        self.device, self.users = device, 0
        self._put(self.home)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the weights are on the device; may be nested, and only the outermost one moves them."""
        if not self.users:
            self._put([t.to(self.device, non_blocking=True, copy=True) for t in self.home])
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self._put(self.home)

    def _put(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value
