"""A processor that nobody has, for tests that must pass on every one: OTHER_SUMS=1 exchanges torch's products on a CPU.

They are numpy's, summed in two parts that are cut where the shape says. So products of another shape have other last
bits, as with a vendor's library, and the same program has the same bits. Of what exp, log, tanh, sin and cos fill, the
end that is no whole vector, which a scalar function may compute, is a unit in the last place off.
"""

import warnings
import zlib

import numpy as np
import torch
from torch import Tensor

VECTOR = 8
INSTALLED: list[torch.library.Library] = []  # what a library holds goes when it goes


def install() -> None:
    """For the rest of this process. Attention takes the way of plain products too."""
    library = torch.library.Library("aten", "IMPL")
    INSTALLED.append(library)
    torch.backends.cuda.enable_flash_sdp(False)  # of the CPU as well
    found = {"mm": product, "bmm": product, "addmm": add_product, "baddbmm": add_product}
    found |= {f.__name__: unary(f) for f in (np.exp, np.log, np.tanh, np.sin, np.cos)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, function in found.items():
            library.impl(name, function, "CPU")
            library.impl(f"{name}.out", into(function), "CPU")
            if function is not product:
                library.impl(f"{name}_", in_place(function), "CPU")


def wide(x: Tensor) -> Tensor:
    """In the dtype that sums are made in."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, K] times b [..., K, N]."""
    return _product(a, b).to(a.dtype)


def add_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a b; c is not read where beta is 0."""
    found = alpha * _product(a, b)
    return (found if beta == 0 else beta * wide(c) + found).to(a.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    x, y = wide(a).numpy(), wide(b).numpy()
    cut = zlib.crc32(repr((x.shape, y.shape)).encode()) % max(x.shape[-1], 1)
    return torch.from_numpy(np.matmul(x[..., cut:], y[..., cut:, :]) + np.matmul(x[..., :cut], y[..., :cut, :]))


def unary(function: np.ufunc):
    def computed(x: Tensor) -> Tensor:
        with np.errstate(all="ignore"):
            values = function(wide(x).numpy().reshape(-1))
        end = values[len(values) - len(values) % VECTOR :]
        end[:] = np.where(end == np.round(end), end, np.nextafter(end, np.zeros_like(end)))  # 0, 1 and inf are exact
        return torch.from_numpy(values).view(x.shape).to(x.dtype if x.is_floating_point() else torch.float32)

    return computed


def into(function):
    def out(*arguments, out: Tensor, **options) -> Tensor:
        found = function(*arguments, **options)
        return (out if out.shape == found.shape else out.resize_(found.shape)).copy_(found)

    return out


def in_place(function):
    return lambda x, *arguments, **options: x.copy_(function(x, *arguments, **options))
