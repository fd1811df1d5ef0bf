"""Proves in a process of its own, since an illegal address ends a CUDA context: start it, end it in time, judge it.

proven(device, "core", timeout=120.0, timed=True)       # (Proof, whether to keep it)
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mskd_kernels.proof.kept import FORMAT, Proof
from mskd_kernels.proof.timings import Timing, timing_of


def command(device: torch.device, subject: str, timed: bool, timeout: float) -> list[str]:
    """What proves. -P: nothing in the working folder is imported in place of what is installed."""
    options = [str(device), subject, "timed" if timed else "untimed", str(math.ceil(timeout))]
    return [sys.executable, "-P", "-m", "mskd_kernels.proof.trial", *options]


def proven(device: torch.device, subject: str, timeout: float, timed: bool) -> tuple[Proof, bool]:
    """The proof of a subject on a device, and whether to keep it."""
    environment = dict(os.environ, MSKD_KERNELS="torch")  # the process asks for no proof itself
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    start = time.monotonic()
    try:
        with _started(command(device, subject, timed, timeout), environment) as child:
            late = False
            try:
                out, err = child.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                late = True
                _kill(child)
                out, err = child.communicate()
    except OSError as error:
        return Proof(False, f"no process could be started to prove them: {error}"), False
    limit = timeout if late else None
    return judged(out, err, child.returncode, limit, time.monotonic() - start)


@contextmanager
def _started(arguments: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """The process, which dies with all that it started when the block is left."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        arguments, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        _kill(child)
        child.wait()


def _kill(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:  # it leads a group of its own: the compilers it started end with it
        os.killpg(child.pid, signal.SIGKILL)


def judged(out: str, err: str, code: int, limit: float | None, seconds: float) -> tuple[Proof, bool]:
    """What the process said (`trial`) and how it ended -> the proof, and whether to keep it.

    `limit`: the seconds after which it was ended, if it was. Not to be kept is what may be otherwise tomorrow: memory
    that was taken, a compiler that was missing or slow (what it compiled is there next time).
    """
    said = [found for line in out.splitlines() if (found := _document(line)) is not None]
    last = said[-1] if said else {}
    case, kernel = (next((x[name] for x in reversed(said) if name in x), None) for name in ("case", "kernel"))
    where = "before its first case" if case is None else f"in the case {case}"
    during = where if kernel is None else f"in the {kernel} kernel {where}"
    if "done" in last:
        table = tuple(timing_of(row) for row in last["table"])
        return Proof(True, _praise(last, table, seconds), table), True
    if "wrong" in last:
        return Proof(False, f"the {last['kernel']} kernel is wrong {where}: {last['wrong']}"), True
    if "unable" in last:
        return Proof(False, f"they could not be proven: {last['unable']}"), False
    if limit is not None:
        return Proof(False, f"the proof was ended after {limit:.0f} s {during}"), False
    tail = err.strip().splitlines()[-1:] or ["it said nothing"]
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Proof(False, f"the proof died ({ended}) {during}: {tail[0]}"), kernel is not None


def _document(line: str) -> dict[str, Any] | None:
    """A line of ours; drivers and compilers print too."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _praise(done: dict[str, Any], table: tuple[Timing, ...], seconds: float) -> str:
    said = f"the Triton kernels are proven on {done['gpu']}: {done['done']} cases against float64 in {seconds:.0f} s"
    if not table:
        return said
    size = table[0].size
    times = [("torch", table[0].torch), ("split", table[0].split), ("fused", table[0].fused)]
    figures = ", ".join(f"{way} {x / 1000:.3g} ms" for way, x in times if x is not None)
    return f"{said}; {size.tokens} x {size.vocabulary} logits of {8 * size.itemsize} bits: {figures}"
