"""What importing costs, which backend runs, and what is refused, each with one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import mskd_kernels
import pytest
import torch
from kernel_cases import logits, token_constants
from mskd_kernels import (
    Proof,
    _backend,
    backend_for,
    divergence,
    linear_divergence,
    linear_logprobs,
    linear_minillm_loss,
    minillm_loss,
    reverse_kl,
)

KERNELS = Path(mskd_kernels.__file__).parents[1]


def run(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(KERNELS), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_torch_and_triton_and_nothing_else():
    code = """
import sys, torch
before = set(sys.modules)
import mskd_kernels
tops = {m.split(".")[0] for m in set(sys.modules) - before if not m.startswith("_sysconfigdata")}
print(sorted(tops - set(sys.stdlib_module_names) - {"mskd_kernels", "triton"}))
print([m for m in ("transformers", "datasets", "matplotlib", "mskd") if m in sys.modules])
"""
    assert run(code).splitlines() == ["[]", "[]"]


def test_kernels_is_no_package():
    """`kernels` is the import name of another library, which a file here would hide from transformers."""
    assert not (KERNELS / "__init__.py").exists()


def test_public_names_and_references():
    assert all(hasattr(mskd_kernels, name) for name in mskd_kernels.__all__)
    ops = [n for n in mskd_kernels.__all__ if n.startswith(("linear_", "divergence", "reverse", "minillm"))]
    assert all(n + "_reference" in ops for n in ops if not n.endswith("_reference")) and len(ops) == 18


def test_backend_of_this_machine(monkeypatch):
    assert backend_for("cpu")[0] == "torch" and backend_for(torch.device("cpu"))[1].startswith("no GPU")
    assert _backend.resolve_backend("auto", torch.device("cpu")) == "torch"
    gpu = torch.device("cuda:0")
    for proof, backend in ((Proof(True, "right"), "triton"), (Proof(False, "wrong"), "torch")):
        monkeypatch.setattr(_backend, "state", lambda device, proof=proof: proof)
        assert _backend.resolve_backend("auto", gpu) == backend == backend_for("cuda:0")[0]
        assert _backend.resolve_backend("triton", gpu) == "triton"  # asked for is obeyed, proven or not


def test_triton_on_cpu_without_the_interpreter_is_refused():
    code = """
