"""What each lever on memory saves and costs: peak memory and time of optimizer steps, a configuration field at a time.

    python -m bench.memory                     # SmolLM2's width, 16 layers; rows to bench/results/
    python -m bench.memory --smoke             # a tiny model, seconds; stores nothing unless --out is given

The loop's own step (hop.step) of a kd phase on random tokens: prompts of 16 to 128, answers of 16 to 256; a student of
a recipe's shape with random weights, and two layers of it as a teacher, which is not what is measured. Memory is all
that training holds besides the teacher: weights, gradients, optimizer and the most that a step needs at once; two
steps, so that all of it is there. Time is that of the second step. A lever that changes the loss gets no figure. Last
line: one JSON document.

`run.teacher_offload` and `run.teacher_cache_mb` act on a GPU alone and are not measured here.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.harness import RESULTS, Call, Row, environment, figures, finish, gate, interleave, peak_extra_bytes, table
from bench.lengths import random_prompts, uniform
from bench.shapes import SHAPES, random_model
from mskd.config import parse
from mskd.config.hardware import detect, keep_freed_memory
from mskd.config.phases import KdPhase
from mskd.data.instructions import Example, Splits
from mskd.models import Student, Teacher, copy_as
from mskd.run.chain import make_accelerator
from mskd.training import hop
from mskd.training.job import Job
from mskd.training.optim import make_optimizer
from mskd.training.work.on_data import OnData

CHECKPOINT, CHUNK, PACK = {"gradient_checkpointing": True}, {"loss_chunk_mb": 32}, {"batching": "pack"}
SMALL, EIGHT_BIT = {"micro_batch_size": 2}, {"optimizer": "adamw_8bit"}
LEVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> (fields of [train], fields of the phase)
    "default": ({}, {}),
    "train.gradient_checkpointing = true": (CHECKPOINT, {}),
    "optimizer = adamw_8bit": ({}, EIGHT_BIT),
    "train.loss_chunk_mb = 32": (CHUNK, {}),
    "micro_batch_size = 2": ({}, SMALL),
    "all four": (CHECKPOINT | CHUNK, EIGHT_BIT | SMALL),
    "train.batching = pack": (PACK, {}),
    "train.precision = bf16": ({"precision": "bf16"}, {}),
}
GIVEN_BACK = "default, freed memory given back"  # without mskd.config.hardware.keep_freed_memory
LIMITS = {"fp32": 1e-4, "bf16": 2e-2}  # of the relative difference of the second step's loss


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = detect(options.device).device
    case = Case("tiny" if options.smoke else "smollm2", batch=4, device=device)
    rows = measure(case, rounds=1 if options.smoke else options.rounds)
    print(f"{case.title}\n\n{table(rows, COLUMNS)}\n")
    folder = options.out or (None if options.smoke else RESULTS)
    return finish("memory", environment(device), rows, {}, folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").partition("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no CUDA GPU here; use cpu")
    return options


class Case:
    """A student, a small teacher and sequences for two steps."""

    def __init__(self, recipe: str, batch: int, device: torch.device) -> None:
        name, (*_, config) = SHAPES[recipe]
        self.title = f"{name.split()[0]}'s width, {config.num_hidden_layers} layers, batch {batch}"
        self.batch, self.device = batch, device
        self.student, self.end = random_model(config, seed=0), config.vocab_size - 1
        teacher_config = copy.deepcopy(config)
        teacher_config.num_hidden_layers = 2
        teacher = random_model(teacher_config, seed=1, device=device).requires_grad_(False)
        self.teachers = {dtype: copy_as(teacher, dtype) for dtype in (torch.float32, torch.bfloat16)}
        prompts, answers = uniform(2 * batch, (16, 128), 2), uniform(2 * batch, (16, 256), 3)
        ids = random_prompts([p + a for p, a in zip(prompts, answers, strict=True)], self.end + 1, 4)
        self.examples = tuple(Example("", x[:p], x[p:], ()) for x, p in zip(ids, prompts, strict=True))

    def job(self, train: Mapping[str, Any], phase: KdPhase) -> Job:
        """What hop.train would be given, with a fresh student."""
        models = {"teacher": {"source": "random"}, "student": {"source": "random"}}
        tree = {"models": models, "chain": {"paths": [["teacher", "student"]]}, "phases": [phase.model_dump()]}
        hardware = detect(self.device.type, train.get("precision", "fp32"))
        return Job(
            name="bench",
            directory=Path(),  # nothing is stored
            seed=0,
            phases=(phase,),
            student=copy.deepcopy(self.student).to(hardware.device),
            tokenizer=SimpleNamespace(eos_token_id=self.end, pad_token_id=self.end),
            ends=(self.end,),
            teacher=Teacher(self.teachers[hardware.teacher_dtype], "fp32"),
            data=Splits(self.examples, (), (), ""),
            text=(),
            config=parse(tree | {"train": dict(train)}),
            hardware=hardware,
            accelerator=make_accelerator(hardware),
        )


def two_steps(case: Case, train: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[float, float]:
    """(loss, seconds) of the second of two optimizer steps from the start."""
    phase = KdPhase.model_validate({"steps": 2, "batch_size": case.batch, "lr": 1e-5, **own})
    job = case.job(train, phase)
    student = Student(job.student, gradient_checkpointing=job.config.train.gradient_checkpointing)
    prepared = job.accelerator.prepare(student)
    optimizer = job.accelerator.prepare(make_optimizer(prepared, phase))
    source, progress = OnData(job, phase, seed=0), hop.Progress()
    losses: list[float] = []
    tracker: Any = SimpleNamespace(log=lambda line, **options: losses.append(line["train/loss"]))
    for _ in range(2):
        started = time.perf_counter()
        hop.step(job, prepared, optimizer, source, phase, progress, 2, tracker)  # ends with the loss on the host
        seconds = time.perf_counter() - started
    job.accelerator.free_memory()
    return losses[-1], seconds


def measure(case: Case, rounds: int) -> list[Row]:
    """A row for each lever; one whose loss is off says so and has no figure."""
    calls = {name: partial(two_steps, case, *fields) for name, fields in LEVERS.items()}
    dtypes = {name: train.get("precision", "fp32") for name, (train, _) in LEVERS.items()} | {GIVEN_BACK: "fp32"}
    before = [calls["default"]() for _ in range(rounds + 1)][1:]
    if case.device.type == "cpu":
        keep_freed_memory()  # as training does, for good: so the figure without it comes first, not in turn
    held: dict[str, int] = {}

    def check(name: str, result: tuple[float, int]) -> str | None:
        loss, held[name] = result
        off = abs(loss / before[0][0] - 1)
        return f"loss {loss:.6f}, not {before[0][0]:.6f}" if off > LIMITS[dtypes[name]] else None

    wrong = gate({name: partial(loss_and_bytes, call, case.device) for name, call in calls.items()}, check)
    right = {name: call for name, call in calls.items() if name not in wrong}
    seconds = interleave(right, rounds, clock=lambda call: call()[1], warmup=0)
    if case.device.type == "cpu":
        seconds[GIVEN_BACK], held[GIVEN_BACK] = [own for _, own in before], held["default"]
    shape = {"benchmark": "memory", "shape": case.title}
    rows: list[Row] = [
        {**shape, "dtype": dtypes[name], "provider": name, **found, "bytes": held[name]}
        for name, found in figures(seconds, base="default").items()
    ]
    return rows + [{**shape, "dtype": dtypes[name], "provider": name, "wrong": why} for name, why in wrong.items()]


def loss_and_bytes(call: Call, device: torch.device) -> tuple[float, int]:
    """What two steps end with, and the most memory that they hold."""
    found: list[float] = []
    peak = peak_extra_bytes(lambda: found.append(call()[0]), device)
    return found[0], peak


COLUMNS = {
    "": lambda row: row["provider"],
    "MiB": lambda row: f"{row['bytes'] / 2**20:.0f}" if "bytes" in row else "wrong",
    "s a step": lambda row: f"{row['ms_p50'] / 1e3:.2f}" if "ms_p50" in row else "",
    "time / default": lambda row: f"{row['ratio_p50']:.2f}" if "ratio_p50" in row else "",
}

if __name__ == "__main__":
    sys.exit(main())
