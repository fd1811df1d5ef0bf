"""Whether the Triton kernels are right on a GPU of this machine: asked at first use, proven once, kept for good.

    state(torch.device("cuda"))           # Proof(passed, why, table): known, or kept, or proven now
    prove(torch.device("cuda"))           # anew, whatever is kept

A proof runs the cases of a subject (`cases`) against float64 on that very GPU and then times the ways of the row op
(`timings`), by `trial` in a process of its own (`prover`). What came out is kept (`kept`) and not measured again: a
resumed run then takes the same kernels and keeps its bits. Of several processes the first one proves, the others wait.
"""

import logging
import os
import sys
import threading
import time
import warnings

import torch
from torch._guards import detect_fake_mode

from mskd_kernels.proof.cases import CORE
from mskd_kernels.proof.kept import Proof, Record, key_of
from mskd_kernels.proof.prover import proven

WISHES = ("auto", "torch", "triton", "retest")
TIMEOUT = 120.0
_LOOK = 0.2  # seconds between two looks at what another process is proving
_GRACE = 30.0  # seconds beyond its own limit after which another process is waited for no longer
_STARTED = time.time()
_log = logging.getLogger("mskd_kernels")
_known: dict[tuple[torch.device, str], Proof] = {}
_mutex = threading.RLock()


def wish() -> str:
    """MSKD_KERNELS, what "auto" shall take on a GPU. ValueError for what is not known."""
    given = os.environ.get("MSKD_KERNELS") or "auto"
    if given not in WISHES:
        raise ValueError(f"MSKD_KERNELS={given!r} is not known; allowed: {', '.join(WISHES)}")
    return given


def state(device: torch.device | str, subject: str = CORE) -> Proof:
    """Whether the kernels of a subject are proven on `device`; proves them where that is not known yet.

    Not while torch compiles or fakes, nor within the capture of a CUDA graph: what is not known then counts as not
    proven and is asked again later. A failure is said once, as a RuntimeWarning.
    """
    device = _indexed(torch.device(device))
    found = _known.get((device, subject))
    if found is not None:
        return found
    busy = _busy(device)
    if busy is not None:
        return Proof(False, f"the Triton kernels are not proven {busy}")
    with _mutex:
        return _known.get((device, subject)) or _settled(device, subject, TIMEOUT)


def prove(device: torch.device | str, timeout: float = TIMEOUT, subject: str = CORE) -> Proof:
    """Proves the kernels of a subject on `device` anew, within `timeout` seconds, and keeps what came out."""
    with _mutex:
        return _settled(_indexed(torch.device(device)), subject, timeout, since=time.time())


def _settled(device: torch.device, subject: str, timeout: float, since: float | None = None) -> Proof:
    """What is kept if it is not older than `since`, else proven now; remembered, and said if it is a failure."""
    if since is None:
        since = _STARTED if wish() == "retest" else 0.0
    nothing = _nothing_to_prove(device)
    found = Proof(False, nothing) if nothing else _kept_or_proven(device, subject, timeout, since)
    _known[device, subject] = found
    if not found.passed and not nothing and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"the Triton losses stay off ({subject}), torch computes them: {found.why}. MSKD_KERNELS=retest proves "
            "anew, MSKD_KERNELS=torch asks for torch",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def _kept_or_proven(device: torch.device, subject: str, timeout: float, since: float) -> Proof:
    """Of several processes the first one proves; those that come while it does take what it found."""
    record, asked = Record(key_of(device), subject), time.time()
    found = record.read(since, asked)
    if found is not None:
        return found
    with record.lock() as lock:
        if lock is None:  # nothing is timed: another process would time it otherwise and choose other kernels
            _announce(record, timeout)
            found, _ = proven(device, subject, timeout, timed=False)
            where = record.path.parent
            return found._replace(why=f"{found.why} (kept nowhere, since {where} cannot be written; set MSKD_CACHE)")
        give_up = time.monotonic() + timeout + _GRACE
        while not lock.take():
            if time.monotonic() > give_up:
                return Proof(False, f"{lock.owner()} has not finished proving in {timeout + _GRACE:.0f} s")
            time.sleep(_LOOK)
        found = record.read(since, asked)  # by the one that had the lock
        if found is None:
            _announce(record, timeout)
            found, final = proven(device, subject, timeout, timed=subject == CORE)
            record.write(found, final)
        return found


def _announce(record: Record, timeout: float) -> None:
    """Whoever waits shall know for what: shown on stderr where no logging is set up."""
    gpu = record.key["gpu"]
    _log.warning("proving the Triton losses (%s) on %s, once: a minute, at most %.0f s", record.subject, gpu, timeout)


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _busy(device: torch.device) -> str | None:
    """What forbids to look and to prove now."""
    if torch.compiler.is_compiling():
        return "while torch compiles"
    if detect_fake_mode() is not None:
        return "while tensors are faked"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "while a CUDA graph is captured"
    return None


def _nothing_to_prove(device: torch.device) -> str | None:
    """Why no kernel runs on the device."""
    try:
        from mskd_kernels._triton_kernels import INTERPRETED  # where it is used: triton may be missing
    except ImportError as error:
        return f"triton cannot be imported: {error} ({sys.platform})"
    if device.type == "cpu":
        return None if INTERPRETED else "no GPU: the Triton kernels are for CUDA, the CPU runs the closed form in torch"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"no GPU: torch sees no CUDA device for {device}"
    if torch.version.hip is not None:
        return "no NVIDIA GPU, and the Triton kernels are written for CUDA"
    return "TRITON_INTERPRET=1 is set, so that nothing runs on the GPU" if INTERPRETED else None
