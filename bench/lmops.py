"""One round of MiniLLM's training in the order of work of its authors' scripts: `schedule=lmops` of bench.train_step.

Written anew from what github.com/microsoft/LMOps, folder minillm, does (sampler.py, reward.py, losses.py, trainer.py,
storages.py, pipelines.py and its patched transformers, read in November 2026); no code is theirs. What each point
stands for, by the number that the code names:

 1  A chunk of prompts is left-padded to the longest prompt that is allowed, not to the longest one in the chunk.
 2  `generate` samples from alpha p + (1 - alpha) q: each token costs a step of the student and a step of the teacher,
    which has a cache of its own. All rows go on until the last one has ended.
 3  The scores [B, T, V] of every token are kept, for a mask of their infinities [B, T, V] that only top-p and top-k
    fill. The mask stays in the rollout store and every later pass over the logits applies it.
 4  A second generation, from the student alone, serves one logged number (the reverse KL on the student's samples),
    with a teacher's and a student's pass over it.
 5  Responses are padded to the longest that is allowed; all passes from here on compute every position of it.
 6  Rewards are log p(y) from the teacher's full logits [B, P + T, V], shifted by their mean and zeroed at padding.
 7  log q(y) of the student that sampled is not kept while sampling: it comes from a pass of full logits; then log p(y)
    for the mixture from a second teacher's pass, then log q_old(y) from a second student's pass over the same weights.
 8  Each step runs the teacher again over its batch, in every PPO epoch.
 9  The loss takes full logits at every position: log-softmax for log q(y), then softmax and log-softmax for the cross
    entropy toward the teacher and once more for the student's entropy; their difference is the single-step reverse KL.
10  Returns are summed position by position in every step, and four numbers of every step go to the host for the log.

Left out, in favour of the scripts: checks that visit each log-probability from Python; the prefill of the teacher takes
the last position's logits only, as today's `generate` does, where theirs took all. Different by need: transformers of
today (theirs is a patched 4.x), accelerate instead of DeepSpeed, the end of answers (lengths.py), no whitening
(theirs is over the padding too) and no plain-text batch: both sides of the benchmark go without.

B sequences of a chunk or batch, P prompt positions, T response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad, softmax
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bench.round_case import Case
from mskd.config.phases import MinillmPhase
from mskd.sampling.rollout import Rollout


@dataclass
class Store:
    """The rollouts of a round as training reads them, all of one width."""

    queries: Tensor  # [B, P] int64, padded on the left
    responses: Tensor  # [B, T] int64, padded on the right
    cut: Tensor  # [B, T, V] bool: infinite scores
    old: Tensor  # [B, T]: log q_old(y)
    rewards: Tensor  # [B, T]
    weights: Tensor  # [B, T]: q_old(y) / p~(y)

    def rows(self, chosen: Tensor) -> Store:
        return Store(*(getattr(self, f.name)[chosen] for f in fields(self)))


class Mixed(LogitsProcessor):
    """Scores of the student -> log of the mixture's probabilities; the teacher decodes beside it with its own cache."""

    def __init__(self, teacher: PreTrainedModel, mask: Tensor, alpha: float) -> None:
        self.teacher, self.mask, self.alpha = teacher, mask, alpha
        self.cache = DynamicCache(config=teacher.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        past = self.cache.get_seq_length()
        new = input_ids[:, past:]
        self.mask = pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        out = self.teacher(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=_positions(self.mask)[:, past:],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        probabilities = (1 - self.alpha) * softmax(scores.float(), -1)
        return (probabilities + self.alpha * softmax(out.logits[:, -1].float(), -1)).log()


class Lmops:
    """A round: `sample` the prompts, then the `loss` of each batch, epoch by epoch."""

    def __init__(self, case: Case, phase: MinillmPhase) -> None:
        if phase.whiten or phase.weight_single_step or not phase.clip_weighted_ratio:
            raise ValueError("this loss has a clipped weighted ratio, no weight on the single-step part, no whitening")
        self.student, self.teacher, self.phase = case.student, case.teacher, phase
        self.answers, self.accelerator, self.parts = case.answers, case.accelerator, case.parts
        self.P, self.T = case.size.prompts[1], case.size.answers[1]
        self.device = case.hardware.device
        self.logged: dict[str, float] = {}

    # -- a round ----------------------------------------------------------------------------------

    def run(self, prompts: Sequence[Sequence[int]]) -> None:
        """Sample, then every epoch over the store; leaves the student trained."""
        phase, parts = self.phase, self.parts
        store = self.sample(prompts)
        parameters = list(self.student.parameters())
        optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                parameters, lr=phase.lr, betas=phase.betas, eps=phase.eps, weight_decay=phase.weight_decay
            )
        )
        shuffle = torch.Generator().manual_seed(0)
        for _ in range(phase.ppo_epochs):
            for rows in torch.randperm(len(prompts), generator=shuffle).split(phase.batch_size):
                with parts("loss"):
                    self.accelerator.backward(self.loss(store.rows(rows)))
                with parts("optimizer"):
                    self.accelerator.clip_grad_norm_(parameters, phase.grad_clip)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]]) -> Store:
        self.student.eval()
        size = self.phase.rollout_batch_size
        chunks = [self._chunk(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return Store(*(torch.cat([getattr(c, f.name) for c in chunks]) for f in fields(Store)))

    def _chunk(self, prompts: Sequence[Sequence[int]]) -> Store:
        queries = self.left_pad(prompts)  # 1
        with self.parts("rollout"):
            responses, cut = self._generate(prompts, queries, mixed=True)  # 2, 3
        with self.parts("second rollout"):
            self._log_reverse_kl(prompts, queries)  # 4
        return self.score(queries, responses, cut)

    @torch.no_grad()
    def score(self, queries: Tensor, responses: Tensor, cut: Tensor) -> Store:
        """Rewards and weights of sampled responses."""
        phase, parts = self.phase, self.parts
        with parts("teacher"):
            rewards = self._teacher_logprobs(queries, responses)  # 6
        with parts("scoring"):
            student = self._logprobs(self.student, queries, responses, cut)  # 7
        with parts("teacher"):
            teacher = self._logprobs(self.teacher, queries, responses, cut)
        with parts("scoring"):
            old = self._logprobs(self.student, queries, responses, cut)
            mixture = ((1 - phase.mix_alpha) * student.exp() + phase.mix_alpha * teacher.exp()).log()
            rewards = (rewards - old) / phase.reward_scaling
            if phase.reward_clip:
                rewards = rewards.clamp(-phase.reward_clip, phase.reward_clip)
            return Store(queries, responses, cut, old, rewards, (old - mixture).exp())

    def store(self, rollout: Rollout) -> Store:
        """Given sequences, sampled by somebody else, scored the scripts' way."""
        queries = self.left_pad(rollout.prompts())
        rows = [r + [self.answers.end] * (self.T - len(r)) for r in rollout.responses()]
        responses = torch.tensor(rows, device=self.device)
        cut = torch.zeros(*responses.shape, self.student.config.vocab_size, dtype=torch.bool, device=self.device)
        return self.score(queries, responses, cut)

    # -- sampling ---------------------------------------------------------------------------------

    def left_pad(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        rows = [[self.answers.end] * (self.P - len(p)) + list(p) for p in prompts]
        return torch.tensor(rows, device=self.device)

    def _generate(self, prompts: Sequence[Sequence[int]], queries: Tensor, *, mixed: bool) -> tuple[Tensor, Tensor]:
        """(responses [B, T], the infinities of their scores [B, T, V])."""
        mask, end = (queries != self.answers.end).long(), self.answers.end
        processors = self.answers.processors(prompts)
        if mixed:
            processors = LogitsProcessorList([Mixed(self.teacher, mask, self.phase.mix_alpha), *processors])
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.phase.temperature,
            top_p=self.phase.top_p,
            top_k=self.phase.top_k,
            max_new_tokens=self.T,
            eos_token_id=end,
            pad_token_id=end,
            output_scores=True,
            return_dict_in_generate=True,
        )
        with self.accelerator.autocast():
            out = self.student.generate(
                input_ids=queries, attention_mask=mask, generation_config=settings, logits_processor=processors
            )
        scores = torch.stack(out.scores, 1)
        missing = self.T - scores.shape[1]
        scores = torch.cat([scores, scores.new_zeros(len(scores), missing, scores.shape[2])], 1)
        return pad(out.sequences[:, self.P :], (0, missing), value=end), scores.isinf()  # 5

    def _log_reverse_kl(self, prompts: Sequence[Sequence[int]], queries: Tensor) -> None:
        """KL(student || teacher) by q/p - 1 - log(q/p)'s mean over the student's own samples."""
        responses, cut = self._generate(prompts, queries, mixed=False)
        mask = self._mask(queries, responses)
        teacher = self._teacher_logprobs(queries, responses)
        ratio = (teacher - self._logprobs(self.student, queries, responses, cut)) * mask
        self.logged["rev_kl"] = float((ratio.exp() - 1 - ratio).sum() / mask.sum())

    # -- passes over full logits ------------------------------------------------------------------

    def _logits(self, model: PreTrainedModel, queries: Tensor, responses: Tensor) -> Tensor:
        """[B, P + T, V] at every position, padding included."""
        ids = torch.cat([queries, responses], 1)
        mask = (ids != self.answers.end).long()
        with self.accelerator.autocast():
            return model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False).logits

    def _mask(self, queries: Tensor, responses: Tensor) -> Tensor:
        """[B, T], 1 where the token before is no padding: so the end token counts and the padding after it does not."""
        before = torch.cat([queries[:, -1:], responses[:, :-1]], 1)
        return (before != self.answers.end).float()

    def _teacher_logprobs(self, queries: Tensor, responses: Tensor) -> Tensor:
        """log p(y) [B, T], 0 at padding."""
        logits = self._logits(self.teacher, queries, responses).float()
        logits = logits - logits.mean(-1, keepdim=True)
        real = torch.cat([queries, responses], 1) != self.answers.end
        logits = (logits * real[..., None])[:, self.P - 1 : -1]
        chosen = logits.gather(-1, responses[..., None])[..., 0]
        return chosen - logits.logsumexp(-1) * self._mask(queries, responses)

    def _logprobs(self, model: PreTrainedModel, queries: Tensor, responses: Tensor, cut: Tensor) -> Tensor:
        """log-probabilities of the responses [B, T], 0 at padding."""
        return self._of_tokens(self._response_logits(model, queries, responses, cut), queries, responses, cut)

    def _response_logits(self, model: PreTrainedModel, queries: Tensor, responses: Tensor, cut: Tensor) -> Tensor:
        """[B, T, V]."""
        logits = self._logits(model, queries, responses).float() / self.phase.temperature
        return logits[:, self.P - 1 : -1].masked_fill(cut, -torch.inf)

    def _of_tokens(self, logits: Tensor, queries: Tensor, responses: Tensor, cut: Tensor) -> Tensor:
        logprobs = log_softmax(logits, -1).masked_fill(cut, -torch.inf)
        chosen = logprobs.gather(-1, responses[..., None])[..., 0]
        return chosen.masked_fill(self._mask(queries, responses) == 0, 0)

    # -- the loss of a batch ----------------------------------------------------------------------

    def loss(self, batch: Store) -> Tensor:
        """Clipped policy gradient plus single-step reverse KL = KL(student || teacher), means over valid tokens."""
        mask = self._mask(batch.queries, batch.responses)
        logits = self._response_logits(self.student, batch.queries, batch.responses, batch.cut)
        logprobs = self._of_tokens(logits, batch.queries, batch.responses, batch.cut)
        advantages = self._advantages(batch.rewards, mask)
        ratio = ((logprobs - batch.old) * mask).exp() * batch.weights
        clipped = ratio.clamp(1 - self.phase.clip, 1 + self.phase.clip)
        policy = (torch.max(-advantages * ratio, -advantages * clipped) * mask).sum() / mask.sum()
        self.logged["pg_loss"] = policy.item()
        with torch.no_grad(), self.parts("teacher"):
            teacher = self._response_logits(self.teacher, batch.queries, batch.responses, batch.cut)  # 8
        single = ((_cross_entropy(logits, teacher, batch.cut) - _entropy(logits, batch.cut)) * mask).sum() / mask.sum()
        total = policy + single
        self.logged |= {"reg_loss": single.item(), "rl_loss": total.item(), "reward": self._reward(batch, mask)}
        return total

    def _advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Discounted sum of the rewards from each position on, over the number of valid positions there (10)."""
        total, sums = torch.zeros_like(rewards[:, 0]), []
        for t in range(rewards.shape[1] - 1, -1, -1):
            total = rewards[:, t] + self.phase.gamma * total
            sums.append(total)
        left = mask.flip(1).cumsum(1).flip(1)
        return torch.stack(sums[::-1], 1) / left.clamp(min=1)

    @torch.no_grad()
    def _reward(self, batch: Store, mask: Tensor) -> float:
        """The mean discounted sum of the rewards, for the log: another loop over the positions."""
        total = torch.zeros_like(batch.rewards[:, 0])
        for t in range(batch.rewards.shape[1] - 1, -1, -1):
            total = batch.rewards[:, t] + self.phase.gamma * total
        return float((total / mask.sum(1)).mean())


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _cross_entropy(logits: Tensor, teacher: Tensor, cut: Tensor) -> Tensor:
    """-sum_v q(v) log p(v), [B, T] (9)."""
    infinite = logits.isinf() | teacher.isinf() | cut
    return -(softmax(logits, -1) * log_softmax(teacher, -1).masked_fill(infinite, 0)).sum(-1)


def _entropy(logits: Tensor, cut: Tensor) -> Tensor:
    """-sum_v q(v) log q(v), [B, T] (9)."""
    infinite = logits.isinf() | cut
    return -(softmax(logits, -1) * log_softmax(logits, -1).masked_fill(infinite, 0)).sum(-1)
