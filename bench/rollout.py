"""Tokens per second of sampling: mskd's engine beside transformers' `generate`, alone and from the mixture.

    python -m bench.rollout                        # this machine's default cells, rows to bench/results/
    python -m bench.rollout --shape gpt2 --batch 32 128 --out /tmp/results
    python -m bench.rollout --smoke                # a tiny model, seconds; stores nothing unless --out is given

Models have a recipe's shapes and random weights (shapes.py); the student is the recipe's smallest, the teacher its
second smallest. "unequal": prompts have 16 to 128 tokens and answers 16 to 256, uniform; "equal": all have the middle
of both. Every provider is given the same prompts and obeys the same lengths, which none knows beforehand (lengths.py).

    mskd                mskd.sampling.rollout.sample; it records log-probabilities besides
    mskd, not lazy      (mixture) the same, with the teacher decoding every token
    generate            transformers: prompts sorted by length, cut into batches and left-padded; for the mixture the
                        teacher decodes beside it in a logits processor, with its own cache (lmops.py)

First: mskd's and generate's greedy tokens must be the same, and mskd's log-probabilities those of a plain forward. One
that is off gets no figure, and the exit code is 1. The first run of each cell is not timed. Last line: one JSON
document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from bench.harness import (
    RESULTS,
    Call,
    Row,
    environment,
    figures,
    finish,
    gate,
    interleave,
    read_results,
    result_file,
    stopwatch,
    table,
)
from bench.lengths import Answers, random_prompts, uniform
from bench.lmops import Mixed
from bench.shapes import SHAPES, random_model
from mskd.config.phases import MinillmPhase
from mskd.models import Teacher
from mskd.sampling.rollout import sample
from mskd.training.objective import score

PROMPTS, ANSWERS = (16, 128), (16, 256)
ALPHA = 0.2
GREEDY = 4, 12  # prompts, tokens of the greedy comparison
TOLERANCE = 1e-3  # of log-probabilities in fp32


@dataclass(frozen=True)
class Cell:
    """One comparison: so many sequences, `batch` of them decoding together."""

    batch: int
    count: int
    equal: bool
    mixed: bool
    rounds: int = 1
    shortened: int = 1  # by what prompts and answers are divided

    def __str__(self) -> str:
        bounds = [f"{low // self.shortened}..{high // self.shortened}" for low, high in (PROMPTS, ANSWERS)]
        lengths = "equal" if self.equal else f"prompts {bounds[0]}, answers {bounds[1]}"
        return f"{'mixture' if self.mixed else 'student'}, batch {self.batch}, {self.count} sequences, {lengths}"

    def lengths(self, bounds: tuple[int, int], seed: int) -> list[int]:
        low, high = (b // self.shortened for b in bounds)
        return [(low + high) // 2] * self.count if self.equal else uniform(self.count, (low, high), seed)


CPU = (  # about five minutes on two idle cores
    Cell(16, 32, equal=False, mixed=False, rounds=2),
    Cell(16, 32, equal=False, mixed=True, shortened=4, rounds=2),
    Cell(16, 16, equal=True, mixed=False, shortened=4, rounds=2),
    Cell(8, 16, equal=False, mixed=False, shortened=4, rounds=2),
    Cell(8, 16, equal=False, mixed=True, shortened=4),
    Cell(1, 2, equal=False, mixed=False, shortened=4, rounds=2),
    Cell(1, 2, equal=False, mixed=True, shortened=4),
)
GPU_BATCHES = (1, 8, 32, 128)
SMOKE = Cell(3, 6, equal=False, mixed=True, shortened=8), Cell(3, 3, equal=True, mixed=False, shortened=8)


class Models:
    """Student and teacher of a recipe, and what the providers do with them."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        name, configs = SHAPES[shape]
        teacher, student = configs[-2:]
        self.name = f"{name.split()[0]} {student.num_hidden_layers} layers, teacher {teacher.num_hidden_layers}"
        self.student = random_model(student, seed=1, device=device, dtype=dtype)
        self.teacher = random_model(teacher, seed=2, device=device, dtype=dtype)
        self.vocabulary = student.vocab_size
        self.end = self.vocabulary - 1

    def mskd(self, cell: Cell, work: Work, **options: Any) -> Any:
        return work.answers.sample(
            self.student, self.teacher if cell.mixed else None, work.prompts, **self._settings(cell, work), **options
        )

    def _settings(self, cell: Cell, work: Work) -> dict[str, Any]:
        return {
            "eos_id": self.end, "pad_id": self.end, "max_new_tokens": max(work.answers.lengths.values()),
            "mix_alpha": ALPHA if cell.mixed else 0.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "batch_size": cell.batch, "seed": 0, "sequence_ids": range(cell.count),
        }  # fmt: skip

    @torch.no_grad()
    def generate(self, cell: Cell, work: Work) -> list[list[int]]:
        """Responses in the order of the prompts."""
        order = sorted(range(cell.count), key=lambda i: -len(work.prompts[i]))
        found: dict[int, list[int]] = {}
        for first in range(0, cell.count, cell.batch):
            part = order[first : first + cell.batch]
            prompts = [work.prompts[i] for i in part]
            ids, mask = self._left_pad(prompts)
            mixing = [Mixed(self.teacher, mask, ALPHA)] if cell.mixed else []
            processors = LogitsProcessorList([*mixing, *work.answers.processors(prompts)])
            longest = max(work.answers.of(prompts))
            for i, response in zip(part, self._generate(ids, mask, longest, processors), strict=True):
                found[i] = response[: response.index(self.end) + 1]
        return [found[i] for i in range(cell.count)]

    def _left_pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width, device = max(map(len, prompts)), self.student.device
        ids = torch.tensor([[self.end] * (width - len(p)) + list(p) for p in prompts], device=device)
        empty = torch.tensor([width - len(p) for p in prompts], device=device)
        return ids, (torch.arange(width, device=device) >= empty[:, None]).long()

    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, tokens: int, processors: LogitsProcessorList, greedy: bool = False
    ) -> list[list[int]]:
        how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=tokens, eos_token_id=None if greedy else self.end, pad_token_id=self.end, **how
        )
        out = self.student.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
        return out[:, ids.shape[1] :].tolist()

    # -- the gate

    def differs(self) -> str | None:
        """What is wrong with mskd's sampling, if anything: greedy tokens against generate's."""
        count, tokens = GREEDY
        prompts = random_prompts(uniform(count, (3, 20), seed=5), self.vocabulary, seed=6)
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "batch_size": 2, "seed": 0, "mix_alpha": 0.0}
        mine = sample(
            self.student, None, prompts, eos_id=-1, pad_id=self.end, max_new_tokens=tokens,
            sequence_ids=range(count), **settings,
        ).responses()  # fmt: skip
        theirs = self._generate(*self._left_pad(prompts), tokens, LogitsProcessorList(), greedy=True)
        return None if mine == theirs else f"greedy tokens {mine}, generate's {theirs}"

    @torch.no_grad()
    def misscored(self, cell: Cell, rollout: Any) -> str | None:
        """What is wrong with mskd's log-probabilities, if anything: against plain forwards of a few sequences."""
        if cell.mixed:
            frozen = Teacher(self.teacher.requires_grad_(False), "fp32")
            rollout = rollout.select(range(min(4, cell.count)))
            hidden = frozen.hidden(rollout.to_batch(self.end).to(self.student.device))
            rollout = score(rollout, hidden, frozen.head, MinillmPhase(mix_alpha=ALPHA))
        rollout = rollout.select(range(min(4, cell.count)))
        q, p = (self._plain(model, rollout) for model in (self.student, self.teacher))
        mixture = (ALPHA * p.exp() + (1 - ALPHA) * q.exp()).log() if cell.mixed else q
        off = max((rollout.old_logprobs - q).abs().max(), (rollout.mixture_logprobs - mixture).abs().max())
        limit = TOLERANCE if self.student.dtype == torch.float32 else 0.1
        return None if off < limit else f"log-probabilities are {off:.1g} off those of a plain forward"

    def _plain(self, model: PreTrainedModel, rollout: Any) -> torch.Tensor:
        found = []
        for prompt, response in zip(rollout.prompts(), rollout.responses(), strict=True):
            ids = torch.tensor([prompt + response], device=model.device)
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
            found.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
        return torch.cat(found)


