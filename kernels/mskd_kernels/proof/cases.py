"""What must be right on a GPU before "auto" takes the Triton kernels there, as data. Pure: nothing runs here.

A subject is what is proven in one go: "core", the kinds that are used most, or another kind, or one with soft-caps, at
its first use. Its cases go through all that decides which code runs: the kernel, the dtypes of logits and gradient, the
loss, how rows lie in memory, masks, and where a side has no mass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._row_op import RowOp

CORE = "core"
_CAPPED = "+softcap"
_ONE_SIDE = "logprobs"  # no teacher
_CORE_KINDS = ("reverse_kl", "forward_kl", "jsd", None)
_OTHER_KINDS = tuple(kind for kind in DIVERGENCES if kind not in _CORE_KINDS)
SUBJECTS = (CORE, *_OTHER_KINDS, *(f"{kind}{_CAPPED}" for kind in (*DIVERGENCES, _ONE_SIDE)))
WITH_BF16 = (8, 0)  # from this compute capability on

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Of the logits and of their gradient: alike; from float16 logits kept in float32 until its last factor is known; from
# the float32 logits of a 16-bit head in the head's dtype. Where they differ: the losses that are tried with them, fewer
# than there are, as each combination takes seconds to compile.
_DTYPES: dict[tuple[torch.dtype, torch.dtype], tuple[str, ...]] = {
    (F16, F16): (), (BF16, BF16): (), (F32, F32): (),
    (F16, F32): ("plain", "policy"), (F32, F16): ("kd", "policy", "nll"), (F32, BF16): ("kd", "policy", "nll"),
}  # fmt: skip
LAYOUTS = ("aligned", "odd", "apart")
NAMES = {F16: "fp16", BF16: "bf16", F32: "fp32"}


class Case(NamedTuple):
    """One run of the row op, or of the kernel that scales a gradient ("scale")."""

    kind: str | None  # of divergence; None: no teacher
    loss: str  # "plain": the divergence; "kd": and nll; "policy": MiniLLM's; "nll"; "fields": any coefficients
    way: str  # "split": a program a row; "parts": several a row; "fused"; "scale"
    logits: torch.dtype
    gradient: torch.dtype
    vocabulary: int
    tokens: int
    layout: str = "odd"  # rows that start on 16 bytes; that do not; teacher's that start elsewhere than the student's
    masked: bool = False  # some rows do not count and hold NaN
    infinite: bool = False  # some columns have no mass, on both sides or on one
    in_place: bool = False  # the gradient takes the logits' place
    close: bool = False  # a student close to its teacher: a KL of 5e-4
    capped: bool = False

    @property
    def name(self) -> str:
        """One line that names the case."""
        dtypes = NAMES[self.logits] + ("" if self.logits == self.gradient else f" to {NAMES[self.gradient]}")
        flags = [name.replace("_", " ") for name in self._fields[8:] if getattr(self, name)]
        size = f"{self.tokens} x {self.vocabulary}"
        return ", ".join([f"{self.kind or 'no teacher'} ({self.loss})", self.way, dtypes, size, self.layout, *flags])


def subject_of(op: RowOp, s: Tensor, t: Tensor | None) -> str | None:
    """The subject whose proof covers these logits. None: none does (float64, mixed dtypes, bfloat16 before sm_80)."""
    if (t is not None and t.dtype != s.dtype) or not covers(s):
        return None
    kind = None if op.kind is None or t is None else op.kind.name
    capped = op.student.softcap is not None or (kind is not None and op.teacher.softcap is not None)
    if capped:
        return f"{kind or _ONE_SIDE}{_CAPPED}"
    return CORE if kind in _CORE_KINDS else kind


def covers(x: Tensor) -> bool:
    """Whether proofs on the tensor's GPU have cases of its dtype."""
    if x.dtype == BF16:
        return torch.cuda.get_device_capability(x.device) >= WITH_BF16
    return x.dtype in NAMES


def cases(subject: str = CORE, capability: tuple[int, int] = (9, 0), quick: bool = False) -> list[Case]:
    """The cases of a subject on such a GPU; `quick`: few and small, in float32, for Triton's interpreter."""
    if subject not in SUBJECTS:
        raise ValueError(f"subject={subject!r} is not known; allowed: {', '.join(SUBJECTS)}")
    small, middle, large, tokens = (300, 300, 2100, 5) if quick else (300, 4099, 50257, 37)
    dtypes = [pair for pair in _DTYPES if capability >= WITH_BF16 or BF16 not in pair]
    dtypes = [(F32, F32)] if quick else dtypes
    capped = _CAPPED in subject
    found: list[Case] = []
    for number, (kind, loss) in enumerate(_runs(subject)):
        for logits, gradient in dtypes:
            alike = logits == gradient
            if not alike and loss not in _DTYPES[logits, gradient]:
                continue
            ways = {"split": middle, "fused": large} | ({"parts": large} if alike else {})
            for k, (way, vocabulary) in enumerate(ways.items(), 3 * number):  # flags go round, each at its own pace
                case = Case(kind, loss, way, logits, gradient, vocabulary, tokens, capped=capped)
                case = case._replace(layout=LAYOUTS[(k + k // 3) % 3] if alike else "aligned", masked=k % 2 == 0)
                case = case._replace(infinite=k % 5 < 2 and not capped, close=k % 7 < 2)  # a soft-cap makes -inf finite
                found.append(case._replace(in_place=alike and k // 2 % 2 == 0))
    if subject == CORE:
        for dtype in (logits for logits, gradient in dtypes if logits == gradient):
            found += [Case("reverse_kl", "plain", way, dtype, dtype, small, tokens) for way in ("split", "fused")]
            found += [Case(k, "fields", "split", dtype, dtype, middle, tokens, infinite=True) for k in ("jsd", None)]
            found.append(Case(None, "plain", "scale", dtype, dtype, large, 3))
    return found


def _runs(subject: str) -> list[tuple[str | None, str]]:
    """(kind, loss) of a subject: with and without tokens."""
    if subject == CORE:
        plain: list[tuple[str | None, str]] = [("reverse_kl", "plain"), ("jsd", "plain")]
        return [*plain, ("reverse_kl", "policy"), ("forward_kl", "kd"), (None, "nll")]
    kind = subject.removesuffix(_CAPPED)
    return [(None, "nll")] if kind == _ONE_SIDE else [(kind, "kd")]
