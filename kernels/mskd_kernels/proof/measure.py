"""Times the ways of the row op on a device, one size after the other: `measured(device, SIZES)`. For `timings`."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mskd_kernels import _rows, _torch_rows, _triton_rows
from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._row_op import Objective, RowOp
from mskd_kernels.proof.cases import BF16, F16, F32, WITH_BF16
from mskd_kernels.proof.check import Begin, near, nobody, running
from mskd_kernels.proof.timings import Size, Timing

SECONDS = 2.0  # in all
_MOST_RUNS = 5  # of one way at one size
_MEMORY_SHARE = 0.25  # of what is free, for the logits that are timed


def measured(
    device: torch.device, sizes: Sequence[Size], begin: Begin = nobody, seconds: float = SECONDS
) -> tuple[Timing, ...]:
    """The ways of the row op at each size, as many sizes as the time allows. Raises Wrong where their losses differ."""
    flush = None
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(max(2 * cache, 64 * 2**20), dtype=torch.uint8, device=device)
    found: dict[Size, Timing] = {}
    spent = 0.0
    for wanted in sizes:
        size = _fitted(wanted, device)
        if spent <= seconds and size not in found:
            times = _timed(size, device, begin, flush, seconds / len(sizes))
            spent += sum(sum(some) for some in times.values())
            found[size] = Timing(size, **{way: 1e6 * min(some) for way, some in times.items()})
    return tuple(found.values())


def _timed(
    size: Size, device: torch.device, begin: Begin, flush: Tensor | None, seconds: float
) -> dict[str, list[float]]:
    """Each way's times; what it needs is freed before the next size."""
    ways = _ways(size, device)
    _agree(size, ways, begin)
    return {way: list(_times(call, flush, seconds / len(ways))) for way, call in ways.items()}


def _fitted(size: Size, device: torch.device) -> Size:
    """As many tokens as a share of the free memory holds, three times."""
    while device.type == "cuda" and size.tokens > 16:
        needed = 3 * size.tokens * size.vocabulary * size.itemsize
        if needed <= _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            break
        size = size._replace(tokens=size.tokens // 2)
    return size


def _ways(size: Size, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Each way as a call that gives the losses [N] and writes the gradient."""
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= WITH_BF16
    dtype = F32 if size.itemsize == 4 else BF16 if bf16 else F16
    shape = (size.tokens, -(-size.vocabulary // 64) * 64)
    s, t, out = (torch.randn(shape, dtype=dtype, device=device)[:, : size.vocabulary] for _ in range(3))
    kind = DIVERGENCES["reverse_kl" if size.passes == 1 else "jsd"]
    op, objective = RowOp(kind, "triton"), Objective()
    return {
        "torch": lambda: _torch_rows.fused(op, s, t, None, objective, out, None)[1],
        "split": lambda: _rows.in_steps(op, s, t, None, objective, out)[1],
        "fused": lambda: _triton_rows.fused(op, s, t, None, objective, out)[1],
    }


def _agree(size: Size, ways: dict[str, Callable[[], Tensor]], begin: Begin) -> None:
    """Also warms up: nothing is compiled while a clock runs."""
    right = ways["torch"]().double()
    for way in ("split", "fused"):
        with running(way, right.device, begin):
            losses = ways[way]()
        near(way, f"loss at {size.tokens} x {size.vocabulary}", losses, right, 1e-4 * right.abs())


def _times(call: Callable[[], Any], flush: Tensor | None, seconds: float) -> Iterator[float]:
    """Seconds of single calls, at least two, whose inputs come from memory and not from the L2 cache."""
    start = time.perf_counter()
    for number in range(_MOST_RUNS):
        if number > 1 and time.perf_counter() - start > seconds:
            return
        if flush is None:
            began = time.perf_counter()
            call()
            yield time.perf_counter() - began
            continue
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        yield max(begin.elapsed_time(end) / 1e3, 1e-7)
