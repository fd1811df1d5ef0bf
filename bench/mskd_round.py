"""One round as mskd trains it, with the seconds of its parts: the side "mskd" of bench.train_step.

mskd = Mskd(case, phase)
mskd.run()                      # OnPolicy.work and hop.step, as hop.train calls them
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.round_case import Case
from mskd.config import Precision, parse
from mskd.config.phases import MinillmPhase
from mskd.data.instructions import Example, Splits
from mskd.models import Student, Teacher
from mskd.sampling.rollout import Rollout
from mskd.training import hop
from mskd.training.job import Job
from mskd.training.optim import make_optimizer
from mskd.training.work import student_sampler
from mskd.training.work.on_policy import OnPolicy

PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Mskd:
    """The loop over the rounds of a phase, stopped after the first."""

    def __init__(self, case: Case, phase: MinillmPhase) -> None:
        self.case, self.phase = case, phase
        self.job = Job(
            name="bench",
            directory=Path(),  # nothing is stored
            seed=0,
            phases=(phase,),
            student=case.student,
            tokenizer=SimpleNamespace(eos_token_id=case.end, pad_token_id=case.end),
            ends=(case.end,),
            teacher=Teacher(case.teacher, PRECISIONS[case.hardware.teacher_dtype]),
            data=Splits(tuple(Example("", p, (), ()) for p in case.prompts[: phase.rollouts]), (), (), ""),
            text=(),
            config=_config(phase),
            hardware=case.hardware,
            accelerator=case.accelerator,
        )
        self.prepared = case.accelerator.prepare(Student(case.student))

    def run(self) -> None:
        """All steps of one round; leaves the student trained."""
        tracker: Any = SimpleNamespace(log=lambda *arguments, **options: None)
        progress = hop.Progress()
        with self._split() as source:
            optimizer = self.case.accelerator.prepare(make_optimizer(self.prepared, self.phase))
            steps = source.steps_per_round
            for _ in range(steps):
                with self.case.parts("optimizer"):  # what is neither work nor backward: clip, AdamW, the log line
                    hop.step(self.job, self.prepared, optimizer, source, self.phase, progress, steps, tracker)

    def first_loss(self) -> tuple[dict[str, float], Rollout]:
        """Statistics of the first step and the rollout of its round; leaves gradients in the student."""
        with self._split() as source:
            micros = source.work(0)
            self.prepared.train()
            return hop.backward(self.case.accelerator, self.prepared, micros), source.rollout

    @contextmanager
    def _split(self) -> Iterator[OnPolicy]:
        """A source of steps; the functions of training are credited to their parts, answers have their lengths."""
        case, source = self.case, OnPolicy(self.job, self.phase, seed=0)
        with ExitStack() as stack:
            for owner, name, part, call in (
                (student_sampler, "sample", "rollout", case.answers.sample),
                (source, "work", "scoring", source.work),
                (Teacher, "hidden", "teacher", Teacher.hidden),
                (hop, "backward", "loss", hop.backward),
            ):
                stack.enter_context(mock.patch.object(owner, name, case.parts.timed(part, call)))
            yield source


def _config(phase: MinillmPhase) -> Any:
    models = {"teacher": {"source": "random"}, "student": {"source": "random"}}
    return parse({"models": models, "chain": {"paths": [["teacher", "student"]]}, "phases": [phase.model_dump()]})
