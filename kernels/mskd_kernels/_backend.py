"""Which implementation of the row op runs where: Triton kernels or chunked torch.

A kernel that never ran on a GPU stays off by default: `auto` takes Triton only on the compute capabilities listed here.
"""

import sys

import torch

# Compute capabilities on which the tests of the Triton kernels have passed on the chip itself. Compiling is no proof.
PROVEN_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()

BACKENDS = ("auto", "triton", "torch")


def backend_for(device: torch.device | str) -> tuple[str, str]:
    """What `backend="auto"` takes on `device`, and why: ("triton" | "torch", one sentence)."""
    device = torch.device(device)
    if device.type != "cuda":
        return "torch", f"Triton kernels are for CUDA; {device.type} runs the closed form in chunked torch"
    capability = torch.cuda.get_device_capability(device)
    name = f"sm_{capability[0]}{capability[1]}"
    if capability not in PROVEN_CAPABILITIES:
        return "torch", (
            f"the Triton kernels have not been proven on {name} yet, so the closed form runs in chunked torch; "
            'backend="triton" takes them all the same'
        )
    if _triton_error() is not None:
        return "torch", f"the Triton kernels are proven on {name}, but triton is not installed"
    return "triton", f"the Triton kernels are proven on {name}"


def resolve_backend(backend: str, device: torch.device) -> str:
    """`backend` as the user gave it -> "triton" or "torch". ValueError where it cannot run; never a silent fallback."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    if backend == "auto":
        return backend_for(device)[0]
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
    from mskd_kernels import _triton_rows

    return _triton_rows.INTERPRETED
