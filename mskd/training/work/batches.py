"""What each optimizer step of a phase trains on: forwards over data, or over rounds of the student's own samples.

    source = source_of(job, index, seed)      # OnData, OnMixture or OnPolicy, by the phase at that place of the hop
    for step in range(first, steps):
        micros = source.work(step)            # depends on the step's number, the weights and source.state()

A step's sequences are the same however many processes share them out (data_parallel.py); microbatches.py cuts them into
forwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from mskd.config.phases import (
    DistillmPhase,
    KdPhase,
    MinillmPhase,
    Mixed,
    MixedPhase,
    OnPolicyPhase,
    SftPhase,
    resolve_steps,
)
from mskd.data.instructions import Example, end_token_id, order
from mskd.models import copy_as
from mskd.sampling.draw import uniforms
from mskd.sampling.rollout import Rollout, sample
from mskd.store import checkpoint
from mskd.store.hashes import stream_seed
from mskd.training import objective
from mskd.training.tracking import Tick
from mskd.training.work.adaptive_share import RisingShare
from mskd.training.work.data_parallel import across, by_rank, deal, gathered, lanes, of_rank, stream
from mskd.training.work.microbatches import (
    Ids,
    Micro,
    Supervised,
    forwards,
    lay_out,
    loss_options,
    plain_text,
    supervised,
)
from mskd.training.work.replay import ReplayBuffer
from mskd.training.work.teacher_cache import HiddenStates
from mskd.training.work.teacher_responses import answered

if TYPE_CHECKING:
    from mskd.training.hop import Job


def source_of(job: Job, index: int, seed: int, tick: Tick = lambda done, all_: None) -> Any:
    """The source of the phase at place `index` of the hop; where the teacher answers the prompts, it does so here."""
    phase = job.phases[index]
    if isinstance(phase, MinillmPhase):
        return OnPolicy(job, phase, seed)
    asked = None if isinstance(phase, SftPhase) else phase.teacher_responses
    examples = job.data.train if asked is None else answered(job, asked, index=index, seed=seed, tick=tick)
    if isinstance(phase, MixedPhase):
        return OnMixture(job, phase, seed, examples)
    return OnData(job, phase, seed, examples)


class OnData:
    """Steps of an sft, kd or seqkd phase: examples (default: those of the data) in an order drawn anew each epoch."""

    share: RisingShare | None = None

    def __init__(self, job: Job, phase: Supervised, seed: int, examples: Sequence[Example] | None = None) -> None:
        self.job, self.phase, self.seed = job, phase, seed
        self.examples = job.data.train if examples is None else examples
        self.shown = "forward_kl" if isinstance(phase, KdPhase) else "nll"

    def work(self, step: int) -> list[Micro]:
        """This process's forwards of one optimizer step."""
        examples = deal(stream(self.examples, step, self.phase.batch_size, self.seed), self.job.accelerator)
        return supervised(self.job, self.phase, examples)

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Nothing: a step depends on its number and the weights alone."""
        return {}

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""


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


class Sampler:
    """Draws the student's responses: on a CPU from itself, on a GPU from a 16-bit copy at fixed addresses."""

    def __init__(self, job: Job, phase: OnPolicyPhase, seed: int) -> None:
        self.job, self.phase, self.seed = job, phase, stream_seed(seed, "rollout")
        self.copy: Any = None

    def __call__(
        self, prompts: Sequence[Ids], ids: Sequence[int], *, temperature: float, mix_alpha: float = 0.0
    ) -> Rollout:
        """One response to each prompt, mix_alpha of the teacher in the mixture; ids own the random numbers."""
        job, phase = self.job, self.phase
        model = self._model()
        model.eval()
        return sample(
            model,
            job.teacher,
            prompts,
            eos_id=end_token_id(job.tokenizer, job.config.data.template),
            pad_id=job.tokenizer.pad_token_id,
            max_new_tokens=phase.max_new_tokens,
            mix_alpha=mix_alpha,
            temperature=temperature,
            top_p=phase.top_p,
            top_k=phase.top_k,
            batch_size=phase.rollout_batch_size,
            seed=self.seed,
            sequence_ids=ids,
            should_stop=job.stop if job.accelerator.num_processes == 1 else None,  # several stop at a step, together
        )

    def _model(self) -> Any:
        """The student as it is now."""
        model = self.job.student
        if self.job.hardware.teacher_dtype == torch.float32:
            return model
        if self.copy is None:
            self.copy = copy_as(model, self.job.hardware.teacher_dtype)
        with torch.no_grad():
            for mine, theirs in zip(self.copy.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
        return self.copy


def filled(rollout: Rollout, parts: Sequence[Sequence[int]], scored: Sequence[Rollout]) -> Rollout:
    """The rollout with the log-probabilities that scoring gave to its parts, lists of its sequences."""
    back = torch.cat([rollout.token_indices(part) for part in parts]).argsort()
    names = ("mixture_logprobs", "teacher_logprobs")
    return replace(rollout, **{n: torch.cat([getattr(part, n) for part in scored])[back] for n in names})


def rollout_tensors(rollout: Rollout) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return {k: v.cpu() for k, v in values.items() if v is not None}
