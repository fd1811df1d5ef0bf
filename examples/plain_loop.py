"""The fused loss in a plain torch loop, from hidden states: no [tokens, vocabulary] tensor exists.

    python examples/plain_loop.py                                # two tiny random models: seconds, nothing is fetched
    python examples/plain_loop.py --teacher BIG --student SMALL  # folders or hub ids of Llama-like models

With models of yours, put your batches in place of `random_batches`. The last line is the reverse KL before and after.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

import torch
from mskd_kernels import linear_divergence
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def distil(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[float]:
    """Train the student on (token ids [B, T], mask [B, T], 1 = counts); the loss of every step."""
    losses = []
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for input_ids, mask in batches:
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids, attention_mask=mask).last_hidden_state
        student_hidden = student.model(input_ids, attention_mask=mask).last_hidden_state
        loss = linear_divergence(
            student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, mask=mask, reduction="mean"
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tiny(layers: int, hidden: int, seed: int) -> LlamaForCausalLM:
    """A random model of 1000 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def random_batches(steps: int, vocabulary: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Random tokens, the last quarter of every other row padding."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        mask = torch.ones(8, 32, dtype=torch.int64)
        mask[::2, 24:] = 0
        yield torch.randint(vocabulary, (8, 32), generator=generator), mask


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a Llama-like model in a plain torch loop.")
    parser.add_argument("--teacher", help="folder or hub id; default: a tiny random model")
    parser.add_argument("--student", help="folder or hub id; default: a tiny random model")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    teacher = LlamaForCausalLM.from_pretrained(options.teacher) if options.teacher else tiny(3, 64, seed=0)
    student = LlamaForCausalLM.from_pretrained(options.student) if options.student else tiny(1, 48, seed=1)
    vocabulary = min(teacher.config.vocab_size, student.config.vocab_size)
    losses = distil(student, teacher.eval().requires_grad_(False), random_batches(options.steps, vocabulary))
    print(json.dumps({"first": losses[0], "last": losses[-1], "steps": len(losses)}))


if __name__ == "__main__":
    main()
