"""The optimizer of a phase: parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mskd.models.quantize import import_bitsandbytes

if TYPE_CHECKING:
    from mskd.config.phases import PhaseBase


def make_optimizer(model: torch.nn.Module, phase: PhaseBase) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices only (norms and biases are left alone).

    optimizer = "adamw_8bit": bitsandbytes' AdamW, both moments in 8 bits with a scale every 256 values (in 32 bits for
    tensors under 4096 values): 2 bytes a parameter instead of 8. Runs on GPUs and CPUs. Raises ConfigError.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": phase.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    options: dict[str, Any] = {"lr": phase.lr, "betas": phase.betas, "eps": phase.eps}
    if phase.optimizer == "adamw_8bit":
        return _bitsandbytes().optim.AdamW8bit(groups, **options)
    fused = all(p.device.type == "cpu" for p in params) or None  # one pass over memory; a GPU keeps torch's choice
    return torch.optim.AdamW(groups, fused=fused, **options)


def check_optimizer(phase: PhaseBase) -> None:
    """Raise ConfigError unless a phase's optimizer can be made here."""
    if phase.optimizer == "adamw_8bit":
        _bitsandbytes()


def _bitsandbytes() -> ModuleType:
    return import_bitsandbytes("optimizer = 'adamw_8bit' needs", "optimizer = 'adamw'")


def learning_rate(phase: PhaseBase, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then constant, cosine or linear."""
    if step < phase.warmup_steps:
        return phase.lr * (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, total - phase.warmup_steps)
    if phase.schedule == "cosine":
        return phase.lr * 0.5 * (1 + math.cos(math.pi * done))
    if phase.schedule == "linear":
        return phase.lr * (1 - done)
    return phase.lr
