"""The kinds of divergence: each one's definition, its terms in torch and in Triton, and what its number may be.

resolve_kind("jsd", 0.3)          # a row of DIVERGENCES with its number in place
"""

import math
from typing import Any

import torch
from torch import Tensor

from mskd_kernels._inputs import number
from mskd_kernels._row_op import Divergence

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # no Triton on this system: its terms are then never called
    tl = None

    def jit(function: Any) -> Any:  # type: ignore[no-redef]
        return function


# The kinds ------------------------------------------------------------------------------------------------------------
# lq = log q (student), lp = log p (teacher), r = p / q. Each kind: definition, terms in torch, terms in Triton. Near
# q = p first-order terms cancel, so that the value is made of log1p and expm1 of lp - lq, and terms are added whose sum
# over v is 0 (a multiple of q - p: each element is then positive by itself).

_FAR = 80.0  # beyond, a ratio of masses is cut off: the smaller is less than 1e-34 of the larger


def _reverse_kl_reference(lq: Tensor, lp: Tensor, beta: None) -> Tensor:
    return lq.exp() * (lq - lp)


def _reverse_kl(lq: Tensor, lp: Tensor, q: Tensor, beta: None) -> tuple[Tensor, Tensor]:
    f = (lq - lp).mul_(q)
    return f, f


@jit
def _reverse_kl_triton(lq, lp, q, p, beta):
    f = q * (lq - lp)
    return f, f


def _forward_kl_reference(lq: Tensor, lp: Tensor, beta: None) -> Tensor:
    return lp.exp() * (lp - lq)


def _forward_kl(lq: Tensor, lp: Tensor, q: Tensor, beta: None) -> tuple[Tensor, Tensor]:
    p = lp.exp()
    return (lp - lq).mul_(p), q - p


@jit
def _forward_kl_triton(lq, lp, q, p, beta):
    return p * (lp - lq), q - p


def _log_mixture(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q), 0 < beta < 1."""
    return torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))


def _jsd_reference(lq: Tensor, lp: Tensor, beta: float) -> Tensor:
    lm = _log_mixture(lp, lq, beta)
    return beta * lp.exp() * (lp - lm) + (1 - beta) * lq.exp() * (lq - lm)


def _jsd(lq: Tensor, lp: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    d = (lp - lq).clamp_(-_FAR, _FAR)
    g = d.expm1().mul_(beta).log1p_()  # log(m / q)
    w = (g * q).mul_(beta - 1)
    return d.sub_(g).mul_(lp.exp()).mul_(beta).add_(w), w


@jit
def _jsd_triton(lq, lp, q, p, beta):
    d = _clamped(lp - lq)
    g = _log1p(beta * _expm1(d))
    w = (beta - 1.0) * q * g
    return beta * p * (d - g) + w, w


def _skew_kl_reference(lq: Tensor, lp: Tensor, beta: float) -> Tensor:
    return lp.exp() * (lp - _log_mixture(lp, lq, beta))


def _skew_kl(lq: Tensor, lp: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, d = lp.exp(), (lp - lq).clamp_(-_FAR, _FAR)
    e = d.expm1()
    y = e * beta  # m / q = 1 + y
    f = d.sub_(y.log1p()).mul_(p).add_(q - p, alpha=1 - beta)
    return f, e.div_(y.add_(1)).mul_(q).mul_(-((1 - beta) ** 2))


@jit
def _skew_kl_triton(lq, lp, q, p, beta):
    d = _clamped(lp - lq)
    e = _expm1(d)
    y = beta * e
    f = p * (d - _log1p(y)) + (1.0 - beta) * (q - p)
    return f, -(1.0 - beta) * (1.0 - beta) * q * (e / (1.0 + y))


def _skew_reverse_kl_reference(lq: Tensor, lp: Tensor, beta: float) -> Tensor:
    return lq.exp() * (lq - _log_mixture(lq, lp, beta))


def _skew_reverse_kl(lq: Tensor, lp: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    d = (lq - lp).clamp_(-_FAR, _FAR)
    e = d.expm1()
    y = e * beta  # m / p = 1 + y
    u = d.sub_(y.log1p()).mul_(q)  # q log(q / m)
    w = e.div_(y.add_(1)).mul_(q).mul_(-beta * (1 - beta)).add_(u)
    return u.add_(lp.exp().sub_(q), alpha=1 - beta), w


@jit
def _skew_reverse_kl_triton(lq, lp, q, p, beta):
    d = _clamped(lq - lp)
    e = _expm1(d)
    y = beta * e
    u = q * (d - _log1p(y))
    return u + (1.0 - beta) * (p - q), u - beta * (1.0 - beta) * q * (e / (1.0 + y))


def _tvd_reference(lq: Tensor, lp: Tensor, beta: None) -> Tensor:
    return (lq.exp() - lp.exp()).abs() / 2


def _tvd(lq: Tensor, lp: Tensor, q: Tensor, beta: None) -> tuple[Tensor, Tensor]:
    difference = q - lp.exp()
    return difference.abs().div_(2), (lq - lp).sign_().mul_(q).div_(2)


@jit
def _tvd_triton(lq, lp, q, p, beta):
    sign = tl.where(lq > lp, 1.0, 0.0) - tl.where(lq < lp, 1.0, 0.0)
    return tl.abs(q - p) * 0.5, q * sign * 0.5


@jit
def _clamped(d):
    return tl.minimum(tl.maximum(d, -80.0), 80.0)


@jit
def _expm1(x):
    """Kahan's form near 0, where the error of exp cancels. Triton has none that the interpreter knows."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))
    return tl.where(tl.abs(x) < 0.5, near, u - 1.0)


