"""One hop: the training loop. A student goes through its phases, step by step, against the frozen model above it.

Read `train` top to bottom: set-up, then a plain loop: save, roll out, score, loss, backward, step, log, validate. What
a step trains on depends on its number, the weights and what the state holds, so that a run that was killed goes on
where its newest state left it, bit for bit.
The same loop prepares models (sft, without a teacher). Under `accelerate launch` every process runs it: sequences of an
optimizer batch are dealt out to the processes, and the step equals that of one process with the same batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from mskd.config import ConfigError
from mskd.config.phases import MinillmPhase, Mixed, Phase, SftPhase, resolve_steps
from mskd.models import Student, save_model
from mskd.sampling.rollout import Interrupted
from mskd.store import checkpoint
from mskd.store.done import digests
from mskd.store.files import new_folder
from mskd.store.hashes import stream_seed, weights_digest
from mskd.training import objective
from mskd.training.job import Job
from mskd.training.optim import learning_rate, make_optimizer
from mskd.training.tracking import Tracker
from mskd.training.work.microbatches import Micro, Supervised, supervised
from mskd.training.work.source import source_of

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient before a run gives up


@dataclass
class Progress:
    """Where a hop stands. Everything that a resumed run must know besides weights, optimizer and rollout."""

    phase: int = 0
    step: int = 0  # optimizer steps done in this phase
    total_step: int = 0  # over all phases: the step of metrics.jsonl
    tokens: int = 0  # trained on, over all phases
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int = 0
    phase_seconds: list[float] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # digests of the phases' models, taken as they were written


# -- one optimizer step ----------------------------------------------------------------------------


def backward(accelerator: Accelerator, student: torch.nn.Module, micros: list[Micro]) -> dict[str, float]:
    """Accumulate the gradient of one optimizer batch; return its statistics, averaged over all processes.

    Every term is divided by its valid tokens in the whole batch over all forwards and processes, then multiplied by the
    number of processes, which undoes the averaging of data parallelism: the gradient is that of one process. Statistics
    come as sums over tokens and leave as means.
    """
    counts: dict[str, float] = {}
    for inputs, loss in micros:
        counts[loss.term] = counts.get(loss.term, 0.0) + inputs.targets.numel()
    names = sorted(counts)
    reduced = accelerator.reduce(torch.tensor([counts[n] for n in names], device=accelerator.device), "sum").tolist()
    denominators = dict(zip(names, reduced, strict=True))
    totals: dict[str, torch.Tensor] = {}
    for i, (inputs, loss) in enumerate(micros):
        last = i == len(micros) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(student):
            value, stats = student(inputs.to(accelerator.device), loss.over(denominators[loss.term]))
            accelerator.backward(value * accelerator.num_processes)
        for name, total in {"loss": value.detach(), **stats}.items():
            totals[name] = totals.get(name, 0.0) + total.detach().float()
    keys = sorted(totals)
    summed = accelerator.reduce(torch.stack([totals[k] for k in keys]), "sum").tolist()
    return objective.means(dict(zip(keys, summed, strict=True)), denominators)


def real_tokens(accelerator: Accelerator, micros: list[Micro]) -> float:
    """Share of the tokens in a step's forwards, over all processes, that are no padding."""
    masks = [inputs.attention_mask for inputs, _ in micros]
    counts = torch.tensor([sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)], device=accelerator.device)
    real, places = accelerator.reduce(counts, "sum").tolist()
    return real / places


def train(job: Job) -> dict[str, Any]:
    """Run a hop (or a preparation) to its end, from its newest state if there is one. Returns what done.json holds.

    Raises Interrupted after a stop was asked for and the state saved, FloatingPointError after MAX_SKIPPED steps in a
    row without a finite loss and gradient, ConfigError where the phases cannot run on this data.
    """
    acc, cfg = job.accelerator, job.config
    student = Student(job.student, gradient_checkpointing=cfg.train.gradient_checkpointing)
    progress, saved = resume(job)
    prepared = acc.prepare(student)
    with Tracker(job.directory, job.name, accelerator=acc, trackers=cfg.run.trackers) as tracker:
        tracker.truncate_after(progress.total_step)
        while progress.phase < len(job.phases):
            run_phase(job, prepared, progress, saved, tracker)
            saved = None
    if acc.is_main_process:
        with new_folder(job.directory / "model") as folder:
            save_model(job.student, job.tokenizer, folder, ends=job.ends, dtype=job.save_dtype)
        done = {
            "weights": weights_digest(job.directory / "model"),
            "parameters": sum(p.numel() for p in job.student.parameters()),
            "steps": progress.total_step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "phase_seconds": progress.phase_seconds,
            "skipped_steps": progress.skipped,
            "files": progress.files,
        }
        return done
    return {}


