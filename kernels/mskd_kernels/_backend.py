"""Which implementation of the row op runs where: Triton kernels or chunked torch.

`backend="auto"` takes Triton on a GPU where the kernels have been proven (`proof.first_use`), torch everywhere else.
The environment variable MSKD_KERNELS says otherwise: torch, triton (proven or not), retest (prove anew), or auto.
"""

import sys

import torch

from mskd_kernels.proof.cases import CORE
from mskd_kernels.proof.first_use import state, wish
from mskd_kernels.proof.kept import Proof

BACKENDS = ("auto", "triton", "torch")


def backend_for(device: torch.device | str) -> tuple[str, str]:
    """What `backend="auto"` takes on `device`, and why: ("triton" | "torch", one sentence).

    Proves the kernels where that has not been done yet. Raises ValueError for an unknown MSKD_KERNELS.
    """
    found = automatic(torch.device(device))
    return ("triton" if found.passed else "torch"), found.why


def automatic(device: torch.device, subject: str | None = CORE) -> Proof:
    """Whether "auto" takes the Triton kernels of a subject on `device`. None: what no proof covers."""
    if device.type != "cuda":
        return Proof(False, f"no GPU: Triton kernels are for CUDA; {device.type} runs the closed form in chunked torch")
    if (asked := wish()) == "torch":
        return Proof(False, "MSKD_KERNELS=torch asks for it")
    if subject is None:
        return Proof(False, "no proof covers such logits")
    if asked == "triton":
        error = _triton_error()
        if error is not None:
            raise ValueError(f"MSKD_KERNELS=triton needs triton: {error}; set it to torch or install triton")
        return Proof(True, "MSKD_KERNELS=triton asks for it, proven or not")
    core = state(device)
    if subject == CORE or not core.passed:
        return core
    return state(device, subject)._replace(table=core.table)  # only the core is timed


def resolve_backend(backend: str, device: torch.device) -> str:
    """What `backend` as the user gave it takes on `device`: "triton" or "torch". "auto" proves the kernels if need be.

    ValueError where it cannot run; never a silent fallback.
    """
    check_backend(backend, device)
    return backend_for(device)[0] if backend == "auto" else backend


def check_backend(backend: str, device: torch.device) -> str:
    """`backend` as the user gave it, for an op: "auto" stays what it is until the op runs, as nothing is proven while
    torch traces or compiles. ValueError where it cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    if backend == "triton":
        error = _triton_error()
        if error is not None:
            raise ValueError(f'backend="triton" needs triton: {error}; use backend="torch" or install triton')
        if device.type != "cuda" and not _interpreted():
            raise ValueError(
                f'backend="triton" runs on CUDA tensors, got {device.type}; on CPU set TRITON_INTERPRET=1 before '
                'Python starts, or use backend="torch"'
            )
    return backend


def _triton_error() -> str | None:
    try:
        import triton  # noqa: F401  (imported where used: triton exists on Linux only)
    except ImportError as error:
        return f"{error} ({sys.platform})"
    return None


def _interpreted() -> bool:
    from mskd_kernels._triton_kernels import INTERPRETED

    return INTERPRETED
