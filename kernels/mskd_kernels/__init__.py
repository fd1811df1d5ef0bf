"""Fused distillation losses from logits or from hidden states: six divergences, MiniLLM's token objective, kd, sft.

reverse_kl = KL(student || teacher). Every op has a closed-form CPU path, Triton kernels for CUDA and
`<op>_reference` in plain torch. This list is the public interface.
"""

from mskd_kernels._backend import backend_for, resolve_backend
from mskd_kernels.divergence import divergence, divergence_reference, reverse_kl, reverse_kl_reference
from mskd_kernels.linear import (
    linear_divergence,
    linear_divergence_reference,
    linear_minillm_loss,
    linear_minillm_loss_reference,
    linear_reverse_kl,
    linear_reverse_kl_reference,
)
from mskd_kernels.logprobs import linear_logprobs, linear_logprobs_reference
from mskd_kernels.minillm import MiniLLMLoss, minillm_loss, minillm_loss_reference
from mskd_kernels.proof.first_use import prove, state
from mskd_kernels.proof.kept import Proof
from mskd_kernels.sparse import sparse_divergence
from mskd_kernels.supervised import (
    KDLoss,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_kd_loss,
    linear_kd_loss_reference,
)

__all__ = [
    "KDLoss",
    "MiniLLMLoss",
    "Proof",
    "backend_for",
    "divergence",
    "divergence_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_divergence",
    "linear_divergence_reference",
    "linear_kd_loss",
    "linear_kd_loss_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "linear_minillm_loss",
    "linear_minillm_loss_reference",
    "linear_reverse_kl",
    "linear_reverse_kl_reference",
    "minillm_loss",
    "minillm_loss_reference",
    "prove",
    "resolve_backend",
    "reverse_kl",
    "reverse_kl_reference",
    "sparse_divergence",
    "state",
]