@jit
def _log1p(x):
    """x > -1; the rounding of 1 + x cancels (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


_ROWS = (
    Divergence(
        "reverse_kl",
        "KL(q || p): MiniLLM, Gu et al. 2024",
        _reverse_kl_reference,
        _reverse_kl,
        _reverse_kl_triton,
        expectation="student",
    ),
    Divergence(
        "forward_kl",
        "KL(p || q): Hinton et al. 2015",
        _forward_kl_reference,
        _forward_kl,
        _forward_kl_triton,
        expectation="teacher",
    ),
    Divergence(
        "jsd",
        "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: GKD, Agarwal et al. 2024",
        _jsd_reference,
        _jsd,
        _jsd_triton,
        beta=0.5,
    ),
    Divergence(
        "skew_kl",
        "KL(p || beta p + (1 - beta) q): DistiLLM, Ko et al. 2024",
        _skew_kl_reference,
        _skew_kl,
        _skew_kl_triton,
        beta=0.1,
        at_zero="forward_kl",
    ),
    Divergence(
        "skew_reverse_kl",
        "KL(q || (1 - beta) p + beta q): DistiLLM, Ko et al. 2024",
        _skew_reverse_kl_reference,
        _skew_reverse_kl,
        _skew_reverse_kl_triton,
        beta=0.1,
        at_zero="reverse_kl",
    ),
    Divergence("tvd", "sum |q - p| / 2: f-distill, Wen et al. 2023", _tvd_reference, _tvd, _tvd_triton),
)
DIVERGENCES = {row.name: row for row in _ROWS}


def resolve_kind(kind: str, beta: float | None = None) -> Divergence:
    """The kind with its number in place (None: its default). ValueError for what is not known or out of range."""
    if kind not in DIVERGENCES:
        raise ValueError(f"kind={kind!r} is not known; allowed: {', '.join(DIVERGENCES)}")
    row = DIVERGENCES[kind]
    if beta is None:
        return row
    if row.beta is None:
        having = ", ".join(name for name, other in DIVERGENCES.items() if other.beta is not None)
        raise ValueError(f"kind={kind!r} takes no beta, got {beta}; those that do: {having}")
    share = number("beta", beta)
    if not (0 < share < 1 or (share == 0 and row.at_zero)):
        lowest = "0 <=" if row.at_zero else "0 <"
        ends = "" if row.at_zero else "; the ends are kind='forward_kl' (what GKD means by 0) and 'reverse_kl' (by 1)"
        raise ValueError(f"kind={kind!r} takes a number {lowest} beta < 1, got {beta}{ends}")
    return DIVERGENCES[row.at_zero] if share == 0 and row.at_zero else row._replace(beta=share)
