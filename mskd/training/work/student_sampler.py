"""Draws the student's responses of a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mskd.config.phases import (
    OnPolicyPhase,
)
from mskd.models import copy_as
from mskd.sampling.rollout import Rollout, sample
from mskd.store.hashes import stream_seed
from mskd.training.job import Job
from mskd.training.work.microbatches import (
    Ids,
)


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
            eos_id=job.ends,
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
