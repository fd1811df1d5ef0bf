"""The fused loss in a plain torch loop, from hidden states: no [tokens, vocabulary] tensor exists.

    python examples/plain_loop.py                                # two tiny random models: seconds, nothing is fetched
    python examples/plain_loop.py --teacher BIG --student SMALL  # folders or hub ids of Llama-like models
    torchrun --nproc-per-node 2 examples/plain_loop.py           # several processes: the same weights

With models of yours, put your batches in place of `random_batches`. The last line is the reverse KL before and after.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from mskd_kernels import linear_divergence
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


class Distillation(nn.Module):
    """The student with its loss in one forward: DDP and FSDP see only calls of the module that they wrap.

    Called past the wrapper (`.module`, or the student itself) every process would train by its own gradients, unseen.
    """

    def __init__(self, student: LlamaForCausalLM):
        super().__init__()
        self.student = student

    def forward(
        self, input_ids: Tensor, mask: Tensor, teacher_hidden: Tensor, teacher_head: nn.Linear, denominator: Tensor
    ) -> Tensor:
        hidden = self.student.model(input_ids, attention_mask=mask).last_hidden_state
        settings = {"mask": mask, "reduction": "mean", "denominator": denominator}
        return linear_divergence(hidden, self.student.lm_head, teacher_hidden, teacher_head, **settings)


def distil(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[float]:
    """Train the student on (token ids [B, T], mask [B, T], 1 = counts); the loss of every step, over all processes."""
    losses = []
    teacher.requires_grad_(False).eval()
    model: nn.Module = Distillation(student)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for input_ids, mask in batches:
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids, attention_mask=mask).last_hidden_state
        # DDP averages the processes' gradients; each has its own number of tokens that count.
        loss = model(input_ids, mask, teacher_hidden, teacher.lm_head, average(mask.sum().float()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(average(loss.detach()).item())
    return losses


def average(x: Tensor) -> Tensor:
    """The mean over processes."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


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
    """Random tokens, the last quarter of some rows padding; of eight rows a step, every process has its share."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        mask = torch.ones(8, 32, dtype=torch.int64)
        mask[::2, 24:] = 0
        yield torch.randint(vocabulary, (8, 32), generator=generator)[rank::processes], mask[rank::processes]


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a Llama-like model in a plain torch loop.")
    parser.add_argument("--teacher", help="folder or hub id; default: a tiny random model")
    parser.add_argument("--student", help="folder or hub id; default: a tiny random model")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # torchrun; on GPUs: backend nccl, and everything on cuda:LOCAL_RANK
        dist.init_process_group("gloo")
    teacher = LlamaForCausalLM.from_pretrained(options.teacher) if options.teacher else tiny(3, 64, seed=0)
    student = LlamaForCausalLM.from_pretrained(options.student) if options.student else tiny(1, 48, seed=1)
    vocabulary = min(teacher.config.vocab_size, student.config.vocab_size)
    losses = distil(student, teacher, random_batches(options.steps, vocabulary))
    weights = sum(float(p.detach().double().square().sum()) for p in student.parameters()) ** 0.5
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps({"first": losses[0], "last": losses[-1], "steps": len(losses), "weight_norm": weights}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
