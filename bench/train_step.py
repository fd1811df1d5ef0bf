"""One round of a hop, part by part: mskd beside the schedule of MiniLLM's scripts, and one step beside TRL's trainer.

    python -m bench.train_step                     # SmolLM2's sizes; rows to bench/results/
    python -m bench.train_step --recipe gpt2 --hop 2 --out /tmp/results
    python -m bench.train_step --smoke             # tiny models, seconds; stores nothing unless --out is given

Models have a recipe's shapes and random weights; prompts have 16 to 128 tokens and answers 16 to 256, uniform, the same
on all sides (lengths.py). All sides take the same models, prompts, lengths, batch and precision. No plain text.

    phase   sample `rollouts` answers from the teacher-student mixture (alpha 0.2), then every epoch over them.
            mskd: OnPolicy.work and hop.step, as training calls them; lmops: the scripts' schedule, see lmops.py
    step    one optimizer step on fresh samples of the student alone, the same number of tokens.
            trl: see trl_step.py. Its loss is the reverse KL; mskd keeps log q_old(y), scores the answers and adds the
            policy gradient besides, so it does a little more

First every side's loss and gradient norm of one rollout are compared with a plain computation (plain_loss.py); one that
is off gets no figure, and the exit code is 1. Last line: one JSON document.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

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
    table,
)
from bench.kl_cases import NAMES
from bench.lmops import Lmops
from bench.mskd_round import Mskd
from bench.parts import held
from bench.plain_loss import plain_loss
from bench.round_case import Case, Size
from bench.shapes import SHAPES
from bench.trl_step import TrlStep
from mskd.config.hardware import detect
from mskd.config.phases import MinillmPhase
from mskd.sampling.rollout import Rollout

CPU = Size(rollouts=8, batch=8, epochs=4, decoded=8, phases=1, steps=3)
GPU = Size(rollouts=256, batch=64, epochs=4, decoded=32, phases=3, steps=10)  # a round of the paper's recipes
SMOKE = Size(rollouts=4, batch=2, epochs=2, decoded=4, prompts=(2, 8), answers=(2, 12), phases=2, steps=2)
CHECKED = 2  # sequences of the rollout on which the sides must agree
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of |KL| and of the gradient's norm
NUMBERS = {
    "rollouts": "sequences of a phase",
    "batch": "sequences of a step",
    "epochs": "over the rollouts",
    "decoded": "sequences that decode together",
    "phases": "timed rounds of phases, each of all sides",
    "steps": "timed rounds of steps",
}
PARTS = ("rollout", "second rollout", "teacher", "scoring", "loss", "optimizer")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    hardware = detect(options.device)
    folder = options.out or (None if options.smoke else RESULTS)
    run = environment(hardware.device)
    try:
        if folder and (path := result_file(folder, run)).exists():
            read_results(path)  # a file that nothing can be merged into is found before the measurement
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    case = Case(options.recipe, options.hop, options.size, hardware)
    with tempfile.TemporaryDirectory() as scratch:
        rows, left_out = measure(case, Path(scratch))
    lengths = f"prompts of {options.size.prompts} tokens, answers of {options.size.answers}, uniform, forced"
    print(f"{case.title}, {lengths}\n\n{table(rows, COLUMNS)}\n")
    return finish("train_step", run, rows, left_out, folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=(__doc__ or "").partition("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--recipe", choices=[name for name in SHAPES if name != "tiny"], help="shapes; default smollm2")
    parser.add_argument("--hop", type=int, help="of the recipe's chain, from 1; default: the last")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    for name, text in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text}; default: this device's own number")
    parser.add_argument("--smoke", action="store_true", help="tiny models and lengths")
    parser.add_argument("--out", type=Path, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no CUDA GPU here; use cpu")
    options.recipe = options.recipe or ("tiny" if options.smoke else "smollm2")
    hops = len(SHAPES[options.recipe][1]) - 1
    options.hop = hops if options.hop is None else options.hop
    if not 1 <= options.hop <= hops:
        parser.error(f"--hop {options.hop}: {options.recipe} has the hops 1 to {hops}")
    size = SMOKE if options.smoke else CPU if options.device == "cpu" else GPU
    given = {n: getattr(options, n) for n in NUMBERS}
    options.size = size = replace(size, **{n: value for n, value in given.items() if value is not None})
    if min(getattr(size, n) for n in NUMBERS) < 1 or size.rollouts % size.batch or size.rollouts < CHECKED:
        parser.error(f"{size}: no number may be below 1, rollouts must be a multiple of batch and at least {CHECKED}")
    return options


# -- the comparison ---------------------------------------------------------------------------------

Sides = dict[str, Call]  # name -> one run, which ends with all its work done


def measure(case: Case, scratch: Path) -> tuple[list[Row], dict[str, str]]:
    """(rows, what was left out and why): the phase, then the step."""
    phase, step = case.phase(), case.phase(mix_alpha=0.0, rollouts=case.size.batch, ppo_epochs=1)
    trl, left_out = _trl_side(case, step, scratch)
    wrong = check(case, trl)
    phases: Sides = {"mskd": lambda: Mskd(case, phase).run(), "lmops": lambda: Lmops(case, phase).run(case.prompts)}
    rows = timed(case, phase, phases, wrong, case.size.phases)
    if trl is not None:
        prompts = case.prompts[: step.rollouts]
        steps: Sides = {"mskd": lambda: Mskd(case, step).run(), "trl": lambda: trl.step(prompts)}
        rows += timed(case, step, steps, wrong, case.size.steps)
    return rows, left_out


def _trl_side(case: Case, step: MinillmPhase, scratch: Path) -> tuple[TrlStep | None, dict[str, str]]:
    try:
        return TrlStep(case, step, scratch), {}
    except ImportError as error:
        return None, {"trl": f"{error}; pip install -e '.[bench]'"}


class Found(NamedTuple):
    """What a side gives for a rollout; the gradient is that of its loss."""

    loss: float
    reverse_kl: float
    gradient_norm: float

    def error(self, true: Found) -> float:
        """The largest relative error; of the loss relative to the reverse KL, as its terms may cancel."""
        scales = true.reverse_kl, true.reverse_kl, true.gradient_norm
        return max(abs(x - y) / scale for x, y, scale in zip(self, true, scales, strict=True))


def check(case: Case, trl: TrlStep | None) -> dict[str, str]:
    """{side: what is wrong} where the loss of one rollout is not that of the plain computation."""
    phase = case.phase(rollouts=CHECKED, batch_size=CHECKED, ppo_epochs=1)
    stats, rollout = Mskd(case, phase).first_loss()
    scaler = case.accelerator.scaler
    norm = case.gradient_norm(scaler.get_scale() if scaler else 1.0)
    whole, single = _plain(case, rollout, phase)
    truth = {"mskd": whole, "lmops": whole, "trl": single}
    calls: Sides = {
        "mskd": lambda: Found(stats["loss"], stats["reverse_kl"], norm),
        "lmops": lambda: _lmops(case, rollout, phase),
    }
    if trl is not None:
        calls["trl"] = lambda: _trl(case, trl, rollout)

    def differs(name: str, found: Found) -> str | None:
        error, limit = found.error(truth[name]), LIMITS[case.hardware.teacher_dtype]
        return None if error <= limit else f"error {error:.1e} > {limit:g}: {found}, not {truth[name]}"

    wrong = gate(calls, differs)
    case.parts.take()
    return wrong


def _plain(case: Case, rollout: Rollout, phase: MinillmPhase) -> tuple[Found, Found]:
    """What is right for the whole objective, and for its single-step part alone."""
    total, single = plain_loss(case.student, case.teacher, rollout, phase)
    total.backward(retain_graph=True)
    norm = case.gradient_norm()
    single.backward()
    return Found(total.item(), single.item(), norm), Found(single.item(), single.item(), case.gradient_norm())


def _lmops(case: Case, rollout: Rollout, phase: MinillmPhase) -> Found:
    side = Lmops(case, phase)
    loss = side.loss(side.store(rollout))
    loss.backward()
    return Found(loss.item(), side.logged["reg_loss"], case.gradient_norm())


def _trl(case: Case, trl: TrlStep, rollout: Rollout) -> Found:
    loss = trl.reverse_kl(rollout)
    loss.backward()
    return Found(loss.item(), loss.item(), case.gradient_norm())


def timed(case: Case, phase: MinillmPhase, sides: Sides, wrong: Mapping[str, str], rounds: int) -> list[Row]:
    """A row for every side; they run in turn, each from the same weights. Those that are wrong get no figure."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    peaks: dict[str, int | None] = {}
    cores: dict[str, float] = {}

    def run(name: str) -> float:
        case.restore()
        with held(case.hardware.device) as memory:
            start, used = time.perf_counter(), time.process_time()
            sides[name]()
            took = time.perf_counter() - start
            cores[name] = (time.process_time() - used) / took
        case.accelerator.free_memory()
        seconds[name].append(case.parts.take())
        peaks[name] = memory.peak
        print(
            f"{_start(case, phase)['shape']}, {name}: {took:.2f} s, {cores[name]:.2f} cores",
            file=sys.stderr,
            flush=True,
        )
        return took

    right = {name: partial(run, name) for name in sides if name not in wrong}
    found = figures(interleave(right, rounds, lambda call: call(), warmup=0), base="mskd")
    start = _start(case, phase)
    rows: list[Row] = []
    for name, figure in found.items():
        parts = {part: median(s.get(part, 0.0) for s in seconds[name]) for part in PARTS}
        speed = {"tokens_per_s": 1e3 * start["answer_tokens"] / figure["ms_p50"], "peak_extra_bytes": peaks[name]}
        speed["cores_used"] = cores[name]  # far below the machine's cores: somebody else was using them
        rows.append(start | {"provider": name} | figure | speed | {"seconds": parts})
    return rows + [start | {"provider": name, "wrong": wrong[name]} for name in sides if name in wrong]


