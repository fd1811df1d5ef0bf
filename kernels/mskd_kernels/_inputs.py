"""What the public functions accept: shapes, dtypes and devices, checked once, each error one line.

Only metadata is looked at on a GPU; values are looked at on the CPU alone, where that needs no synchronisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "sum", "mean")


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of them is float64, float32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_float(name: str, x: Tensor, like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a float16, bfloat16, float32 or float64 tensor, got {given}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but the student's tensors are on {like.device}")


def check_teacher(name: str, x: Tensor | None, like: Tensor) -> None:
    if x is None:
        return
    check_float(name, x, like)
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but the teacher is frozen and gets no gradient: pass {name}.detach()")


def check_logits(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    """Checks a pair of logits [..., V]; returns the leading shape."""
    check_float("student_logits", student)
    check_teacher("teacher_logits", teacher, student)
    if student.ndim < 1 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must agree in all "
            "dimensions but the last (the vocabulary)"
        )
    if min(student.shape[-1], teacher.shape[-1]) == 0:
        raise ValueError("the vocabulary (the last dimension of the logits) is empty")
    return tuple(student.shape[:-1])


def check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor | None = None) -> None:
    """Checks hidden [..., H], weight [V, H], bias [V]; `side` is the prefix of their names, "student_" for one."""
    for name, x in ((f"{side}hidden", hidden), (f"{side}weight", weight), (f"{side}bias", bias)):
        if x is not None:
            check_float(name, x, like if like is not None else hidden)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}hidden {tuple(hidden.shape)} and {side}weight {tuple(weight.shape)} must be [..., H] and [V, H]"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{side}weight {tuple(weight.shape)}: the vocabulary is empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}bias has shape {tuple(bias.shape)}, expected [{weight.shape[0]}]")


def check_settings(temperature: float, reduction: str = "none") -> None:
    _positive("temperature", temperature)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; allowed: {', '.join(REDUCTIONS)}")


def check_side(side: str, logit_scale: float, softcap: float | None) -> None:
    _positive(f"{side}logit_scale", logit_scale)
    if softcap is not None:
        _positive(f"{side}softcap", softcap)


def _positive(name: str, x: float) -> None:
    if not isinstance(x, int | float):
        raise ValueError(f"{name} must be a plain number, got {type(x).__name__}")
    if not 0 < x < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {x}")


def per_token(name: str, x: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """A tensor with one number a token, flattened to [N]."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {tuple(shape)}, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}: one entry a token")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the student's tensors are on {device}")
    return x.reshape(-1)


def constant(name: str, x: Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A per-token constant of the loss, flattened to [N] in the dtype that sums are made in."""
    x = per_token(name, x, shape, device)
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be a float tensor, got {x.dtype}")
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but it is a constant of the loss: pass {name}.detach()")
    return x.to(dtype)


def flat_mask(mask: Tensor | None, shape: Sequence[int], device: torch.device, *, host: bool = False) -> Tensor | None:
    """mask (1 = counts), flattened to bool [N]. With `host` a mask on the CPU is taken as it is."""
    if mask is None:
        return None
    keep = host and isinstance(mask, Tensor) and mask.device.type == "cpu"
    return per_token("mask", mask, shape, torch.device("cpu") if keep else device) != 0


def flat_tokens(
    tokens: Tensor, mask: Tensor | None, vocabulary: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """tokens, flattened to int64 [N]. On the CPU tokens that count must lie in [0, vocabulary): not looked at by
    torch.compile, which has no values yet."""
    tokens = per_token("tokens", tokens, shape, device)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
    tokens = tokens.to(torch.int64)
    if torch.compiler.is_compiling():
        return tokens
    counted = tokens if mask is None or tokens.device.type != "cpu" else tokens[mask]
    if tokens.device.type == "cpu" and counted.numel():
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"tokens lie in [{low}, {high}], but the common vocabulary has {vocabulary} entries")
    return tokens


def made_in_forward(gradient: str | None, reduction: str) -> bool:
    """Whether the gradient is made with the loss. ValueError where that was asked for and cannot be."""
    if gradient not in (None, "forward", "recompute"):
        raise ValueError(f"gradient={gradient!r} is not known; allowed: forward, recompute, None")
    if gradient == "forward" and reduction == "none":
        raise ValueError('gradient="forward" needs a scalar result: reduction="sum" or "mean", or gradient="recompute"')
    return gradient != "recompute" and reduction != "none"


def logits_in_forward(gradient: str | None, reduction: str, student: Tensor) -> bool:
    """`made_in_forward` where the logits are given: never without a graph, and for float16 only if asked for.

    The factor that backward brings (a loss scale) is not known yet, and float16 would lose most of a gradient over N.
    """
    allowed = made_in_forward(gradient, reduction) and (gradient == "forward" or student.dtype != torch.float16)
    return allowed and student.requires_grad and torch.is_grad_enabled()


def divisor(mask: Tensor | None, tokens: int, denominator: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """`count` as a tensor of no dimensions; on the CPU unless it was counted or given on a GPU."""
    number = count(mask, tokens, denominator, torch.empty(0, dtype=dtype))
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=dtype)


def count(mask: Tensor | None, tokens: int, denominator: float | Tensor | None, like: Tensor) -> float | Tensor:
    """What a mean is divided by: `denominator`, or the valid tokens (1 where there is none)."""
    if denominator is None:
        if mask is None:
            return max(tokens, 1)
        return (mask != 0).sum().clamp(min=1).to(like.dtype)
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.requires_grad:
            raise ValueError("denominator must be a number or a tensor of one element that requires no grad")
        return denominator.reshape(()).to(like.dtype)  # one on the CPU divides a CUDA scalar without a copy
    _positive("denominator", denominator)
    return denominator
