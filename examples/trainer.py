"""The fused loss in transformers' Trainer: `compute_loss` from hidden states, no [tokens, vocabulary] tensor.

    python examples/trainer.py                                # two tiny random models: seconds, nothing is fetched
    python examples/trainer.py --teacher BIG --student SMALL  # folders of any family that mskd knows
    torchrun --nproc-per-node 2 examples/trainer.py           # several processes: the same gradients

Labels are transformers' own: token ids, -100 where nothing counts. Gradient accumulation, mixed precision, logging,
saving and torch.compile are the Trainer's. Rows may come with an attention_mask or without one, or packed, with
position_ids (DataCollatorWithFlattening). The student may be a PEFT model whose adapters leave the lm_head alone. With
models of yours, give your dataset in place of `random_texts`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from mskd_kernels import linear_divergence
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel, Trainer, TrainingArguments

from mskd.models import Head, decoder_of, family_of, head_of, load_model


class DistillationTrainer(Trainer):
    """A Trainer whose loss is a divergence to a frozen teacher with the same tokens, the mean over labelled ones."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, kind: str = "reverse_kl", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.kind = kind

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        check_packed(inputs, self.teacher)
        # Called through its wrappers, or processes would not share gradients. The last hidden state is what the lm_head
        # takes; of the logits one position is made, and not used. With a cache packed sequences would see each other.
        outputs = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        with torch.no_grad():
            teacher_hidden = decoder_of(self.teacher)(**inputs, use_cache=False).last_hidden_state
        student, teacher = self.student_head(model), head_of(self.teacher)
        loss = linear_divergence(
            outputs.hidden_states[-1][:, :-1],
            student.weight,
            teacher_hidden[:, :-1],
            teacher.weight,
            self.kind,
            mask=labels[:, 1:] != -100,
            reduction="mean",
            denominator=num_items_in_batch,  # labelled tokens of all accumulated batches, over all processes
            student_bias=student.bias,
            student_logit_scale=student.scale,
            student_softcap=student.softcap,
            teacher_bias=teacher.bias,
            teacher_logit_scale=teacher.scale,
            teacher_softcap=teacher.softcap,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data parallelism will divide by it
        return (loss, {}) if return_outputs else loss

    def student_head(self, model: torch.nn.Module) -> Head:
        """The lm_head within DDP, torch.compile and PEFT. ConfigError where an adapter sits on it."""
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return head_of(plain.get_base_model() if hasattr(plain, "get_base_model") else plain)


def check_packed(inputs: dict[str, Tensor], model: PreTrainedModel) -> None:
    """ValueError for packed rows whose sequences transformers would not keep apart."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or (mask is None and family_of(model).packs):
        return
    anew = positions.diff(dim=1) != 1
    if mask is not None:
        anew = anew & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if anew.any():
        mixes = f"{type(model).__name__} mixes them" if mask is None else "its attention_mask mixes them: leave it out"
        raise ValueError(f"a row holds several sequences (its position_ids begin anew), and {mixes}")


def tiny(layers: int, seed: int) -> PreTrainedModel:
    """A random Gemma 2 of 1000 tokens: soft-capped logits and sliding windows."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=1000,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        initializer_range=0.1,
        final_logit_softcapping=4.0,
        attn_implementation="eager",
    )
    return AutoModelForCausalLM.from_config(config)


def random_texts(count: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Random tokens, of which the first 8, a prompt, do not count."""
    ids = torch.randint(vocabulary, (count, 32), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :8] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": l} for i, l in zip(ids, labels, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Distil a model with transformers' Trainer.")
    parser.add_argument("--teacher", type=Path, help="folder; default: a tiny random model")
    parser.add_argument("--student", type=Path, help="folder; default: a tiny random model")
    parser.add_argument("--out", help="where the Trainer may write; default: a folder that is removed")
    parser.add_argument("--kind", default="reverse_kl", help="any kind of mskd_kernels.divergence")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2, help="batches a step")
    options = parser.parse_args(arguments)
    teacher = load_model(options.teacher) if options.teacher else tiny(3, seed=0)
    student = load_model(options.student) if options.student else tiny(1, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=options.out or folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),  # or several processes on a CPU do not find each other
        )
        data = random_texts(64, min(teacher.config.vocab_size, student.config.vocab_size))
        trainer = DistillationTrainer(student, settings, train_dataset=data, teacher=teacher, kind=options.kind)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero():
        weights = sum(float(p.detach().double().square().sum()) for p in student.parameters()) ** 0.5
        print(json.dumps({"first": losses[0], "last": losses[-1], "steps": len(losses), "weight_norm": weights}))


if __name__ == "__main__":
    main()
