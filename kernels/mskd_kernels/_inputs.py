"""What the public functions accept: shapes, dtypes, devices and values, checked once, each error one line.

Values on a GPU are not looked at, as that would wait for it: what must hold of them is asserted there (`require`).
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "sum", "mean")


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of them is float64, float32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_float(name: str, x: Tensor, like: Tensor | None = None) -> None:
    if type(x).__name__ == "DTensor":
        raise ValueError(f"{name} is sharded (a DTensor, as FSDP2 leaves it): pass {name}.full_tensor()")
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
        raise ValueError(
            f"{name} requires grad, but the teacher is frozen and gets no gradient: pass {name}.detach(), or freeze "
            "the model once, by teacher.requires_grad_(False)"
        )


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


def plain_head(
    side: str, hidden: Tensor, weight: Tensor | nn.Module, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head as given, as tensors: weight and bias, or an nn.Linear, which brings both.

    ValueError for any other module: what it adds to hidden weight^T - an adapter, a hook - would be left out unseen.
    """
    if not isinstance(weight, nn.Module):
        return hidden, weight, bias
    name = f"{type(weight).__module__}.{type(weight).__qualname__}"
    if type(weight) is not nn.Linear:
        raise ValueError(
            f"{side}weight is a {name}, and only a plain nn.Linear is known to be hidden weight^T + bias: merge an "
            "adapter or take it off the lm_head, give weight and bias as tensors if they are all of it, or give logits "
            "to divergence"
        )
    if weight._forward_pre_hooks or weight._forward_hooks or "forward" in vars(weight):
        raise ValueError(
            f"{side}weight is a {name} with hooks, which would not run: give its weight and bias as tensors"
        )
    if bias is not None:
        raise ValueError(f"{side}weight is a {name}, whose bias comes along: leave {side}bias out")
    return hidden, weight.weight, weight.bias


def check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor | None = None) -> None:
    """Checks hidden [..., H], weight [V, H], bias [V]; `side` is the prefix of their names, "student_" for one."""
    for name, x in ((f"{side}hidden", hidden), (f"{side}weight", weight), (f"{side}bias", bias)):
        if x is not None:
            check_float(name, x, like if like is not None else hidden)
    if weight.ndim == 1:
        raise ValueError(
            f"{side}weight has shape {tuple(weight.shape)}, not [V, H]: where it is sharded (ZeRO-3, FSDP) gather it "
            "first, and call the loss inside the wrapped module's forward"
        )
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}hidden {tuple(hidden.shape)} and {side}weight {tuple(weight.shape)} must be [..., H] and [V, H]"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{side}weight {tuple(weight.shape)}: the vocabulary is empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}bias has shape {tuple(bias.shape)}, expected [{weight.shape[0]}]")


def check_settings(temperature: Any, reduction: str = "none") -> float:
    """The temperature as a float; the reduction must be known."""
    if isinstance(temperature, Sequence | dict) and not isinstance(temperature, str):
        raise ValueError(
            f"temperature is one number for both sides, got {type(temperature).__name__}: for one a side divide the "
            "logits of each by its own (from hidden states without soft-cap: student_logit_scale=1/T, "
            "teacher_logit_scale=1/T)"
        )
    if reduction == "batchmean":
        raise ValueError(
            'reduction="batchmean" divides by the size of the first dimension, whatever is masked: give '
            'reduction="mean" with denominator=that size, or without one for the mean over the tokens that count'
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; allowed: {', '.join(REDUCTIONS)}")
    return positive("temperature", temperature)


def check_side(side: str, logit_scale: Any, softcap: Any) -> tuple[float, float | None]:
    """Scale and soft-cap as floats."""
    scale = positive(f"{side}logit_scale", logit_scale)
    return scale, None if softcap is None else positive(f"{side}softcap", softcap)


def positive(name: str, x: Any) -> float:
    value = number(name, x)
    if not 0 < value < float("inf"):
        given = value if isinstance(x, Tensor) else x
        raise ValueError(f"{name} must be positive and finite, got {given}")
    return value


def number(name: str, x: Any) -> float:
    """A constant of the loss as a float: a number of Python or numpy, or a tensor of one element on the CPU."""
    if isinstance(x, Tensor):
        if x.numel() != 1 or x.requires_grad:
            raise ValueError(f"{name} must be one number, a constant, got a tensor of shape {tuple(x.shape)}")
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}, and reading it waits for the device: pass {name}.item()")
        return float(x)
    if isinstance(x, bool) or not isinstance(x, int | float | Real):
        raise ValueError(f"{name} must be a plain number, got {type(x).__name__}")
    return float(x)


def require(good: Tensor, message: str) -> None:
    """ValueError unless `good` [] holds. A GPU is not waited for: it asserts by itself, and fails with the message."""
    if torch.compiler.is_compiling() or good.device.type in ("cuda", "meta"):
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(message)


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


