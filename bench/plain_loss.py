"""The objective of a rollout written out plainly: what the sides of bench.train_step must agree with.

One sequence at a time, so nothing is padded; full logits; autograd. Everything is computed again from the two models:
log q_old(y) is the student's own, log p~(y) = log(alpha p(y) + (1 - alpha) q_old(y)). The terms are those of
objective.md for the released code, as bench/lmops.py takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from mskd.config.phases import MinillmPhase
from mskd.sampling.rollout import Rollout


def plain_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, rollout: Rollout, phase: MinillmPhase
) -> tuple[Tensor, Tensor]:
    """(policy gradient + single-step part, the single-step part KL(student || teacher)): means over the tokens."""
    policy, single = [], []
    for prompt, response in zip(rollout.prompts(), rollout.responses(), strict=True):
        ids = torch.tensor([prompt + response], device=student.device)
        y = ids[0, len(prompt) :, None]
        q = log_softmax(student(ids).logits[0, len(prompt) - 1 : -1].float() / phase.temperature, -1)
        with torch.no_grad():
            p = log_softmax(teacher(ids).logits[0, len(prompt) - 1 : -1].float() / phase.temperature, -1)
        single.append((q.exp() * (q - p)).sum(-1))
        policy.append(_policy(q.gather(-1, y)[:, 0], p.gather(-1, y)[:, 0], phase))
    reverse_kl = torch.cat(single).mean()
    return torch.cat(policy).mean() + reverse_kl, reverse_kl


def _policy(q: Tensor, p: Tensor, phase: MinillmPhase) -> Tensor:
    """The clipped policy term of one sequence [T] from log q(y) and log p(y) [T]."""
    old = q.detach()
    weights = q.new_ones(1) / (phase.mix_alpha * (p - old).exp() + 1 - phase.mix_alpha)
    rewards = (p - old) / phase.reward_scaling
    if phase.reward_clip:
        rewards = rewards.clamp(-phase.reward_clip, phase.reward_clip)
    T = len(q)
    later = torch.arange(T, device=q.device)[None] - torch.arange(T, device=q.device)[:, None]
    discounts = torch.where(later >= 0, phase.gamma ** later.clamp(min=0).to(q.dtype), 0)
    advantages = discounts @ rewards / torch.arange(T, 0, -1, device=q.device)
    ratio = (q - old).exp() * weights
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - phase.clip, 1 + phase.clip))
