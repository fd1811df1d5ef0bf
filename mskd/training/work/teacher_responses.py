"""The teacher's responses to the training prompts: sampled once for a phase, kept beside the node, never drawn again.

    examples = answered(job, phase.teacher_responses, index=0, seed=seed)

They lie in <node>/responses/<phase>-<part>.jsonl, a line a prompt, with the text for readers and the ids that are
trained on. A part is there whole or not at all: a run that was killed goes on with the first one that is missing, and
draws the same, since random numbers belong to (seed, prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mskd.config.phases import TeacherResponses
from mskd.data.instructions import Example
from mskd.sampling.draw import uniforms
from mskd.sampling.rollout import sample
from mskd.store.files import write_text
from mskd.store.hashes import stream_seed
from mskd.store.progress import Tick
from mskd.store.reading import Damaged, sealed_lines
from mskd.store.records import Response, read_lines
from mskd.training.job import Job

BATCHES = 8  # of the decoder in one part: what a kill can lose


def answered(
    job: Job, asked: TeacherResponses, *, index: int, seed: int, tick: Tick = lambda done, all_: None
) -> tuple[Example, ...]:
    """The training examples with the teacher's response in place of the data's, but for `asked.data_share` of them.

    index: the phase's place in the hop. Several processes share out the parts. One process raises Interrupted where a
    stop is asked for. Damaged where a part is not what was written.
    """
    examples, acc = job.data.train, job.accelerator
    folder = job.directory / "responses"
    parts = _parts(len(examples), BATCHES * asked.batch_size)
    files = [folder / f"{index}-{i:05d}.jsonl" for i in range(len(parts))]
    for i, (file, part) in enumerate(zip(files, parts, strict=True)):
        if i % acc.num_processes == acc.process_index and not file.exists():
            tick(part[0], len(examples))
            write_text(file, _sampled(job, asked, part, seed))
    acc.wait_for_everyone()
    responses = [ids for file, part in zip(files, parts, strict=True) for ids in _read(file, part)]
    return tuple(replace(e, response_ids=ids) for e, ids in zip(examples, responses, strict=True))


def _parts(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _sampled(job: Job, asked: TeacherResponses, part: Sequence[int], seed: int) -> str:
    """The lines of one part."""
    assert job.teacher is not None
    examples = job.data.train
    u = uniforms(stream_seed(seed, "data_share"), torch.tensor(part), torch.tensor(0))
    kept = {i for i, x in zip(part, u.tolist(), strict=True) if x < asked.data_share}
    drawn = [i for i in part if i not in kept]
    with job.teacher.on_device():
        rollout = sample(
            job.teacher,
            job.student,  # decodes nothing: its vocabulary bounds the teacher's
            [examples[i].prompt_ids for i in drawn],
            eos_id=job.ends,
            pad_id=job.tokenizer.pad_token_id,
            max_new_tokens=asked.max_new_tokens,
            mix_alpha=0.0,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            batch_size=asked.batch_size,
            seed=stream_seed(seed, "teacher_responses"),
            sequence_ids=drawn,
            should_stop=job.stop if job.accelerator.num_processes == 1 else None,
        )
    responses = dict(zip(drawn, rollout.responses(), strict=True))
    lines = []
    for i in part:
        ids = list(examples[i].response_ids) if i in kept else responses[i]
        text = job.tokenizer.decode(ids, skip_special_tokens=True)
        lines.append({"example": i, "by": "data" if i in kept else "teacher", "response": text, "ids": ids})
    return sealed_lines(lines)


def _read(file: Path, part: Sequence[int]) -> list[tuple[int, ...]]:
    rows, _ = read_lines(Response, file)
    if [row["example"] for row in rows] != list(part):
        raise Damaged(file, "it does not hold the responses to its prompts")
    return [tuple(row["ids"]) for row in rows]
