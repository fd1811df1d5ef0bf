"""Sequences of one optimizer step as forwards of little padding, each with its loss.

    micros = supervised(job, phase, examples)       # [(SequenceBatch, loss), ...]

They are cut by mskd.data.packing, which depends on their lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from mskd.config.phases import DistillmPhase, KdPhase, MinillmPhase, Mixed, SeqkdPhase, SftPhase
from mskd.data.instructions import Example
from mskd.data.packing import cut, fill_rows
from mskd.models.batch import SequenceBatch
from mskd.store.hashes import stream_seed
from mskd.training import objective
from mskd.training.job import Job
from mskd.training.work.data_parallel import deal, stream

Micro = tuple[SequenceBatch, Any]  # one forward: its sequences and their loss (an objective.Loss)
Ids = Sequence[int]
Supervised = SftPhase | KdPhase | SeqkdPhase


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
    blocks = deal(stream(job.text, step, phase.batch_size, stream_seed(seed, "text")), job.accelerator)
    micros = []
    with job.teacher.on_device() if phase.kd_ratio else nullcontext():
        for part in forwards(job, [len(b) for b in blocks], phase.micro_batch_size):
            batch = lay_out(job, [blocks[i][:1] for i in part], [blocks[i][1:] for i in part])
            hidden = job.teacher.hidden(batch.to(job.hardware.device)) if phase.kd_ratio else None
            head = job.teacher.head if phase.kd_ratio else None
            micros.append((batch, objective.lm_loss(batch, hidden, head, phase, **loss_options(job))))
    return micros


def loss_options(job: Job) -> dict[str, Any]:
    return {"backend": job.config.run.backend, "chunk_bytes": job.config.train.loss_chunk_mb * 2**20}