class Work:
    """The prompts of a cell and the lengths of their answers."""

    def __init__(self, cell: Cell, vocabulary: int) -> None:
        self.prompts = random_prompts(cell.lengths(PROMPTS, seed=1), vocabulary, seed=2)
        self.answers = Answers(self.prompts, cell.lengths(ANSWERS, seed=3), end=vocabulary - 1)

    @cached_property
    def tokens(self) -> int:
        return sum(self.answers.lengths.values())


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    folder = options.out or (None if options.smoke else RESULTS)
    run = environment(device)
    try:
        if folder and (path := result_file(folder, run)).exists():
            read_results(path)  # a file that nothing can be merged into is found before the measurement
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    dtype, name = (torch.float32, "fp32") if device.type == "cpu" else (torch.bfloat16, "bf16")
    models = Models("tiny" if options.smoke else options.shape, device, dtype)
    wrong = models.differs() if dtype == torch.float32 else None  # 16 bits: ties are too near
    print(f"{models.name}, {name}; {'greedy tokens are those of generate' if wrong is None else wrong}", flush=True)
    rows = [row for cell in _cells(options, device) for row in measure(cell, models, device, name, wrong)]
    return finish("rollout", run, rows, left_out={}, folder=folder)


def measure(cell: Cell, models: Models, device: torch.device, dtype: str, wrong: str | None) -> list[Row]:
    """Gate and time one cell; prints its table."""
    work = Work(cell, models.vocabulary)
    calls: dict[str, Call] = {"mskd": partial(models.mskd, cell, work)}
    if cell.mixed:
        calls["mskd, not lazy"] = partial(models.mskd, cell, work, lazy=False)
    calls["generate"] = partial(models.generate, cell, work)

    def check(provider: str, result: Any) -> str | None:
        if provider == "generate":
            return work.answers.check(work.prompts, result)  # raises where a length is not obeyed
        return wrong or models.misscored(cell, result)

    red = gate(calls, check)
    right = {name: call for name, call in calls.items() if name not in red}
    found = figures(interleave(right, cell.rounds, stopwatch(device), warmup=0), base="generate")
    key = {"benchmark": "rollout", "shape": f"{models.name}; {cell}", "dtype": dtype}
    rows: list[Row] = [
        {**key, "provider": name, **f, "tokens": work.tokens, "tokens_per_s": 1e3 * work.tokens / f["ms_p50"]}
        for name, f in found.items()
    ]
    print(f"\n{cell}: {work.tokens} tokens")
    print(table(rows, COLUMNS), flush=True)
    return rows + [{**key, "provider": name, "wrong": reason} for name, reason in red.items()]


COLUMNS = {
    "": lambda row: row["provider"],
    "s": lambda row: f"{row['ms_p50'] / 1e3:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
    "x generate": lambda row: f"{1 / row['ratio_p50']:.2f}" if "ratio_p50" in row else "",
}


def _cells(options: argparse.Namespace, device: torch.device) -> Sequence[Cell]:
    if options.smoke:
        return SMOKE
    if options.batch is None and device.type == "cpu":
        return CPU
    kinds = [(equal, mixed) for equal in (True, False) for mixed in (False, True)]
    return [Cell(b, 4 * b, equal, mixed, rounds=3) for b in options.batch or GPU_BATCHES for equal, mixed in kinds]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; default: this machine's")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the result files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
