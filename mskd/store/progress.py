"""How far work has come, on the terminal: a bar of rich, or now and then a plain line on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

PLAIN_EVERY_S = 10.0  # at least, between lines where the output is no terminal


Tick = Callable[[int, int], None]  # is told how much of how much is done


class ProgressLine:
    """A bar with rich on a terminal (stderr), else now and then a plain line."""

    def __init__(self, title: str) -> None:
        self.title, self.objective = title, ""
        self.done = self.total = 0
        self._started = self._printed = 0.0
        self._bar: Any = None

    def start_phase(self, objective: str, done: int, total: int) -> None:
        self.stop()
        self.objective, self.done, self.total = objective, done, total
        self._started, self._printed = time.monotonic(), -math.inf
        console = _terminal()
        if console is not None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(BarColumn(20), TextColumn("{task.fields[line]}", markup=False), console=console)
            self._bar.add_task("", total=total, completed=done, line=f"{self.title}  {objective}")
            self._bar.start()

    def show(self, step: int, metrics: Mapping[str, Any], shown: str | None) -> None:
        now = time.monotonic()
        line = self._line(step, metrics, shown, now)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, line=line)
        elif step >= self.total or now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            print(line, file=sys.stderr, flush=True)

    def note(self, what: str, done: int, total: int) -> None:
        self.start_phase(what, done, total)
        line = f"{self.title}  {what}  {done}/{total}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], line=line)
        else:
            print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, step: int, metrics: Mapping[str, Any], shown: str | None, now: float) -> str:
        parts = [f"{self.title}  {self.objective}  step {step}/{self.total}"]
        parts += [_shown(metrics, key, "{} {:.4g}") for key in ("loss", shown) if key]
        parts.append(_shown(metrics, "perf/tokens_per_s", "{1:.0f} tokens/s"))
        if self.done < step < self.total:
            parts.append(f"{duration((self.total - step) * (now - self._started) / (step - self.done))} left")
        return "  ".join(part for part in parts if part)


def ticker(title: str) -> Tick:
    """Tells of work that has no steps, now and then in a plain line on stderr: `title  160/2500  3:20 left`."""
    started = printed = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if 0 < done < total and now - printed >= PLAIN_EVERY_S:
            printed = now
            left = duration((total - done) * (now - started) / done)
            print(f"{title}  {done}/{total}  {left} left", file=sys.stderr, flush=True)

    return tick


def _shown(metrics: Mapping[str, Any], key: str, form: str) -> str:
    value = metrics.get(key, metrics.get(f"train/{key}"))
    name = key.rpartition("/")[2].replace("_", " ").replace(" kl", " KL")
    return form.format(name, value) if isinstance(value, int | float) else ""


def _terminal() -> Any:
    """rich's console on stderr where that is a terminal, else None."""
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def duration(seconds: float) -> str:
    """Time as 0:07, 12:34 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
