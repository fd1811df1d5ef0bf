"""Inputs and float64 oracles of the kernel tests, written from the formulas. N rows, V vocabulary."""

import functools

import torch
from mskd_kernels import _ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROWS = {"torch": 64, "triton": 12}  # the interpreter takes 20 ms a program


def logits(n: int, v: int, *, close: bool = False, dtype=torch.float32, device="cpu", offset: float = 0.0):
    """Student and teacher logits [n, v]; `close`: reverse KL about 5e-4. `offset` is added to the teacher's."""
    generator = torch.Generator().manual_seed(n * 7919 + v)
    student = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    other = torch.randn(n, v, generator=generator, dtype=torch.float64)
    teacher = student + 0.032 * other if close else 2 * other
    return student.to(device, dtype), (teacher + offset).to(device, dtype)


def token_constants(n: int, v: int, dtype=torch.float64, device="cpu") -> dict[str, Tensor]:
    """tokens, old_logprobs, advantages, importance_weights, each [n]; ratios lie inside and outside the clip range."""
    generator = torch.Generator().manual_seed(n + v)
    constants = {
        "tokens": torch.randint(0, v, (n,), generator=generator),
        "old_logprobs": -torch.rand(n, generator=generator, dtype=torch.float64) * 6,
        "advantages": torch.randn(n, generator=generator, dtype=torch.float64),
        "importance_weights": 0.1 + torch.rand(n, generator=generator, dtype=torch.float64) * 1.15,
    }
    return {k: x.to(device) if k == "tokens" else x.to(device, dtype) for k, x in constants.items()}


def oracle_divergence(
    student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """Per-token divergence of logits [..., V] in float64 on the common columns, from the definition; 0 log 0 = 0."""
    v = min(student.shape[-1], teacher.shape[-1])
    q = (student[..., :v].double() / temperature).softmax(-1)
    p = (teacher[..., :v].double() / temperature).softmax(-1)
    b = {"jsd": 0.5}.get(kind, 0.1) if beta is None else beta

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return torch.xlogy(x, x / y).masked_fill(x == 0, 0.0).sum(-1)

    def mixture(x: Tensor, y: Tensor) -> Tensor:
        return b * x + (1 - b) * y

    return {
        "reverse_kl": lambda: kl(q, p),
        "forward_kl": lambda: kl(p, q),
        "jsd": lambda: b * kl(p, mixture(p, q)) + (1 - b) * kl(q, mixture(p, q)),
        "skew_kl": lambda: kl(p, mixture(p, q)),
        "skew_reverse_kl": lambda: kl(q, mixture(q, p)),
        "tvd": lambda: (q - p).abs().sum(-1) / 2,
    }[kind]()


def oracle_minillm(
    student: Tensor,
    teacher: Tensor,
    constants: dict[str, Tensor],
    valid: list[bool],
    clip: float,
    temperature: float,
    weight_single_step: bool,
    clip_weighted_ratio: bool,
) -> Tensor:
    """The sum of the loss over valid tokens in float64, token by token, from the formula of the issue."""
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    k = oracle_divergence(student, teacher, "reverse_kl", temperature)
    v = min(student.shape[-1], teacher.shape[-1])
    q = (student[:, :v].double() / temperature).softmax(-1)
    for i, counts in enumerate(valid):
        if not counts:
            continue
        y = int(constants["tokens"][i])
        old, a, w = (float(constants[n][i]) for n in ("old_logprobs", "advantages", "importance_weights"))
        r = (q[i, y].log() - old).exp()
        x = w * r if clip_weighted_ratio else r
        low, high = (torch.tensor(1 + sign * clip, dtype=torch.float64) for sign in (-1, 1))
        limited = min(max(x, low), high)
        policy = max(-a * x, -a * limited)
        total = total + (w if weight_single_step else 1.0) * k[i] + (policy if clip_weighted_ratio else w * policy)
    return total


def relative_error(x: Tensor, truth: Tensor) -> float:
    x, truth = x.detach().double(), truth.detach().double()
    return float((x - truth).norm() / truth.norm())


def rounding_unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_as_exact(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Norm-wise relative error at most twice that of plain torch at the same dtype, plus one rounding unit.

    In float64 the truth is no better than either: then 1e-11, since a reverse KL of 5e-4 costs four digits.
    """
    exact = ours.dtype == torch.float64
    limit = 1e-11 if exact else 2 * relative_error(plain, truth) + rounding_unit(ours.dtype)
    assert ours.dtype == plain.dtype
    assert relative_error(ours, truth) <= limit, f"{relative_error(ours, truth):.2e} > {limit:.2e}"


class Watch(TorchDispatchMode):
    """Sees inside this package's ops: elements of the largest tensor made, and of each GEMM (rows, inner, columns)."""

    def __init__(self):
        super().__init__()
        self.largest, self.gemms = 0, []
        self.plain = {name: getattr(_ops, name) for name in ("head_statistics", "head_gradient", "head_loss")}

    def __enter__(self):
        for name, function in self.plain.items():
            setattr(_ops, name, functools.partial(self.inside, function))
        return super().__enter__()

    def __exit__(self, *error):
        for name, function in self.plain.items():
            setattr(_ops, name, function)
        return super().__exit__(*error)

    def inside(self, function, *args):
        TorchDispatchMode.__enter__(self)
        try:
            return function(*args)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        a, b = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}.get(function.overloadpacket.__name__, (None, None))
        if a is not None:
            self.gemms.append((*args[a].shape, args[b].shape[1]))
        return result