def run_phase(job: Job, prepared: Any, progress: Progress, saved: checkpoint.State | None, tracker: Tracker) -> None:
    """All steps of one phase, then its end: the best weights where they are kept, the snapshot, the state."""
    acc, phase = job.accelerator, job.phases[progress.phase]
    seed = stream_seed(job.seed, "phase", progress.phase)
    steps = resolve_steps(phase, len(job.data.train))
    optimizer = acc.prepare(make_optimizer(prepared, phase))
    source = source_of(job, progress.phase, seed, lambda done, all_: tracker.note("the teacher answers", done, all_))
    best: dict[str, torch.Tensor] = {}
    if saved is not None:
        restore_phase(job, optimizer, source, progress, saved, best)
    saver = Saver(job, progress, optimizer, source, best)
    tracker.start_phase(phase.objective, progress.step, steps)
    try:
        while progress.step < steps:
            if agreed(acc, job.stop()):
                raise Interrupted
            if agreed(acc, saver.due()):
                saver.save()
            started = time.monotonic()
            if source.share is not None and source.share.reference is None:
                source.share.observe(validation_nll(job, prepared, phase))
            step(job, prepared, optimizer, source, phase, progress, steps, tracker)
            if phase.eval_every and (progress.step % phase.eval_every == 0 or progress.step == steps):
                remember_best(job, prepared, phase, progress, best, tracker)
                if source.share is not None:
                    nll = validation_nll(job, prepared, phase)
                    source.share.observe(nll)
                    tracker.log({"eval/nll": nll}, step=progress.total_step, phase_step=progress.step, shown="nll")
            progress.seconds += time.monotonic() - started
    except Interrupted:
        saver.save()
        raise
    if best:
        load_weights(job.student, best)
    acc.free_memory()  # forgets the phase's optimizer, whose gradients would be unscaled again with the next one's
    finish_phase(job, phase, progress, saver)


