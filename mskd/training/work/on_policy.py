"""Steps on rounds of the student's own samples, scored once by the teacher: minillm, lmops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from mskd.config.phases import (
    MinillmPhase,
)
from mskd.data.instructions import order
from mskd.sampling.rollout import Rollout
from mskd.store.hashes import stream_seed
from mskd.training import objective
from mskd.training.job import Job
from mskd.training.work.adaptive_share import RisingShare
from mskd.training.work.data_parallel import across, by_rank, lanes, of_rank, stream
from mskd.training.work.microbatches import (
    Micro,
    forwards,
    lay_out,
    loss_options,
    plain_text,
)
from mskd.training.work.student_sampler import Sampler
from mskd.training.work.teacher_cache import HiddenStates


class OnPolicy:
    """Steps of a minillm phase. A round: sample `rollouts` sequences, score them once, `ppo_epochs` over them."""

    shown = "reverse_kl"  # the statistic of the progress line
    share: RisingShare | None = None

    def __init__(self, job: Job, phase: MinillmPhase, seed: int) -> None:
        assert job.teacher is not None
        self.job, self.phase, self.seed, self.teacher = job, phase, seed, job.teacher
        self.batches = phase.rollouts // phase.batch_size
        self.steps_per_round = self.batches * phase.ppo_epochs
        self.sampler = Sampler(job, phase, seed)
        self.round: int | None = None
        self.rollout: Rollout

    def work(self, step: int) -> list[Micro]:
        number, inside = divmod(step, self.steps_per_round)
        if self.round != number:
            with self.teacher.on_device():
                self._score(number, self._sample(number))
        epoch, batch = divmod(inside, self.batches)
        chosen = self._batch(number, epoch, batch)
        parts = forwards(self.job, self.rollout.offsets.diff()[chosen].tolist(), self.phase.micro_batch_size)
        micros = [self._micro([chosen[i] for i in part]) for part in parts]
        return micros + plain_text(self.job, self.phase, step, self.seed)

    def mine(self) -> list[int]:
        """This process's sequences of a round."""
        return lanes(self.job, self.phase)

    def _batch(self, number: int, epoch: int, batch: int) -> list[int]:
        """Places in `self.rollout` of this process's share of one optimizer batch."""
        place = {sequence: i for i, sequence in enumerate(self.mine())}
        lanes = sorted({sequence % self.phase.batch_size for sequence in place})
        chosen = []
        for lane in lanes:
            seed = stream_seed(self.seed, "lane", number, lane)
            chosen.append(place[order(self.batches, epoch, seed)[batch] * self.phase.batch_size + lane])
        return chosen

    def _sample(self, number: int) -> Rollout:
        phase, mine = self.phase, self.mine()
        seed = stream_seed(self.seed, "prompts")
        examples = stream(self.job.data.train, number, phase.rollouts, seed)
        return self.sampler(
            [examples[i].prompt_ids for i in mine],
            [number * phase.rollouts + i for i in mine],
            temperature=phase.temperature,
            mix_alpha=phase.mix_alpha,
        )

    def _score(self, number: int, rollout: Rollout) -> None:
        """One pass of the frozen teacher: its hidden states serve p(y), rewards and every epoch of the round."""
        job, phase = self.job, self.phase
        parts = forwards(job, rollout.offsets.diff().tolist(), phase.rollout_batch_size)
        states = HiddenStates(rollout.response_lengths.tolist(), job.config.run.teacher_cache_mb * 2**20)
        scored = []
        with self.teacher.on_device():
            for part in parts:
                chosen = rollout.select(part)
                batch = lay_out(job, chosen.prompts(), chosen.responses())
                hidden = self.teacher.hidden(batch.to(job.hardware.device))
                states.put(part, hidden)
                if rollout.teacher_logprobs is None:
                    scored.append(objective.score(chosen, hidden, self.teacher.head, phase, **loss_options(job)))
        if scored:
            rollout = filled(rollout, parts, scored)
        self.teacher_hidden = states
        self.advantages = objective.advantages(rollout, phase, reduce=lambda t: across(job, t))
        self.rollout, self.round = rollout, number

    def _micro(self, places: list[int]) -> Micro:
        part = self.rollout.select(places)
        loss = objective.minillm_loss(
            part,
            self.advantages[self.rollout.token_indices(places)],
            self.teacher_hidden.get(places),
            self.teacher.head,
            self.phase,
            **loss_options(self.job),
        )
        return lay_out(self.job, part.prompts(), part.responses()), loss

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """The rollout of a round that is under way; the teacher's hidden states are made again from it."""
        if self.round is None or step % self.steps_per_round == 0:
            return {}
        return by_rank(self.job, rollout_tensors(self.rollout))

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        own: dict[str, Any] = of_rank(self.job, tensors)
        if own:
            self._score(step // self.steps_per_round, Rollout(**{"teacher_logprobs": None, **own}))


def filled(rollout: Rollout, parts: Sequence[Sequence[int]], scored: Sequence[Rollout]) -> Rollout:
    """The rollout with the log-probabilities that scoring gave to its parts, lists of its sequences."""
    back = torch.cat([rollout.token_indices(part) for part in parts]).argsort()
    names = ("mixture_logprobs", "teacher_logprobs")
    return replace(rollout, **{n: torch.cat([getattr(part, n) for part in scored])[back] for n in names})


def rollout_tensors(rollout: Rollout) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return {k: v.cpu() for k, v in values.items() if v is not None}