def flat_mask(
    mask: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    *,
    labels: Tensor | None = None,
    ignore_index: int | None = -100,
    host: bool = False,
) -> Tensor | None:
    """What counts, flattened to bool [N]: mask 1 and a label other than ignore_index; None: all of it.

    With `host` a mask (or labels) on the CPU is taken as it is.
    """
    counts = None if mask is None else _ones(_on_either("mask", mask, shape, device, host))
    if labels is None or ignore_index is None:
        return counts
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be a whole number or None, got {type(ignore_index).__name__}")
    labelled = _integers("labels", _on_either("labels", labels, shape, device, host)) != ignore_index
    return labelled if counts is None else counts.to(labelled.device) & labelled


def _ones(mask: Tensor) -> Tensor:
    """A flat mask as bool. Labels or weights in its place would be misread without a word: only 0 and 1 are allowed."""
    if mask.dtype == torch.bool:
        return mask
    allowed = (
        "mask holds other values than 0 and 1: for labels give labels=, or mask=labels != -100; for weights weights="
    )
    if mask.is_complex() or (mask.is_floating_point() and mask.device.type != "cpu"):
        raise ValueError(
            f"mask must be bool or integer on {mask.device}, got {mask.dtype}: give mask != 0, or weights="
        )
    require(((mask == 0) | (mask == 1)).all(), allowed)
    return mask != 0


def _on_either(name: str, x: Tensor, shape: Sequence[int], device: torch.device, host: bool) -> Tensor:
    """`per_token`, on the CPU too where `host` allows it."""
    keep = host and isinstance(x, Tensor) and x.device.type == "cpu"
    return per_token(name, x, shape, torch.device("cpu") if keep else device)


def _integers(name: str, x: Tensor) -> Tensor:
    if x.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {x.dtype}")
    return x


def counted(
    mask: Tensor | None, hidden: Tensor, labels: Tensor | None = None, ignore_index: int | None = -100
) -> Tensor | None:
    """`flat_mask` in the leading shape of hidden states or logits [..., H], on their device: for the references."""
    shape = hidden.shape[:-1]
    flat = flat_mask(mask, shape, hidden.device, labels=labels, ignore_index=ignore_index, host=True)
    return None if flat is None else flat.reshape(shape).to(hidden.device)


def flat_weights(
    weights: Tensor | None, mask: Tensor | None, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """A weight a token, flattened to [N]; 0 where masked, whatever stands there."""
    if weights is None:
        return None
    flat = constant("weights", weights, shape, device, dtype)
    if mask is not None:
        flat = flat.masked_fill(~mask.to(device), 0.0)
    require((flat.isfinite() & (flat >= 0)).all(), "weights of tokens that count must be finite and at least 0")
    return flat


def flat_tokens(
    tokens: Tensor, mask: Tensor | None, vocabulary: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """tokens, flattened to int64 [N]. On the CPU tokens that count must lie in [0, vocabulary): not looked at by
    torch.compile, which has no values yet."""
    tokens = _integers("tokens", per_token("tokens", tokens, shape, device)).to(torch.int64)
    if torch.compiler.is_compiling():
        return tokens
    counted = tokens if mask is None or tokens.device.type != "cpu" else tokens[mask]
    if tokens.device.type == "cpu" and counted.numel():
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= vocabulary:
            labels = "; for labels with -100 give mask=labels != -100, or ignore_index=-100" if low == -100 else ""
            raise ValueError(
                f"tokens lie in [{low}, {high}], but the common vocabulary has {vocabulary} entries{labels}"
            )
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


def divisor(
    mask: Tensor | None,
    tokens: int,
    denominator: float | Tensor | None,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> Tensor:
    """`count` as a tensor of no dimensions; on the CPU unless it was counted or given on a GPU."""
    found = count(mask, tokens, denominator, torch.empty(0, dtype=dtype), weights)
    return found if isinstance(found, Tensor) else torch.tensor(found, dtype=dtype)


def count(
    mask: Tensor | None,
    tokens: int,
    denominator: float | Tensor | None,
    like: Tensor,
    weights: Tensor | None = None,
) -> float | Tensor:
    """What a mean is divided by: `denominator`, the sum of the weights (0 where masked), or the valid tokens.

    1 where there is nothing to divide.
    """
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.requires_grad:
            raise ValueError("denominator must be a number or a tensor of one element that requires no grad")
        if denominator.device.type == "cpu" and not torch.compiler.is_compiling():
            positive("denominator", denominator)
        return denominator.reshape(()).to(like.dtype)  # one on the CPU divides a CUDA scalar without a copy
    if denominator is not None:
        return positive("denominator", denominator)
    if weights is not None:
        total = weights.sum()
        return total.masked_fill(total == 0, 1.0).to(like.dtype)
    if mask is None:
        return max(tokens, 1)
    return (mask != 0).sum().clamp(min=1).to(like.dtype)