def step(
    job: Job, prepared: Any, optimizer: Any, source: Any, phase: Phase, progress: Progress, steps: int, tracker: Tracker
) -> None:
    """One optimizer step: roll out where a round begins, score, loss, backward, clip, step, log."""
    acc, started = job.accelerator, time.monotonic()
    micros = source.work(progress.step)
    sampled = time.monotonic()
    prepared.train()
    lr = learning_rate(phase, progress.step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    stats = backward(acc, prepared, micros)
    norm = float(acc.clip_grad_norm_(prepared.parameters(), phase.grad_clip))
    finite = math.isfinite(norm) and math.isfinite(stats["loss"])
    if finite or acc.scaler is not None:
        optimizer.step()  # a loss scaler must see the step to lower its scale; it leaves the weights alone
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.total_step += 1
    progress.tokens += int(stats["tokens"])
    progress.skipped += not finite
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    now = time.monotonic()
    line = {f"train/{k}": v for k, v in stats.items() if k != "tokens"}
    line |= {"train/lr": lr, "train/grad_norm": norm, "train/skipped": progress.skipped}
    line |= {"perf/tokens_per_s": stats["tokens"] / (now - started), "perf/rollout_s": sampled - started}
    line |= {"perf/real_tokens": real_tokens(acc, micros)}
    if source.share is not None:
        line |= {"train/student_share": source.share.value, "train/share_reference": source.share.reference}
    if progress.total_step % job.config.run.log_every == 0 or progress.step == steps:
        tracker.log(line, step=progress.total_step, phase_step=progress.step, shown=source.shown)
    if progress.skipped_in_a_row >= MAX_SKIPPED:
        raise FloatingPointError(
            f"{job.name}: {MAX_SKIPPED} steps in a row had no finite loss and gradient (phase {phase.objective}, step "
            f"{progress.step}); the state before them is kept; try a lower lr, now {lr:g}, or train.precision = 'fp32'"
        )


# -- best weights, phases' ends --------------------------------------------------------------------


def remember_best(
    job: Job, prepared: Any, phase: Phase, progress: Progress, best: dict[str, torch.Tensor], tracker: Tracker
) -> None:
    """Validate; with keep = "best", copy the weights where they are the best of the phase so far."""
    job.student.eval()
    if isinstance(phase, MinillmPhase):
        assert job.validate_rollouts is not None
        name, value = f"eval/{phase.keep_by}", job.validate_rollouts(job.student, phase.keep_by)
        score = -value if phase.keep_by == "rouge_l" else value
    else:
        name, value = "eval/loss", validation_loss(job, prepared, phase)
        score = value
    tracker.log({name: value}, step=progress.total_step, phase_step=progress.step, shown=name.split("/")[1])
    if phase.keep == "best" and math.isfinite(score) and (progress.best is None or score < progress.best):
        progress.best, progress.best_step = score, progress.step
        best.update({n: p.detach().cpu().clone() for n, p in job.student.named_parameters()})


@torch.no_grad()
def validation_loss(job: Job, prepared: Any, phase: Supervised | Mixed) -> float:
    """The phase's loss per response token of the validation split; every process computes all of it."""
    total, tokens = 0.0, 0
    student = job.accelerator.unwrap_model(prepared)
    for inputs, loss in supervised(job, phase, job.data.validation):
        value, _ = student(inputs.to(job.accelerator.device), loss.over(1.0))
        total, tokens = total + float(value), tokens + inputs.targets.numel()
    return total / tokens


def validation_nll(job: Job, prepared: Any, phase: Phase) -> float:
    """Cross-entropy per response token of the validation split, the same for every process."""
    acc = job.accelerator
    job.student.eval()
    loss = validation_loss(job, prepared, SftPhase(steps=1, micro_batch_size=phase.micro_batch_size))
    return float(acc.reduce(torch.tensor(loss, dtype=torch.float64, device=acc.device), "mean"))


def finish_phase(job: Job, phase: Phase, progress: Progress, saver: Saver) -> None:
    """Leave the phase's weights as a model of their own, unless they are the hop's result, and go on to the next."""
    if progress.phase < len(job.phases) - 1 and job.accelerator.is_main_process:
        name = f"phases/{progress.phase}-{phase.objective}"
        with new_folder(job.directory / name) as folder:
            save_model(job.student, job.tokenizer, folder, ends=job.ends, dtype=job.save_dtype)
        progress.files |= digests(job.directory, name)
    progress.phase_seconds.append(round(progress.seconds - sum(progress.phase_seconds), 1))
    progress.phase, progress.step, progress.best, progress.best_step = progress.phase + 1, 0, None, 0
    progress.skipped_in_a_row = 0
    saver.best, saver.optimizer, saver.source = {}, None, None
    saver.save()


# -- states ----------------------------------------------------------------------------------------


class Saver:
    """Writes the resumable state: weights, optimizer, the round's rollout, the best weights, the progress."""

    def __init__(
        self, job: Job, progress: Progress, optimizer: Any, source: Any, best: dict[str, torch.Tensor]
    ) -> None:
        self.job, self.progress, self.optimizer, self.source, self.best = job, progress, optimizer, source, best
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time, and there is something new to save."""
        return self.progress.step > 0 and time.monotonic() - self.last >= self.job.config.run.save_every_s

    def save(self) -> None:
        # After steps that were all skipped the last good state stays the newest.
        if self.progress.skipped_in_a_row:
            return
        tensors = {f"weights.{n}": p.detach().cpu() for n, p in self.job.student.named_parameters()}
        plain: dict[str, Any] = {}
        if self.optimizer is not None:
            packed, plain = checkpoint.pack_optimizer(self.optimizer)
            tensors |= {f"optimizer.{k}": v.cpu() for k, v in packed.items()}
            tensors |= {f"rollout.{k}": v for k, v in self.source.state(self.progress.step).items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        scaler = self.job.accelerator.scaler
        meta = {
            "processes": self.job.accelerator.num_processes,
            "progress": {f.name: getattr(self.progress, f.name) for f in fields(self.progress)},
            "optimizer": plain,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if self.job.accelerator.is_main_process:
            checkpoint.save_state(self.job.directory / "state", meta, tensors)
        self.job.accelerator.wait_for_everyone()
        self.last = time.monotonic()


def resume(job: Job) -> tuple[Progress, checkpoint.State | None]:
    """The newest state's progress with its weights put into the student; a fresh start where there is none."""
    saved = checkpoint.load_state(job.directory / "state")
    if saved is None:
        return Progress(), None
    if saved.meta["processes"] != job.accelerator.num_processes:
        raise ConfigError(
            f"{job.directory} was begun by {saved.meta['processes']} processes, these are "
            f"{job.accelerator.num_processes}; go on with as many, or remove that folder"
        )
    load_weights(job.student, part(saved, "weights."))
    return Progress(**saved.meta["progress"]), saved


def restore_phase(
    job: Job, optimizer: Any, source: Any, progress: Progress, saved: checkpoint.State, best: dict[str, torch.Tensor]
) -> None:
    tensors = part(saved, "optimizer.")
    if tensors:
        checkpoint.unpack_optimizer(optimizer, tensors, saved.meta["optimizer"])
        source.restore(progress.step, part(saved, "rollout."))
    best.update(part(saved, "best."))
    if job.accelerator.scaler is not None and saved.meta["scaler"]:
        job.accelerator.scaler.load_state_dict(saved.meta["scaler"])


def agreed(accelerator: Accelerator, vote: bool) -> bool:
    """Whether any process votes yes: all of them then do the same."""
    if accelerator.num_processes == 1:
        return vote
    return bool(accelerator.reduce(torch.tensor([float(vote)], device=accelerator.device), "sum").item())


def part(saved: checkpoint.State, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in saved.tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(weights[name])