def _start(case: Case, phase: MinillmPhase) -> Row:
    kind = "phase" if phase.mix_alpha else "step"
    work = f"{kind}: {phase.rollouts} rollouts, batch {phase.batch_size}, {phase.ppo_epochs} epochs"
    return {
        "benchmark": "train_step",
        "shape": f"{case.title}, {work}",
        "dtype": NAMES[case.hardware.teacher_dtype],
        "prompt_tokens_from_to": list(case.size.prompts),
        "answer_tokens_from_to": list(case.size.answers),
        "answer_tokens": sum(case.answers.of(case.prompts[: phase.rollouts])),
    }


# -- what is shown ----------------------------------------------------------------------------------


def _form(field: str, form: str, scale: float = 1.0) -> Any:
    return lambda row: form.format(row[field] * scale) if row.get(field) is not None else "-"


def _part(name: str) -> Any:
    return lambda row: f"{row['seconds'][name]:.2f}" if row.get("seconds", {}).get(name) else "-"


COLUMNS = {
    "work": lambda row: row["shape"].rpartition("hop ")[2].partition(", ")[2],
    "provider": lambda row: row["provider"] + (" WRONG" if "wrong" in row else ""),
    "s p20": _form("ms_p20", "{:.2f}", 1e-3),
    "p50": _form("ms_p50", "{:.2f}", 1e-3),
    "p80": _form("ms_p80", "{:.2f}", 1e-3),
    "/ mskd": _form("ratio_p50", "{:.2f}"),
    **{part: _part(part) for part in PARTS},
    "cores": _form("cores_used", "{:.2f}"),
    "tokens/s": _form("tokens_per_s", "{:.1f}"),
    "peak MiB": _form("peak_extra_bytes", "{:.0f}", 2**-20),
}


if __name__ == "__main__":
    sys.exit(main())
