"""What is kept of proofs: a JSON file for each GPU model, driver, torch, triton and source text of this package.

key = key_of(device); file = File(key, "core")
file.read(since=0.0, asked=time.time())
with file.lock() as lock: ...                # of several processes one
"""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from mskd_kernels.proof.timings import Timing, timing_of

try:
    import fcntl
except ImportError:  # Windows, where there is no Triton either
    fcntl = None  # type: ignore[assignment]

FORMAT = "mskd-proof-1"


class Proof(NamedTuple):
    """Whether "auto" takes the Triton kernels, why (one sentence), and what was timed."""

    passed: bool
    why: str
    table: tuple[Timing, ...] = ()

    @property
    def digest(self) -> str:
        """Names what the proof decides: equal digests, equal choices."""
        return hashlib.sha256(json.dumps([self.passed, *self.table]).encode()).hexdigest()[:12]


def key_of(device: torch.device) -> dict[str, Any]:
    """All that a proof holds for: the GPU's model, the driver, torch, triton and the text of this package."""
    import triton

    chip: dict[str, Any] = {"gpu": "Triton's interpreter", "capability": [0, 0], "processors": 0, "driver": ""}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        chip = {
            "gpu": found.name,
            "capability": [found.major, found.minor],
            "processors": found.multi_processor_count,
            "driver": _driver(),
        }
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
    return chip | versions | {"sources": _sources()}


def _driver() -> str:
    """The version of the NVIDIA driver; where the system does not say, the CUDA version that it is for."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)
    return driver_of(text) or ("" if asked is None else str(asked()))


def driver_of(text: str) -> str | None:
    """The version in what the driver's kernel module says of itself."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _sources() -> str:
    """Of all files of this package: also the torch path, which was timed beside the kernels."""
    total = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def folder() -> Path:
    """Where proofs are kept."""
    if given := os.environ.get("MSKD_CACHE"):
        return Path(given).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "mskd" / "kernels"


class Record:
    """The file of one key and subject, and the lock that all subjects of the key share."""

    def __init__(self, key: dict[str, Any], subject: str):
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.key, self.subject = key, subject
        self.path = folder() / f"{name}-{subject}.json"
        self.locked = folder() / f"{name}.lock"

    def read(self, since: float, asked: float) -> Proof | None:
        """What is kept, if it is not older than `since`, or than `asked` where it may be otherwise tomorrow.

        None where there is nothing, or what is there is not ours.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if (found["format"], found["key"]) != (FORMAT, self.key):
                return None
            if not found["proven_at"] >= (since if found["final"] else asked):
                return None
            table = tuple(timing_of(row) for row in found["table"])
            return Proof(found["passed"] is True, str(found["why"]), table)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, proof: Proof, final: bool) -> None:
        """In one go: who reads the file finds all of it or nothing. `final` False: for those that are waiting only."""
        found = {"format": FORMAT, "subject": self.subject, "passed": proof.passed, "why": proof.why, "final": final}
        found |= {"proven_at": time.time(), "key": self.key, "table": [timing.row() for timing in proof.table]}
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps(found, indent=1), encoding="utf-8")
            new.replace(self.path)
        except OSError:  # a full disk: this process knows it all the same
            new.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator["Lock | None"]:
        """The lock, open but not taken yet; None where the folder cannot be written."""
        try:
            self.locked.parent.mkdir(parents=True, exist_ok=True)
            file = self.locked.open("a+", encoding="utf-8")
        except OSError:
            yield None
            return
        with file:
            yield Lock(file)


class Lock:
    """A file that one process at a time has. The system takes it back when that process dies: none is left behind."""

    def __init__(self, file: IO[str]):
        self.file = file

    def take(self) -> bool:
        """Whether this process has it now; always where the file system has no locks."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()
        return True

    def owner(self) -> str:
        """Who has it, or had it last."""
        self.file.seek(0)
        return self.file.read() or "another process"
