"""What each optimizer step of a phase trains on: forwards over data, or over rounds of the student's own samples.

    source = source_of(job, index, seed)      # OnData, OnMixture or OnPolicy, by the phase at that place of the hop
    for step in range(first, steps):
        micros = source.work(step)            # depends on the step's number and the weights alone

A step's sequences are the same however many processes share them out: see `deal` and `OnPolicy.mine`. They are cut into
forwards of little padding (mskd.packing), which depends on their lengths alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from mskd import checkpoint, objective
from mskd.data import Example, SequenceBatch, end_token_id, order
from mskd.draw import uniforms
from mskd.models import copy_as
from mskd.packing import cut, fill_rows
from mskd.phases import DistillmPhase, KdPhase, MinillmPhase, Mixed, MixedPhase, OnPolicyPhase, SeqkdPhase, SftPhase
from mskd.responses import Tick, answered
from mskd.rollout import Rollout, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mskd.hop import Job

Micro = tuple[SequenceBatch, Any]  # one forward: its sequences and their loss (an objective.Loss)
Ids = Sequence[int]


Supervised = SftPhase | KdPhase | SeqkdPhase


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
    """Steps of a gkd or distillm phase. A round: examples, of which the student answers its share anew."""

    def __init__(self, job: Job, phase: Mixed, seed: int, examples: Sequence[Example]) -> None:
        self.job, self.phase, self.seed, self.examples = job, phase, seed, examples
        self.shown = phase.kind[0]
        self.steps_per_round = phase.per_round // phase.batch_size
        self.sampler = Sampler(job, phase, seed)
        self.round: int | None = None
        self.sequences: dict[int, Example] = {}  # this process's, by their place in the round

    def work(self, step: int) -> list[Micro]:
        number, inside = divmod(step, self.steps_per_round)
        if self.round != number:
            self._begin(number, self._sample(number))
        places = range(inside * self.phase.batch_size, (inside + 1) * self.phase.batch_size)
        micros = supervised(self.job, self.phase, [self.sequences[i] for i in deal(places, self.job.accelerator)])
        if isinstance(self.phase, DistillmPhase):
            micros += plain_text(self.job, self.phase, step, self.seed)
        return micros

    def own(self, number: int) -> list[int]:
        """This process's places of a round that the student answers; random numbers belong to (seed, sequence)."""
        first = number * self.phase.per_round
        sequences = torch.arange(first, first + self.phase.per_round)
        u = uniforms(checkpoint.stream_seed(self.seed, "student_share"), sequences, torch.tensor(0)).tolist()
        return [i for i in lanes(self.job, self.phase) if u[i] < self.phase.student_share]

    def _examples(self, number: int) -> list[Example]:
        seed = checkpoint.stream_seed(self.seed, "prompts")
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
        self.sequences = {
            i: replace(examples[i], response_ids=answers.get(i, examples[i].response_ids))
            for i in lanes(self.job, self.phase)
        }
        self.round = number

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """The student's responses of a round that is under way."""
        if self.round is None or step % self.steps_per_round == 0:
            return {}
        responses = [self.sequences[i].response_ids for i in self.own(self.round)]
        tensors = {"ids": [t for r in responses for t in r], "lengths": [len(r) for r in responses]}
        return by_rank(self.job, {k: torch.tensor(v, dtype=torch.int64) for k, v in tensors.items()})

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        own = of_rank(self.job, tensors)
        if own:
            responses = [ids.tolist() for ids in own["ids"].split(own["lengths"].tolist())]
            self._begin(step // self.steps_per_round, responses)


class OnPolicy:
    """Steps of a minillm phase. A round: sample `rollouts` sequences, score them once, `ppo_epochs` over them."""

    shown = "reverse_kl"  # the statistic of the progress line

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
            seed = checkpoint.stream_seed(self.seed, "lane", number, lane)
            chosen.append(place[order(self.batches, epoch, seed)[batch] * self.phase.batch_size + lane])
        return chosen

    def _sample(self, number: int) -> Rollout:
        phase, mine = self.phase, self.mine()
        seed = checkpoint.stream_seed(self.seed, "prompts")
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
        self.job, self.phase, self.seed = job, phase, checkpoint.stream_seed(seed, "rollout")
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


class HiddenStates:
    """The teacher's hidden states at the response tokens of a round, by sequence, in the dtype that it computed.

    They stay on its device up to `budget` bytes; more lie in pinned host memory, from which a copy to a GPU does not
    wait. lengths: response tokens of every sequence.
    """

    def __init__(self, lengths: list[int], budget: int) -> None:
        self.lengths, self.budget = lengths, budget
        self.parts: Sequence[torch.Tensor] = ()

    def put(self, places: Sequence[int], hidden: torch.Tensor) -> None:
        """Keep the states [n, H] of the sequences at `places`."""
        if not self.parts:
            self.device = hidden.device
            self.parts = self._room(hidden).split(self.lengths)
        for i, part in zip(places, hidden.split([self.lengths[i] for i in places]), strict=True):
            self.parts[i].copy_(part, non_blocking=True)

    def get(self, places: Sequence[int]) -> torch.Tensor:
        """The states [n, H] of the sequences at `places`, on the teacher's device."""
        return torch.cat([self.parts[i].to(self.device, non_blocking=True) for i in places])

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        shape = sum(self.lengths), like.shape[1]
        if like.is_cuda and shape[0] * shape[1] * like.element_size() > self.budget:
            return torch.empty(shape, dtype=like.dtype, pin_memory=True)
        return like.new_empty(shape)


def filled(rollout: Rollout, parts: Sequence[Sequence[int]], scored: Sequence[Rollout]) -> Rollout:
    """The rollout with the log-probabilities that scoring gave to its parts, lists of its sequences."""
    back = torch.cat([rollout.token_indices(part) for part in parts]).argsort()
    names = ("mixture_logprobs", "teacher_logprobs")
    return replace(rollout, **{n: torch.cat([getattr(part, n) for part in scored])[back] for n in names})


def rollout_tensors(rollout: Rollout) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return {k: v.cpu() for k, v in values.items() if v is not None}


def by_rank(job: Job, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of every process by 'rank.name'."""
    parts = [tensors]
    if job.accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object([tensors])
    return {f"{rank}.{k}": v for rank, part in enumerate(parts) for k, v in part.items()}


def of_rank(job: Job, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This process's own tensors of what `by_rank` gave."""
    mine = f"{job.accelerator.process_index}."
    return {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}


def loss_options(job: Job) -> dict[str, Any]:
    return {"backend": job.config.run.backend, "chunk_bytes": job.config.train.loss_chunk_mb * 2**20}


def across(job: Job, values: torch.Tensor) -> torch.Tensor:
    """The sum over processes, on the device that the values came from."""
    return job.accelerator.reduce(values.to(job.accelerator.device), "sum").to(values.device)


def chunks(items: Sequence, size: int) -> list[list]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def stream(items: Sequence, batch: int, size: int, seed: int) -> list:
    """Batch number `batch` of an endless stream of epochs, each in an order of its own; no item is left out."""
    n, places = len(items), range(batch * size, (batch + 1) * size)
    orders = {p // n: order(n, p // n, seed) for p in (places[0], places[-1], *places[::n])}
    return [items[orders[p // n][p % n]] for p in places]


def deal(batch: Sequence, accelerator: Accelerator) -> list:
    """This process's share of a batch."""
    return list(batch[accelerator.process_index :: accelerator.num_processes])


def lanes(job: Job, phase: OnPolicyPhase) -> list[int]:
    """This process's sequences of a round: whole lanes, so that a sequence never changes its process.

    A lane is the set of sequences that may stand at one place of an optimizer batch; epochs permute within lanes.
    The batches of a step are then the same however many processes there are.
    """
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    return [i for i in range(phase.per_round) if i % phase.batch_size % world == rank]


def forwards(job: Job, lengths: Sequence[int], most: int) -> list[list[int]]:
    """Sequences of these lengths cut into forwards of at most `most`, as lists of places, longest first."""
    return cut(lengths, most, job.config.train.batching)


def lay_out(job: Job, prompts: Sequence[Ids], responses: Sequence[Ids]) -> SequenceBatch:
    """One forward over sequences: a row each, or several in a row where the configuration packs them."""
    rows = None
    if job.config.train.batching == "pack":
        flash = job.hardware.attention == "flash_attention_2"  # its kernel for sequences of any length takes one row
        rows = fill_rows([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], most=1 if flash else None)
    return SequenceBatch.from_sequences(prompts, responses, job.tokenizer.pad_token_id, rows=rows)


def supervised(job: Job, phase: Supervised | Mixed, examples: Sequence[Example]) -> list[Micro]:
    """Forwards over examples, each with the phase's loss; one pass of the teacher where the loss needs it."""
    micros = []
    parts = forwards(job, [len(e.prompt_ids) + len(e.response_ids) for e in examples], phase.micro_batch_size)
    with job.teacher.on_device() if job.teacher and not isinstance(phase, SftPhase | SeqkdPhase) else nullcontext():
        for part in parts:
            batch = lay_out(job, [examples[i].prompt_ids for i in part], [examples[i].response_ids for i in part])
            micros.append((batch, _loss(job, phase, batch)))
    return micros


def _loss(job: Job, phase: Supervised | Mixed, batch: SequenceBatch) -> objective.Loss:
    if isinstance(phase, SftPhase | SeqkdPhase):
        return objective.sft_loss(batch, **loss_options(job))
    assert job.teacher is not None
    hidden = job.teacher.hidden(batch.to(job.hardware.device))
    if isinstance(phase, KdPhase):
        return objective.kd_loss(batch, hidden, job.teacher.head, phase, **loss_options(job))
    return objective.divergence_loss(batch, hidden, job.teacher.head, phase, **loss_options(job))


def plain_text(job: Job, phase: MinillmPhase | DistillmPhase, step: int, seed: int) -> list[Micro]:
    """The plain-text term: as many blocks of the corpus as the batch has sequences; off without a corpus."""
    if not job.text or not phase.lm_weight:
        return []
    assert job.teacher is not None
    blocks = deal(stream(job.text, step, phase.batch_size, checkpoint.stream_seed(seed, "text")), job.accelerator)
    micros = []
    with job.teacher.on_device() if phase.kd_ratio else nullcontext():
        for part in forwards(job, [len(b) for b in blocks], phase.micro_batch_size):
            batch = lay_out(job, [blocks[i][:1] for i in part], [blocks[i][1:] for i in part])
            hidden = job.teacher.hidden(batch.to(job.hardware.device)) if phase.kd_ratio else None
            head = job.teacher.head if phase.kd_ratio else None
            micros.append((batch, objective.lm_loss(batch, hidden, head, phase, **loss_options(job))))
    return micros
