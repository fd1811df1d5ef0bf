"""What a training loop tells the world: metrics.jsonl, accelerate's trackers, progress on the terminal.

    with Tracker(folder, "teacher>ta", accelerator=accelerator, trackers=("tensorboard",)) as tracker:
        tracker.truncate_after(step)                # the steps that are done; 0 on a fresh start
        tracker.start_phase("minillm", 0, 64)       # steps done in this phase, and in all
        tracker.log({"train/loss": 0.8, "train/reverse_kl": 0.7}, step=25, phase_step=1, shown="reverse_kl")

Steps are optimizer steps of the hop, counted from 1 through all its phases; phase_step counts within the phase.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mskd.config import ConfigError
from mskd.store.hashes import NotRegular
from mskd.store.progress import ProgressLine

if TYPE_CHECKING:
    from accelerate import Accelerator


class Tracker:
    """A context manager for one hop. On processes other than the main one every method does nothing.

    folder: the node's; each `log` appends one line {"step", "phase_step", "objective", "time", ...} to metrics.jsonl in
    it, at once, with null for NaN and infinities. Between an interrupted and an uninterrupted run only "time" (Unix,
    seconds) and "perf/..." differ. trackers: names that accelerate knows; those that write files do so in `folder`.
    Raises ConfigError for an unknown tracker or one that is not installed, and OSError, with the path in it, where the
    metrics cannot be written.
    """

    def __init__(
        self, folder: Path, name: str, *, accelerator: Accelerator | None = None, trackers: Sequence[str] = ()
    ) -> None:
        check_trackers(trackers)
        self.path, self.name = Path(folder) / "metrics.jsonl", name
        self.main = accelerator is None or accelerator.is_main_process
        self._names = tuple(trackers)
        self._trackers: list[Any] = []
        self._file: Any = None
        self._progress = ProgressLine(name)

    def __enter__(self) -> Tracker:
        if self.main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(self.path) and not self.path.is_file():  # a pipe would keep us for ever
                    raise NotRegular(errno.EINVAL, "no regular file is in its place")
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            except OSError as e:
                raise self._unwritable(e) from None
            self._trackers = [_start(n, self.name, self.path.parent) for n in self._names]
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish()

    def truncate_after(self, step: int) -> None:
        """Cut metrics.jsonl behind the lines of `step`, for a loop that goes on from there; 0 empties the file.

        A line that a kill tore goes too. A step's lines must be logged before its state is saved.
        """
        if not self.main:
            return
        try:
            with open(self.path, "r+b") as f:
                f.truncate(_length_through(f.read(), step))
        except OSError as e:
            raise self._unwritable(e) from None

    def start_phase(self, objective: str, done: int, total: int) -> None:
        """Name the phase of the following steps. The time left is measured from here: `done` steps took no time."""
        if self.main:
            self._progress.start_phase(objective, done, total)

    def note(self, what: str, done: int, total: int) -> None:
        """Show how far something has come that is no step; nothing is recorded."""
        if self.main:
            self._progress.note(what, done, total)

    def log(self, metrics: Mapping[str, Any], *, step: int, phase_step: int, shown: str | None = None) -> None:
        """Record one step: a line of metrics.jsonl, the trackers, the progress. Values: numbers, 0-d tensors, strings.

        shown: the metric that the progress shows besides the loss, by its key or its key without "train/".
        """
        if not self.main:
            return
        values = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
        line = {"step": step, "phase_step": phase_step, "objective": self._progress.objective, **values}
        line["time"] = round(time.time(), 3)
        self._write(json.dumps({k: _json_value(v) for k, v in line.items()}, allow_nan=False).encode() + b"\n")
        for tracker in self._trackers:
            tracker.log(values, step=step)
        self._progress.show(phase_step, values, shown)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as e:
            raise self._unwritable(e) from None

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(error.errno, f"cannot write the metrics: {error.strerror}", str(self.path))


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError unless accelerate knows every tracker and its package is installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(f"run.trackers names {name!r}, which is no tracker; allowed: {', '.join(known)}")
        if name not in available:
            package = "'mskd[track]'" if name == "tensorboard" else name.replace("_ml", "-ml")
            raise ConfigError(f"the tracker {name!r} is not installed; run: pip install {package}")


def _start(kind: str, name: str, folder: Path) -> Any:
    """One of accelerate's trackers, started."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which process they are in
    run = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    build = LOGGER_TYPE_TO_CLASS[kind]
    try:
        if build.requires_logging_directory:
            tracker = build(run, str(folder))
        else:  # these take the project first; where they name runs, a run is a hop
            tracker = build("mskd", **({"name": run} if kind in ("wandb", "trackio") else {}))
        if hasattr(tracker, "start"):  # older versions of accelerate start in the constructor
            tracker.start()
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(f"the tracker {kind!r} does not start: {reason}; mend that or drop it") from e
    return tracker


def _length_through(data: bytes, step: int) -> int:
    """The number of bytes up to the end of the last whole line of a step <= `step`."""
    length = 0
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        length += len(line)
    return length


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
