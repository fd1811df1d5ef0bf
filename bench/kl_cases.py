"""Inputs of the reverse-KL benchmark and their truth: loss and gradients of the same rounded inputs in float64.

    case = Case.parse("512x50257x768x1600", torch.float32)      # from hidden states; "4096x32000": logits given
    inputs = case.inputs(0.5, device)                           # reverse KL about 0.5
    loss, *gradients = truth(inputs)

N tokens, V vocabulary, Hs and Ht hidden sizes of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# (student logits [N, V], teacher logits [N, V]) or (student hidden [N, Hs], weight [V, Hs], teacher hidden, weight)
Inputs = tuple[Tensor, ...]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SPREAD = 2.0  # standard deviation of the student's logits


@dataclass(frozen=True)
class Case:
    """A shape and a dtype; `hidden` is (Hs, Ht), None where logits are given."""

    n: int
    v: int
    hidden: tuple[int, int] | None
    dtype: torch.dtype

    @classmethod
    def parse(cls, text: str, dtype: torch.dtype) -> Case:
        """NxV or NxVxHsxHt; ValueError for anything else."""
        sizes = text.split("x")
        if len(sizes) not in (2, 4) or not all(s.isdecimal() and int(s) > 0 for s in sizes):
            raise ValueError(f"shape {text!r} is not known; give NxV (logits) or NxVxHsxHt, such as 512x50257x768x1600")
        n, v, *hidden = map(int, sizes)
        if hidden and hidden[0] > hidden[1]:
            raise ValueError(f"shape {text!r}: the student is wider than its teacher; give Hs <= Ht")
        return cls(n, v, (hidden[0], hidden[1]) if hidden else None, dtype)

    @property
    def shape(self) -> str:
        """The name in tables and result files."""
        if self.hidden is None:
            return f"logits N={self.n} V={self.v}"
        return f"linear N={self.n} V={self.v} H={self.hidden[0]},{self.hidden[1]}"

    @property
    def minimal_bytes(self) -> int:
        """What nothing can avoid: every input is read once, every gradient written once."""
        if self.hidden is None:
            return 3 * self.n * self.v * self.dtype.itemsize
        hs, ht = self.hidden
        return (self.n + self.v) * (2 * hs + ht) * self.dtype.itemsize

    def inputs(self, kl: float, device: torch.device) -> Inputs:
        """Tensors whose reverse KL is about `kl`; the student's want a gradient.

        The teacher's logits are the student's plus normal noise: where it is small, KL is half its variance. From
        hidden states the teacher sees the student's features and others, and the noise is in its weight.
        """
        generator = torch.Generator(device).manual_seed(self.n + self.v)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        noise = sqrt(2 * kl)
        if self.hidden is None:
            student = normal(self.n, self.v).mul_(SPREAD)
            teacher = normal(self.n, self.v).mul_(noise).add_(student)
            return student.to(self.dtype).requires_grad_(), teacher.to(self.dtype)
        hs, ht = self.hidden
        hidden, weight = normal(self.n, hs), SPREAD / sqrt(hs) * normal(self.v, hs)
        teacher_hidden = torch.cat([hidden, normal(self.n, ht - hs)], 1)
        teacher_weight = noise / sqrt(ht) * normal(self.v, ht)
        teacher_weight[:, :hs] += weight
        student_side = [x.to(self.dtype).requires_grad_() for x in (hidden, weight)]
        return *student_side, teacher_hidden.to(self.dtype), teacher_weight.to(self.dtype)


def truth(inputs: Inputs, tokens: int = 128) -> tuple[Tensor, ...]:
    """(mean reverse KL, gradients), computed by autograd in float64 some tokens at a time; the gradients in fp32."""
    n = inputs[0].shape[0]
    heads = [w.detach().double() for w in inputs[1::2]] if len(inputs) == 4 else []
    loss = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    first = torch.empty_like(inputs[0], dtype=torch.float32)
    weight = torch.zeros_like(heads[0]) if heads else None
    for i in range(0, n, tokens):
        leaf, other = (x[i : i + tokens].detach().double() for x in inputs[:: 2 if heads else 1])
        leaves = [leaf.requires_grad_(), *(h.requires_grad_() for h in heads[:1])]
        s, t = (leaf @ heads[0].t(), other @ heads[1].t()) if heads else (leaf, other)
        lq, lp = s.log_softmax(-1), t.log_softmax(-1)
        part = (lq.exp() * (lq - lp)).sum() / n
        gradient, *others = torch.autograd.grad(part, leaves)
        loss += part.detach()
        first[i : i + tokens] = gradient
        if weight is not None:
            weight += others[0]
    return (loss, first) if weight is None else (loss, first, weight.float())


def relative_error(x: Tensor, true: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    norm = torch.linalg.vector_norm
    return float(norm(x.float() - true, dtype=torch.float64) / norm(true, dtype=torch.float64))
