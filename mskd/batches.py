"""What each optimizer step of a phase trains on: forwards over the data, or over rounds of the student's own samples.

    source = OnPolicy(job, phase, seed)
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
from mskd.config import KdPhase, MinillmPhase, SftPhase
from mskd.data import Example, SequenceBatch, end_token_id, order
from mskd.models import copy_as
from mskd.packing import cut, fill_rows
from mskd.rollout import Rollout, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mskd.hop import Job

Micro = tuple[SequenceBatch, Any]  # one forward: its sequences and their loss (an objective.Loss)
Ids = Sequence[int]


class OnData:
    """Steps of an sft or kd phase: sequences of the data, in an order drawn anew each epoch."""

    def __init__(self, job: Job, phase: SftPhase | KdPhase, seed: int) -> None:
        self.job, self.phase, self.seed = job, phase, seed
        self.shown = "nll" if isinstance(phase, SftPhase) else "forward_kl"

    def work(self, step: int) -> list[Micro]:
        """This process's forwards of one optimizer step."""
        examples = deal(stream(self.job.data.train, step, self.phase.batch_size, self.seed), self.job.accelerator)
        return supervised(self.job, self.phase, examples)

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Nothing: a step depends on its number and the weights alone."""
        return {}

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""


class OnPolicy:
    """Steps of a minillm phase. A round: sample `rollouts` sequences, score them once, `ppo_epochs` over them."""

    shown = "reverse_kl"  # the statistic of the progress line

    def __init__(self, job: Job, phase: MinillmPhase, seed: int) -> None:
        assert job.teacher is not None
        self.job, self.phase, self.seed, self.teacher = job, phase, seed, job.teacher
        self.batches = phase.rollouts // phase.batch_size
        self.steps_per_round = self.batches * phase.ppo_epochs
        self.round: int | None = None
        self.rollout: Rollout
        self.sampler: Any = None

    def work(self, step: int) -> list[Micro]:
        number, inside = divmod(step, self.steps_per_round)
        if self.round != number:
            with self.teacher.on_device():
                self._score(number, self._sample(number))
        epoch, batch = divmod(inside, self.batches)
        chosen = self._batch(number, epoch, batch)
        parts = forwards(self.job, self.rollout.offsets.diff()[chosen].tolist(), self.phase.micro_batch_size)
        return [self._micro([chosen[i] for i in part]) for part in parts] + self._text(step)

    def mine(self) -> list[int]:
        """This process's sequences of a round: whole lanes, so that a sequence never changes its process.

        A lane is the set of sequences that may stand at one place of an optimizer batch; epochs permute within lanes.
        The batches of a step are then the same however many processes there are.
        """
        rank, world = self.job.accelerator.process_index, self.job.accelerator.num_processes
        return [i for i in range(self.phase.rollouts) if i % self.phase.batch_size % world == rank]

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
        job, phase = self.job, self.phase
        examples = stream(job.data.train, number, phase.rollouts, checkpoint.stream_seed(self.seed, "prompts"))
        mine = self.mine()
        model = self._sampling_model()
        model.eval()
        rollout = sample(
            model,
            self.teacher,
            [examples[i].prompt_ids for i in mine],
            eos_id=end_token_id(job.tokenizer, job.config.data.template),
            pad_id=job.tokenizer.pad_token_id,
            max_new_tokens=phase.max_new_tokens,
            mix_alpha=phase.mix_alpha,
            temperature=phase.temperature,
            top_p=phase.top_p,
            top_k=phase.top_k,
            batch_size=phase.rollout_batch_size,
            seed=checkpoint.stream_seed(self.seed, "rollout"),
            sequence_ids=[number * phase.rollouts + i for i in mine],
            should_stop=job.stop if job.accelerator.num_processes == 1 else None,  # several stop at a step, together
        )
        return rollout

    def _sampling_model(self) -> Any:
        """The student itself on CPU; on a GPU a 16-bit copy at fixed addresses, refreshed each round."""
        model = self.job.student
        if self.job.hardware.teacher_dtype == torch.float32:
            return model
        if self.sampler is None:
            self.sampler = copy_as(model, self.job.hardware.teacher_dtype)
        with torch.no_grad():
            for mine, theirs in zip(self.sampler.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
        return self.sampler

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

    def _text(self, step: int) -> list[Micro]:
        """The plain-text term: as many blocks of the corpus as the batch has sequences; off without a corpus."""
        job, phase = self.job, self.phase
        if not job.text or not phase.lm_weight:
            return []
        blocks = deal(
            stream(job.text, step, phase.batch_size, checkpoint.stream_seed(self.seed, "text")), job.accelerator
        )
        micros = []
        with self.teacher.on_device() if phase.kd_ratio else nullcontext():
            for part in forwards(job, [len(b) for b in blocks], phase.micro_batch_size):
                batch = lay_out(job, [blocks[i][:1] for i in part], [blocks[i][1:] for i in part])
                hidden = self.teacher.hidden(batch.to(job.hardware.device)) if phase.kd_ratio else None
                head = self.teacher.head if phase.kd_ratio else None
                micros.append((batch, objective.lm_loss(batch, hidden, head, phase, **loss_options(job))))
        return micros

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """The rollout of a round that is under way; the teacher's hidden states are made again from it."""
        if self.round is None or step % self.steps_per_round == 0:
            return {}
        if self.job.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object([rollout_tensors(self.rollout)])
        else:
            parts = [rollout_tensors(self.rollout)]
        return {f"{rank}.{k}": v for rank, part in enumerate(parts) for k, v in part.items()}

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        mine = f"{self.job.accelerator.process_index}."
        own: dict[str, Any] = {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
        if own:
            self._score(step // self.steps_per_round, Rollout(**{"teacher_logprobs": None, **own}))


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


def deal(batch: list, accelerator: Accelerator) -> list:
    """This process's share of a batch."""
    return batch[accelerator.process_index :: accelerator.num_processes]


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


def supervised(job: Job, phase: SftPhase | KdPhase, examples: Sequence[Example]) -> list[Micro]:
    """Forwards over examples of the data."""
    micros = []
    parts = forwards(job, [len(e.prompt_ids) + len(e.response_ids) for e in examples], phase.micro_batch_size)
    with job.teacher.on_device() if isinstance(phase, KdPhase) and job.teacher else nullcontext():
        for part in parts:
            batch = lay_out(job, [examples[i].prompt_ids for i in part], [examples[i].response_ids for i in part])
            if isinstance(phase, KdPhase):
                assert job.teacher is not None
                hidden = job.teacher.hidden(batch.to(job.hardware.device))
                loss = objective.kd_loss(batch, hidden, job.teacher.head, phase, **loss_options(job))
            else:
                loss = objective.sft_loss(batch, **loss_options(job))
            micros.append((batch, loss))
    return micros