import torch, mskd_kernels
try:
    mskd_kernels.reverse_kl(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")
except ValueError as error:
    print(error)
print(mskd_kernels.state("cpu"))
"""
    refused, state = run(code).splitlines()
    assert "TRITON_INTERPRET=1" in refused and state.startswith("Proof(passed=False, why='no GPU: ")


S, T = logits(6, 10)
H, W = torch.randn(6, 4), torch.randn(10, 4)
C = token_constants(6, 10, torch.float32)
BAD_CALLS = {
    "student_logits .* and teacher_logits": lambda: divergence(S, T[:5]),
    "student_logits must be a float": lambda: divergence(S.long(), T),
    "teacher_logits must be a float": lambda: divergence(S, T.tolist()),
    "teacher_logits is on meta": lambda: divergence(S, T.to("meta")),
    "teacher_logits requires grad": lambda: divergence(S, T.clone().requires_grad_()),
    "vocabulary .* is empty": lambda: divergence(S[:, :0], T),
    "kind='kl' is not known; allowed: reverse_kl, forward_kl, jsd, skew_kl": lambda: divergence(S, T, "kl"),
    "kind='kl' is not known": lambda: linear_divergence(H, W, H, W, "kl"),
    "kind='tvd' takes no beta, got 0.5; those that do: jsd": lambda: linear_divergence(H, W, H, W, "tvd", beta=0.5),
    "kind='reverse_kl' takes no beta": lambda: divergence(S, T, beta=0.1),
    "a number 0 < beta < 1, got 0; the ends are kind='forward_kl'": lambda: divergence(S, T, "jsd", beta=0),
    "a number 0 < beta < 1, got 1.0; the ends": lambda: linear_divergence(H, W, H, W, "jsd", beta=1.0),
    "a number 0 <= beta < 1, got 1.5": lambda: divergence(S, T, "skew_kl", beta=1.5),
    "a number 0 <= beta < 1, got -0.1": lambda: divergence(S, T, "skew_reverse_kl", beta=-0.1),
    "a number 0 <= beta < 1, got nan": lambda: divergence(S, T, "skew_kl", beta=float("nan")),
    "beta must be a plain number, got Tensor": lambda: divergence(S, T, "jsd", beta=torch.tensor(0.5)),
    "beta must be a plain number, got str": lambda: divergence(S, T, "jsd", beta="0.5"),
    "temperature must be a plain number, got str": lambda: divergence(S, T, temperature="1"),
    "gradient='backward' is not known": lambda: linear_divergence(H, W, H, W, gradient="backward"),
    'gradient="forward" needs a scalar': lambda: linear_divergence(H, W, H, W, gradient="forward"),
    "gradient='both' is not known": lambda: linear_minillm_loss(H, W, H, W, **C, gradient="both"),
    "chunk_bytes must be a whole number": lambda: linear_divergence(H, W, H, W, chunk_bytes=1.5),
    "reduction='avg' is not known": lambda: reverse_kl(S, T, reduction="avg"),
    "backend='cuda' is not known": lambda: reverse_kl(S, T, backend="cuda"),
    "temperature must be positive": lambda: reverse_kl(S, T, temperature=0.0),
    "temperature must be a plain number": lambda: reverse_kl(S, T, temperature=torch.tensor(1.0)),
    "mask has shape": lambda: reverse_kl(S, T, mask=torch.ones(5)),
    "denominator must be positive": lambda: reverse_kl(S, T, reduction="mean", denominator=0),
    "denominator must be a number": lambda: reverse_kl(S, T, reduction="mean", denominator=torch.ones(6)),
    "tokens has shape": lambda: minillm_loss(S, T, **{**C, "tokens": C["tokens"][:3]}),
    "tokens must be int64": lambda: minillm_loss(S, T, **{**C, "tokens": C["tokens"].float()}),
    "tokens lie in": lambda: minillm_loss(S, T[:, :5], **{**C, "tokens": torch.full((6,), 7)}),
    "advantages has shape": lambda: minillm_loss(S, T, **{**C, "advantages": torch.ones(6, 10)}),
    "advantages must be a float": lambda: minillm_loss(S, T, **{**C, "advantages": torch.ones(6).long()}),
    "old_logprobs requires grad": lambda: minillm_loss(S, T, **{**C, "old_logprobs": torch.ones(6).requires_grad_()}),
    "clip must be": lambda: minillm_loss(S, T, **C, clip=-0.1),
    "teacher_weight requires grad": lambda: linear_divergence(H, W, H, W.clone().requires_grad_()),
    "teacher_hidden .* must be": lambda: linear_divergence(H, W, H[:, :3], W),
    "student_hidden .* and teacher_hidden": lambda: linear_divergence(H, W, H[:4], W),
    "student_weight .* must be": lambda: linear_divergence(H, W[0], H, W),
    "student_bias has shape": lambda: linear_divergence(H, W, H, W, student_bias=torch.ones(9)),
    "student_softcap must be positive": lambda: linear_divergence(H, W, H, W, student_softcap=-1.0),
    "teacher_logit_scale must be positive": lambda: linear_minillm_loss(H, W, H, W, **C, teacher_logit_scale=0),
    "chunk_bytes must be": lambda: linear_divergence(H, W, H, W, chunk_bytes=0),
    "tokens lie in .* 10 entries": lambda: linear_logprobs(H, W, torch.full((6,), -1)),
    "hidden .* and weight": lambda: linear_logprobs(H[:, :2], W, C["tokens"]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_refused(message):
    with pytest.raises(ValueError, match=message) as error:
        BAD_CALLS[message]()
    assert "\n" not in str(error.value)
