"""The optimizer of a phase: parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mskd.config import PhaseBase


def make_optimizer(model: torch.nn.Module, phase: PhaseBase) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only (norms and biases are left alone)."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": phase.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=phase.lr, betas=phase.betas, eps=phase.eps)


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
