"""Tests of the row op run on both backends: on the GPU where there is one, else on the CPU with Triton's interpreter.

Uninitialised memory is filled with NaN, so that reading it is seen.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class CountedKernel:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


KERNELS = tuple(f"_{name}_kernel" for name in ("statistics", "combine", "terms", "gradient", "fused", "scale"))


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch, device):
    """Both backends; a test with "triton" fails unless kernels were launched, one with "torch" if any was."""
    from mskd_kernels import _triton_rows

    assert _triton_rows.INTERPRETED == (device.type == "cpu"), "TRITON_INTERPRET=1 came after the import of triton"
    kernels = [CountedKernel(getattr(_triton_rows, name)) for name in KERNELS]
    for name, kernel in zip(KERNELS, kernels, strict=True):
        monkeypatch.setattr(_triton_rows, name, kernel)
    yield request.param
    launched = [k.launches for k in kernels]
    assert (max(launched) > 0) == (request.param == "triton"), launched
