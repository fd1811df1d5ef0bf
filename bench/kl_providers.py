"""Who computes the mean reverse KL and its gradients: plain torch, the peers, ours. One function a provider.

    calls, left_out = providers(inputs)
    loss, *gradients = calls["ours"]()

From hidden states a call returns (loss, gradient of the student's hidden states, of its weight); from logits (loss,
gradient of the student's logits). What is not installed or does not run on this device is named in `left_out`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from mskd_kernels import linear_reverse_kl, reverse_kl
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Call, installed
from bench.kl_cases import Inputs

CHUNK_BYTES = 2**28  # of both sides' logits at a time: our default, and what the compiled chunks get
Result = tuple[Tensor, ...]
Provider = Callable[..., Result]


def providers(inputs: Inputs) -> tuple[dict[str, Call], dict[str, str]]:
    """({provider: call}, {provider: why it is left out}) for the inputs' shape and device."""
    table, missing = (LINEAR, dict(PEERS)) if len(inputs) == 4 else (LOGITS, {})
    device = inputs[0].device
    left_out = {
        name: f"{package} is not installed (pip install 'mskd[bench]')"
        for name, package in missing.items()
        if installed(package) is None
    }
    if device.type != "cuda":
        left_out |= {name: "needs a CUDA GPU" for name in table if name in GPU_ONLY and name not in left_out}
        if not _has_cpp_compiler():
            left_out |= {name: "torch.compile needs a C++ compiler" for name in COMPILED if name in table}
    return {name: partial(call, *inputs) for name, call in table.items() if name not in left_out}, left_out


def _has_cpp_compiler() -> bool:
    return any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c)


def _with_gradients(loss: Tensor, *leaves: Tensor) -> Result:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


# --- plain torch


def mean_kl(student: Tensor, teacher: Tensor) -> Tensor:
    lq, lp = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(lp, lq, reduction="batchmean", log_target=True)


def mean_kl_of_hidden(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    return mean_kl(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight))


_compiled_logits = torch.compile(mean_kl, dynamic=False)
_compiled_hidden = torch.compile(mean_kl_of_hidden, dynamic=False)


def _logits(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Result:
    return _with_gradients(loss(student, teacher), student)


def _hidden(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Result:
    return _with_gradients(loss(hidden, weight, *teacher), hidden, weight)


def _compiled_chunks(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Result:
    """What one would write by hand: chunks of tokens, each compiled forward and backward, gradients added up."""
    n, tokens = hidden.shape[0], _chunk_tokens(weight)
    total, grad_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for i in range(0, n, tokens):
        part = hidden[i : i + tokens].detach().requires_grad_()
        loss = _compiled_hidden(part, weight, teacher_hidden[i : i + tokens], teacher_weight) * (part.shape[0] / n)
        total += loss.detach()
        grad_hidden[i : i + tokens], chunk_weight = torch.autograd.grad(loss, (part, weight))
        grad_weight += chunk_weight
    return total, grad_hidden, grad_weight.to(weight.dtype)


def _chunk_tokens(weight: Tensor) -> int:
    """Tokens whose logits of both sides fit in CHUNK_BYTES: a power of two, and as few as ours on the CPU."""
    most = min(CHUNK_BYTES // (2 * 4 * weight.shape[0]), 256 if weight.device.type == "cpu" else 4096)
    return 1 << (max(1, most).bit_length() - 1)


# --- peers


def _trl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Result:
    """TRL's op at beta 1; logits are made again in backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 1.0)
    return _with_gradients(values.mean(), hidden, weight)


def _liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Result:
    """Liger's Triton op at beta 1."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return _with_gradients(
        liger_fused_linear_jsd(hidden, weight, teacher_hidden, teacher_weight, jsd_beta=1.0), hidden, weight
    )


def _liger_chunked(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Result:
    """Liger's compiled chunks in torch at beta 1, the part of Liger that runs on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    labels = hidden.new_zeros(hidden.shape[0], dtype=torch.long)
    return _with_gradients(loss(hidden, weight, teacher_hidden, teacher_weight, labels), hidden, weight)


# --- ours


def _ours_logits(backend: str, student: Tensor, teacher: Tensor) -> Result:
    return _with_gradients(reverse_kl(student, teacher, reduction="mean", backend=backend), student)


def _ours(backend: str, hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Result:
    """The gradient is made in forward."""
    loss = linear_reverse_kl(hidden, weight, *teacher, reduction="mean", backend=backend, chunk_bytes=CHUNK_BYTES)
    return _with_gradients(loss, hidden, weight)


def _ours_recompute(backend: str, hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Result:
    """A value a token; the logits are made again in backward, for any upstream gradient."""
    values = linear_reverse_kl(hidden, weight, *teacher, backend=backend, chunk_bytes=CHUNK_BYTES)
    return _with_gradients(values.mean(), hidden, weight)


LOGITS: dict[str, Provider] = {
    "eager": partial(_logits, mean_kl),
    "compile": partial(_logits, _compiled_logits),
    "ours": partial(_ours_logits, "torch"),
    "ours triton": partial(_ours_logits, "triton"),
}
LINEAR: dict[str, Provider] = {
    "eager": partial(_hidden, mean_kl_of_hidden),
    "compile": partial(_hidden, _compiled_hidden),
    "compiled chunks": _compiled_chunks,
    "trl": _trl,
    "liger": _liger,
    "liger chunked": _liger_chunked,
    "ours": partial(_ours, "torch"),
    "ours recompute": partial(_ours_recompute, "torch"),
    "ours triton": partial(_ours, "triton"),
    "ours triton recompute": partial(_ours_recompute, "triton"),
}
PEERS = {"trl": "trl", "liger": "liger-kernel", "liger chunked": "liger-kernel"}
GPU_ONLY = {"liger", "ours triton", "ours triton recompute"}
COMPILED = {"compile", "compiled chunks", "liger chunked"}


def gemms(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Call:
    """The floor from hidden states: the four matrix products alone, into memory that is there, in ours' dtypes."""
    wide = torch.float32 if hidden.is_cuda else hidden.dtype  # 16-bit inputs, fp32 outputs: torch has it on CUDA only
    hidden, weight = hidden.detach(), weight.detach()
    gradient = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=hidden.dtype)
    products = [
        (a, b, torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=wide))
        for a, b in (
            (hidden, weight.t()),
            (teacher_hidden, teacher_weight.t()),
            (gradient, weight),
            (gradient.t(), hidden),
        )
    ]
    settings = {} if wide == hidden.dtype else {"out_dtype": wide}

    def run() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out, **settings)

    return run
