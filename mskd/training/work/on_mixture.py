"""Steps on data of which the student answers a share anew: gkd, distillm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mskd.config.phases import (
    DistillmPhase,
    Mixed,
    resolve_steps,
)
from mskd.data.instructions import Example
from mskd.sampling.draw import uniforms
from mskd.store import checkpoint
from mskd.store.hashes import stream_seed
from mskd.training.job import Job
from mskd.training.work.adaptive_share import RisingShare
from mskd.training.work.data_parallel import by_rank, deal, gathered, lanes, of_rank, stream
from mskd.training.work.microbatches import (
    Ids,
    Micro,
    plain_text,
    supervised,
)
from mskd.training.work.replay import ReplayBuffer
from mskd.training.work.student_sampler import Sampler


class OnMixture:
    """Steps of a gkd or distillm phase. A round: examples, of which the student answers its share anew.

    With `replay` part of that share is responses that it gave in earlier rounds, with their prompts.
    """

    def __init__(self, job: Job, phase: Mixed, seed: int, examples: Sequence[Example]) -> None:
        self.job, self.phase, self.seed, self.examples = job, phase, seed, examples
        self.shown = phase.kind[0]
        self.steps_per_round = phase.steps_per_round
        self.sampler = Sampler(job, phase, seed)
        rule, steps = phase.adaptive_share, resolve_steps(phase, len(job.data.train))
        self.share = None if rule is None else RisingShare(rule, phase.student_share)
        self.replay = None if phase.replay is None else ReplayBuffer(phase.replay, steps, seed)
        self.round: int | None = None
        self.sequences: dict[int, Example] = {}  # this process's, by their place in the round

    @property
    def student_share(self) -> float:
        """The share in force; it changes between rounds only."""
        return self.phase.student_share if self.share is None else self.share.value

    def work(self, step: int) -> list[Micro]:
        number, inside = divmod(step, self.steps_per_round)
        if self.round != number:
            self._begin(number, self._sample(number))
        places = range(inside * self.phase.batch_size, (inside + 1) * self.phase.batch_size)
        micros = supervised(self.job, self.phase, [self.sequences[i] for i in deal(places, self.job.accelerator)])
        if isinstance(self.phase, DistillmPhase):
            micros += plain_text(self.job, self.phase, step, self.seed)
        if self.replay is not None and inside == self.steps_per_round - 1:
            new = gathered(self.job, [(i, self.sequences[i]) for i in self.own(number)])
            self.replay.put([example for _, example in sorted(new, key=lambda pair: pair[0])])
        return micros

    def own(self, number: int) -> list[int]:
        """This process's places of a round that the student answers anew."""
        u = self._uniforms(number)
        return [i for i in lanes(self.job, self.phase) if u[i] < self._fresh(number, i)]

    def _uniforms(self, number: int) -> list[float]:
        """A number for each place of a round, which decides whose response it gets: it belongs to (seed, sequence)."""
        first = number * self.phase.per_round
        sequences = torch.arange(first, first + self.phase.per_round)
        return uniforms(stream_seed(self.seed, "student_share"), sequences, torch.tensor(0)).tolist()

    def _fresh(self, number: int, place: int) -> float:
        """Probability that the student answers a place of a round anew."""
        step = number * self.steps_per_round + place // self.phase.batch_size
        return self.student_share * (1.0 if self.replay is None else self.replay.fresh(step))

    def _repeated(self, number: int) -> dict[int, Example]:
        """What stands at the places of a round, those of all processes, that repeat a response of the student."""
        if self.replay is None:
            return {}
        u = self._uniforms(number)
        places = [i for i in range(self.phase.per_round) if self._fresh(number, i) <= u[i] < self.student_share]
        return self.replay.draw(number, places)

    def _examples(self, number: int) -> list[Example]:
        seed = stream_seed(self.seed, "prompts")
        return stream(self.examples, number, self.phase.per_round, seed)

    def _sample(self, number: int) -> list[list[int]]:
        """The student's responses at its places of a round."""
        own, examples = self.own(number), self._examples(number)
        if not own:
            return []
        ids = [number * self.phase.per_round + i for i in own]
        prompts = [examples[i].prompt_ids for i in own]
        return self.sampler(prompts, ids, temperature=self.phase.sampling_temperature).responses()

    def _begin(self, number: int, responses: Sequence[Ids]) -> None:
        examples, answers = self._examples(number), dict(zip(self.own(number), map(tuple, responses), strict=True))
        repeated = self._repeated(number)
        self.sequences = {
            i: repeated.get(i) or replace(examples[i], response_ids=answers.get(i, examples[i].response_ids))
            for i in lanes(self.job, self.phase)
        }
        self.round = number

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """The student's responses of a round that is under way; the share and the buffer where they change."""
        kept = [part.state() for part in (self.share, self.replay) if part is not None]
        tensors = {name: tensor for part in kept for name, tensor in part.items()}
        if self.round is None or step % self.steps_per_round == 0:
            return tensors
        responses = [self.sequences[i].response_ids for i in self.own(self.round)]
        return tensors | by_rank(self.job, checkpoint.pack_sequences(responses))

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        for part in (self.share, self.replay):
            if part is not None:
                part.restore(tensors)
        own = of_rank(self.job, tensors)
        if own:
            self._begin(step // self.steps_per_round, checkpoint.unpack_sequences(own))
