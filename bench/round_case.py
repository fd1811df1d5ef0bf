"""What every side of bench.train_step works on: a student, its teacher, the prompts of one round and the objective.

case = Case("smollm2", place=2, size=CPU, hardware=detect())
phase = case.phase(mix_alpha=0.0)
with case.parts("loss"): ...            # seconds by part, of whoever runs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from bench.lengths import Answers, random_prompts, uniform
from bench.parts import Parts
from bench.shapes import SHAPES, random_model
from mskd.config.hardware import Hardware
from mskd.config.phases import MinillmPhase


@dataclass(frozen=True)
class Size:
    """How much work: sequences of a round, of a step, epochs over them; bounds of lengths; how often each is timed."""

    rollouts: int
    batch: int
    epochs: int
    decoded: int  # sequences that decode together
    prompts: tuple[int, int] = (16, 128)
    answers: tuple[int, int] = (16, 256)
    phases: int = 1
    steps: int = 3


class Case:
    """Models of a recipe's shapes with random weights; `place`: which hop of the recipe's chain, from 1.

    The teacher is in the dtype of frozen models on this hardware, not quantised: all sides take the same.
    """

    def __init__(self, recipe: str, place: int, size: Size, hardware: Hardware) -> None:
        title, configs = SHAPES[recipe]
        upper, lower = configs[place - 1 : place + 1]
        options: dict[str, Any] = {"device": hardware.device, "attention": hardware.attention}
        self.title = f"{title}, hop {place}"
        self.size, self.hardware, self.end = size, hardware, lower.vocab_size - 1
        self.student = random_model(lower, seed=0, **options)
        self.teacher = random_model(upper, seed=1, dtype=hardware.teacher_dtype, **options).requires_grad_(False)
        self.start = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self.prompts = random_prompts(uniform(size.rollouts, size.prompts, 2), lower.vocab_size, 3)
        self.answers = Answers(self.prompts, uniform(size.rollouts, size.answers, 4), self.end)
        self.accelerator = Accelerator(cpu=hardware.device.type == "cpu", mixed_precision=hardware.mixed_precision)
        self.parts = Parts(hardware.device)

    def phase(self, **changes: Any) -> MinillmPhase:
        """The objective of the released scripts; no whitening and a clipped weighted ratio, see lmops.py."""
        size = self.size
        given: dict[str, Any] = {
            "objective": "lmops",
            "steps": 10**6,
            "warmup_steps": 0,
            "rollouts": size.rollouts,
            "rollout_batch_size": size.decoded,
            "batch_size": size.batch,
            "micro_batch_size": size.batch,
            "ppo_epochs": size.epochs,
            "max_new_tokens": size.answers[1],
            "whiten": False,
            "clip_weighted_ratio": True,
        }
        return MinillmPhase.model_validate(given | changes)

    @torch.no_grad()
    def restore(self) -> None:
        """The student's first weights, in place."""
        for name, parameter in self.student.named_parameters():
            parameter.copy_(self.start[name])

    def gradient_norm(self, scale: float = 1.0) -> float:
        """Of the student's gradients over `scale`, which are then forgotten."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = float(torch.stack([g.double().norm() for g in gradients]).norm()) / scale
        self.student.zero_grad(set_to_none=True)
        return norm
