"""What importing costs, which backend runs, and what is refused, each with one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import mskd_kernels
import numpy as np
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
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

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


def hooked() -> torch.nn.Linear:
    head = torch.nn.Linear(4, 10, bias=False)
    head.register_forward_hook(lambda module, given, out: 30 * torch.tanh(out / 30))
    return head


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
    "beta must be one number, a constant, got a tensor": lambda: divergence(S, T, "jsd", beta=torch.ones(2) / 2),
    "beta is on meta, .*: pass beta.item()": lambda: divergence(S, T, "jsd", beta=torch.tensor(0.5, device="meta")),
    "beta must be a plain number, got str": lambda: divergence(S, T, "jsd", beta="0.5"),
    "temperature must be a plain number, got str": lambda: divergence(S, T, temperature="1"),
    "gradient='backward' is not known": lambda: linear_divergence(H, W, H, W, gradient="backward"),
    'gradient="forward" needs a scalar': lambda: linear_divergence(H, W, H, W, gradient="forward"),
    "gradient='both' is not known": lambda: linear_minillm_loss(H, W, H, W, **C, gradient="both"),
    "chunk_bytes must be a whole number": lambda: linear_divergence(H, W, H, W, chunk_bytes=1.5),
    "reduction='avg' is not known": lambda: reverse_kl(S, T, reduction="avg"),
    "backend='cuda' is not known": lambda: reverse_kl(S, T, backend="cuda"),
    "temperature must be positive": lambda: reverse_kl(S, T, temperature=0.0),
    "temperature must be a plain number, got bool": lambda: reverse_kl(S, T, temperature=True),
    "temperature must be one number": lambda: reverse_kl(S, T, temperature=torch.ones(6)),
    "temperature must be one number, a constant": lambda: reverse_kl(S, T, temperature=torch.ones(1).requires_grad_()),
    "temperature is one number for both sides, got tuple: .* student_logit_scale=1/T": lambda: linear_divergence(
        H, W, H, W, temperature=(1.0, 2.0)
    ),
    'reduction="batchmean" divides by .*: give reduction="mean" with denominator': lambda: reverse_kl(
        S, T, reduction="batchmean"
    ),
    "mask has shape": lambda: reverse_kl(S, T, mask=torch.ones(5)),
    "denominator must be positive": lambda: reverse_kl(S, T, reduction="mean", denominator=0),
    "denominator must be positive and finite, got -3.0": lambda: linear_divergence(
        H, W, H, W, reduction="mean", denominator=torch.tensor(-3.0)
    ),
    "denominator must be a number": lambda: reverse_kl(S, T, reduction="mean", denominator=torch.ones(6)),
    "tokens has shape": lambda: minillm_loss(S, T, **{**C, "tokens": C["tokens"][:3]}),
    "tokens must be int64": lambda: minillm_loss(S, T, **{**C, "tokens": C["tokens"].float()}),
    "tokens lie in": lambda: minillm_loss(S, T[:, :5], **{**C, "tokens": torch.full((6,), 7)}),
    "advantages has shape": lambda: minillm_loss(S, T, **{**C, "advantages": torch.ones(6, 10)}),
    "advantages must be a float": lambda: minillm_loss(S, T, **{**C, "advantages": torch.ones(6).long()}),
    "old_logprobs requires grad": lambda: minillm_loss(S, T, **{**C, "old_logprobs": torch.ones(6).requires_grad_()}),
    "clip must be": lambda: minillm_loss(S, T, **C, clip=-0.1),
    "teacher_weight requires grad, .*teacher.requires_grad_\\(False\\)": lambda: linear_divergence(
        H, W, H, W.clone().requires_grad_()
    ),
    "teacher_hidden .* must be": lambda: linear_divergence(H, W, H[:, :3], W),
    "student_hidden .* and teacher_hidden": lambda: linear_divergence(H, W, H[:4], W),
    "student_hidden .* and student_weight .* must be": lambda: linear_divergence(H, W.T, H, W),
    "student_weight has shape .*: where it is sharded": lambda: linear_divergence(H, W.flatten(), H, W),
    "weight has shape .*: where it is sharded": lambda: linear_logprobs(H, W[0, :0], C["tokens"]),
    "student_weight is a torch.nn.*NonDynamicallyQuantizableLinear, and only a plain nn.Linear": lambda: (
        linear_divergence(H, NonDynamicallyQuantizableLinear(4, 10), H, W)
    ),
    "teacher_weight is a torch.nn.*Embedding, and only": lambda: linear_divergence(H, W, H, torch.nn.Embedding(10, 4)),
    "weight is a .*Linear, whose bias comes along: leave bias out": lambda: linear_logprobs(
        H, torch.nn.Linear(4, 10), C["tokens"], bias=torch.ones(10)
    ),
    "student_weight is a .*Linear with hooks": lambda: linear_divergence(H, hooked(), H, W),
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


@pytest.mark.parametrize("two", [2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([2])], ids=repr)
def test_a_number_of_any_kind_is_a_number(two):
    """Values and gradients to the bit."""
    for call in (
        lambda x, two: divergence(x, T, temperature=two, reduction="mean", denominator=two),
        lambda x, two: divergence(x, T, "skew_kl", beta=two / 4, reduction="sum"),
        lambda x, two: linear_divergence(
            x[:, :4], W, H, W, temperature=two, student_softcap=two, teacher_logit_scale=two, reduction="sum"
        ),
        lambda x, two: minillm_loss(x, T, **C, clip=two / 8, temperature=two).loss,
        lambda x, two: mskd_kernels.linear_kd_loss(x[:, :4], W, H, W, C["tokens"], kd_ratio=two / 4).loss,
    ):
        results = []
        for given in (two, 2.0):
            x = S.clone().requires_grad_()
            value = call(x, given)
            results.append((value, *torch.autograd.grad(value, x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_lm_head_itself_brings_weight_and_bias():
    student, teacher = torch.nn.Linear(4, 10), torch.nn.Linear(4, 12, bias=False).requires_grad_(False)
    tensors = {"student_bias": student.bias}
    for function in (linear_divergence, mskd_kernels.linear_divergence_reference):
        ours = function(H, student, H, teacher, reduction="mean")
        assert torch.equal(ours, function(H, student.weight, H, teacher.weight, reduction="mean", **tensors))
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(ours, (student.weight, student.bias)))
    both = (
        linear_minillm_loss(H, student, H, teacher, **C),
        mskd_kernels.linear_kd_loss(H, student, H, teacher, C["tokens"]),
    )
    plain = (
        linear_minillm_loss(H, student.weight, H, teacher.weight, **C, **tensors),
        mskd_kernels.linear_kd_loss(H, student.weight, H, teacher.weight, C["tokens"], **tensors),
    )
    assert all(torch.equal(a.loss, b.loss) for a, b in zip(both, plain, strict=True))
    for function in (linear_logprobs, mskd_kernels.linear_cross_entropy):
        ours, wanted = function(H, student, C["tokens"]), function(H, student.weight, C["tokens"], bias=student.bias)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(H, student, H, teacher), linear_divergence(H, student, H, teacher))


class LowRank(torch.nn.Module):
    """An adapter on a head, as peft builds it: `weight` is the frozen one beneath."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A = base.requires_grad_(False), torch.nn.Linear(4, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 10, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_a_head_with_an_adapter_is_refused_by_name():
    """By its weight alone the loss would be that of the model without it, and the adapter would get no gradient."""
    with pytest.raises(
        ValueError, match="student_weight is a test_interface.LowRank, .* merge an adapter or take it off"
    ):
        linear_divergence(H, LowRank(torch.nn.Linear(4, 10)), H, W)
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 10)})
    for settings in ({"target_modules": ["lm_head"]}, {"target_modules": ["lm_head"], "use_dora": True}):
        adapted = peft.inject_adapter_in_model(peft.LoraConfig(**settings), torch.nn.ModuleDict(dict(model)))
        with pytest.raises(ValueError, match="student_weight is a peft.tuners.lora.layer.Linear, and only a plain"):
            linear_divergence(H, adapted["lm_head"], H, W)


def test_a_sharded_weight_is_refused_by_name():
    class DTensor(torch.Tensor):
        """Stands in for torch.distributed's, which needs a process group."""

    with pytest.raises(ValueError, match=r"student_weight is sharded .*: pass student_weight.full_tensor\(\)"):
        linear_divergence(H, W.as_subclass(DTensor), H, W)
