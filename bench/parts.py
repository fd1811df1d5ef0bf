"""Where the seconds of a long call go, and the most memory that it held.

parts = Parts(device)
with parts("loss"):
    with parts("teacher"):       # the clock of "loss" stands still meanwhile
        ...
parts.seconds                    # {"loss": ..., "teacher": ...}
with held(device) as memory: ...
memory.peak                      # bytes beyond what was there before; None where the system cannot tell
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


class Parts:
    """Seconds by part. A part inside another one stops its clock; on a GPU each change of part synchronises."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.open: list[str] = []
        self.since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._credit()
        self.open.append(name)
        try:
            yield
        finally:
            self._credit()
            self.open.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call as a part of this name."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return call(*arguments, **options)

        return timed

    def take(self) -> dict[str, float]:
        """The seconds since the last take."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _credit(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now


class Held:
    """`peak`, in bytes, once the block of `held` has ended."""

    peak: int | None = None


@contextmanager
def held(device: torch.device) -> Iterator[Held]:
    """The peak of memory during the block, beyond what was held when it began.

    GPU: torch.cuda.max_memory_allocated. CPU: the kernel's own record of resident memory (VmHWM), which includes the
    scratch memory of MKL and oneDNN and costs nothing; Linux with glibc only.
    """
    found = Held()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory that is free but not given back hides what is taken again
        RESET.write_text("5")  # the peak starts again at what is resident now
    except (OSError, AttributeError):  # no Linux, no glibc
        yield found
        return
    before = _status("VmRSS")
    yield found
    found.peak = _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])
