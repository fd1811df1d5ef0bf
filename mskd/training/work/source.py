"""What each optimizer step of a phase trains on: forwards over data, or over rounds of the student's own samples.

    source = source_of(job, index, seed)      # OnData, OnMixture or OnPolicy, by the phase at that place of the hop
    for step in range(first, steps):
        micros = source.work(step)            # depends on the step's number, the weights and source.state()

A step's sequences are the same however many processes share them out (data_parallel.py); microbatches.py cuts them into
forwards.
"""

from __future__ import annotations

from typing import Any

from mskd.config.phases import (
    MinillmPhase,
    MixedPhase,
    SftPhase,
)
from mskd.store.progress import Tick
from mskd.training.job import Job
from mskd.training.work.on_data import OnData
from mskd.training.work.on_mixture import OnMixture
from mskd.training.work.on_policy import OnPolicy
from mskd.training.work.teacher_responses import answered


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
