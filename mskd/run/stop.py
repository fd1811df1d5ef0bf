"""A stop that the user asks for, by Ctrl-C or SIGTERM, and how a run hears of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from mskd.sampling.rollout import Interrupted


class Stop:
    """Ctrl-C and SIGTERM ask for a stop; a second signal ends the process at once.

    While `polled` (a hop trains) the loop asks, saves and leaves. Elsewhere there is nothing to save, and Interrupted
    is raised on the spot.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.polled = False

    def __call__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Interrupted where a stop was asked for."""
        if self.signal is not None:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Hear the signals within; in a thread other than the main one the caller's handling stays."""

        def note(number: int, frame: Any) -> None:
            self.signal = number
            signal.signal(number, signal.SIG_DFL)
            if not self.polled:
                raise Interrupted

        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
