"""One training step of TRL's DistillationTrainer (1.16: `trl.DistillationTrainer`), for bench.train_step.

    trl = TrlStep(case, phase, folder)
    trl.step(prompts)                   # sample, loss, backward, clip, AdamW
    trl.reverse_kl(rollout)             # its loss of given sequences

The trainer is TRL's own, with its defaults but for: no gradient checkpointing, no dropout, no logs; the precision,
batch, learning rate, AdamW's numbers and clip of the phase; beta is its default 1, the reverse KL. A step is
`training_step`, which samples with transformers' generate, then the clip, `optimizer.step` and `zero_grad` that
Trainer's loop calls. Prompts go in as text of one word a token. The data loader and the callbacks of `train()` are not
in the figure. On a CPU its loss projects padding too (it says so: shapes stay the same); on a GPU it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.round_case import Case
from mskd.config.phases import MinillmPhase
from mskd.sampling.rollout import Rollout


class TrlStep:
    """TRL's trainer around a case's student and teacher."""

    def __init__(self, case: Case, phase: MinillmPhase, folder: Path) -> None:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        self.answers, self.parts, hardware = case.answers, case.parts, case.hardware
        settings = DistillationConfig(
            output_dir=str(folder),
            per_device_train_batch_size=phase.batch_size,
            max_completion_length=phase.max_new_tokens,
            temperature=phase.temperature,
            beta=1.0,
            learning_rate=phase.lr,
            weight_decay=phase.weight_decay,
            adam_beta1=phase.betas[0],
            adam_beta2=phase.betas[1],
            adam_epsilon=phase.eps,
            max_grad_norm=phase.grad_clip,
            gradient_checkpointing=False,
            disable_dropout=True,
            bf16=hardware.mixed_precision == "bf16",
            fp16=hardware.mixed_precision == "fp16",
            use_cpu=hardware.device.type == "cpu",
            report_to="none",
        )
        self.trainer = DistillationTrainer(
            model=case.student,
            teacher_model=case.teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": [_text(p) for p in case.prompts]}),
            processing_class=_tokenizer(case.student.config.vocab_size),
        )
        self._split()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        accelerator = self.trainer.accelerator
        self.trainer.model_wrapped, self.trainer.optimizer = accelerator.prepare(case.student, self.trainer.optimizer)

    def _split(self) -> None:
        """Credit its parts: what is neither rollout nor teacher is loss."""
        trainer, parts = self.trainer, self.parts
        trainer._generate = parts.timed("rollout", trainer._generate)
        hidden = trainer._get_last_hidden_state

        def timed(model: Any, *arguments: Any, **options: Any) -> Any:
            with parts("teacher" if model is trainer.accelerator.unwrap_model(trainer.teacher_model) else "loss"):
                return hidden(model, *arguments, **options)

        trainer._get_last_hidden_state = timed

    def step(self, prompts: Sequence[Sequence[int]]) -> None:
        """One optimizer step on fresh samples of these prompts, as many as the phase's batch."""
        trainer, student = self.trainer, self.trainer.model
        student.generate = functools.partial(
            type(student).generate, student, logits_processor=self.answers.processors(prompts)
        )
        with self.parts("loss"):
            trainer.training_step(student, [{"prompt": _text(p)} for p in prompts], None)
        with self.parts("optimizer"):
            trainer.accelerator.clip_grad_norm_(student.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            student.zero_grad()

    def reverse_kl(self, rollout: Rollout) -> torch.Tensor:
        """Its loss of a rollout's sequences, ready for backward: the mean KL(student || teacher) of their tokens."""
        device, end = self.trainer.accelerator.device, self.answers.end
        prompts, responses = rollout.prompts(), rollout.responses()
        P, T = max(map(len, prompts)), max(map(len, responses))
        inputs = {
            "prompt_ids": [[end] * (P - len(p)) + p for p in prompts],
            "prompt_mask": [[0] * (P - len(p)) + [1] * len(p) for p in prompts],
            "completion_ids": [r + [end] * (T - len(r)) for r in responses],
            "completion_mask": [[1] * len(r) + [0] * (T - len(r)) for r in responses],
        }
        batch = {name: torch.tensor(rows, device=device) for name, rows in inputs.items()}
        return self.trainer.compute_loss(self.trainer.model, batch)


def _text(prompt: Sequence[int]) -> str:
    return " ".join(map(str, prompt))


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each token: its number; the last one ends and pads."""
    core = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = str(vocabulary - 1)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end, unk_token="0")
