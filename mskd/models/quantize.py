"""Weight-only int8: weights as int8 with one scale per output row, activations untouched. Runs on every GPU and CPU.

    quantize_layers(layers)        # in place: every nn.Linear and Conv1D inside becomes an Int8Linear

Quantisation is bitsandbytes' row-wise one, always done on the CPU, so that a checkpoint gives the same int8 weights on
every machine. A weight is cast to the activations' dtype a block of rows at a time, before a vendor GEMM: its full
16- or 32-bit copy never exists. docs/log.md has what was measured against torchao, LLM.int8 and torch's fused kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mskd.config import ConfigError

BLOCK_BYTES = 16 * 2**20  # of one cast block of rows


class Int8Linear(nn.Module):
    """y = x W^T + b with W = scale * weight. weight int8 [O, I], scale fp32 [O], bias [O] or None; any x [..., I]."""

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, BLOCK_BYTES // (self.in_features * x.element_size()))
        if rows >= self.out_features:
            out = self._block(x, slice(None))
        else:
            out = x.new_empty(*x.shape[:-1], self.out_features)
            for start in range(0, self.out_features, rows):
                block = slice(start, start + rows)
                out[..., block] = self._block(x, block)
        return out if self.bias is None else out.add_(self.bias)

    def _block(self, x: Tensor, rows: slice) -> Tensor:
        scale = self.scale[rows]
        if x.dtype == torch.float16:  # x times integers up to 127 could overflow, so the scale goes into the weight
            cast = torch.empty_like(self.weight[rows], dtype=x.dtype)
            return F.linear(x, torch.mul(self.weight[rows], scale.unsqueeze(1), out=cast))
        return F.linear(x, self.weight[rows].to(x.dtype)).mul_(scale)  # this cast is exact

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_layers(layers: nn.Module) -> None:
    """Replace, in place, every nn.Linear and every Conv1D (GPT-2's transposed linear) inside `layers` by an Int8Linear.

    Raises ConfigError where bitsandbytes is missing or a weight holds inf or NaN.
    """
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name in names:  # names alone, so that each weight is freed when its layer is replaced
        module: Any = layers.get_submodule(name)
        weight = module.weight.detach()
        parent, _, child = name.rpartition(".")
        bias = None if module.bias is None else module.bias.detach()
        q = Int8Linear(*quantize(weight.t() if isinstance(module, Conv1D) else weight, name), bias)
        setattr(layers.get_submodule(parent), child, q)


def quantize(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """weight [O, I], any float dtype -> (int8 [O, I], fp32 scale [O]) on the CPU; weight is about int8 * scale."""
    bnb = import_bitsandbytes()
    weight = weight.to("cpu", torch.float32).contiguous()
    if not torch.isfinite(weight).all():
        raise ConfigError(f"cannot quantise {name}: it holds inf or NaN; the checkpoint is damaged")
    q, row_max, _ = bnb.functional.int8_vectorwise_quant(weight)
    return q, row_max / 127


def import_bitsandbytes(
    need: str = "8-bit teachers need", instead: str = "the model's precision to bf16, fp16 or fp32"
) -> ModuleType:
    """bitsandbytes, or ConfigError that names it, who needs it and what to set instead."""
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as e:
        raise ConfigError(
            f"{need} bitsandbytes, which cannot be imported ({e}); pip install bitsandbytes, or set {instead}"
        ) from None
    return bitsandbytes
