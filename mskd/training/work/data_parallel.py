"""Who trains on what: an endless stream of batches, shared out so that they are the same for any number of processes.

examples = deal(stream(data.train, step, 32, seed), accelerator)     # this process's share of a step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mskd.config.phases import OnPolicyPhase
from mskd.data.instructions import order
from mskd.training.job import Job

if TYPE_CHECKING:
    from accelerate import Accelerator


def stream(items: Sequence, batch: int, size: int, seed: int) -> list:
    """Batch number `batch` of an endless stream of epochs, each in an order of its own; no item is left out."""
    n, places = len(items), range(batch * size, (batch + 1) * size)
    orders = {p // n: order(n, p // n, seed) for p in (places[0], places[-1], *places[::n])}
    return [items[orders[p // n][p % n]] for p in places]


def chunks(items: Sequence, size: int) -> list[list]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


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


def by_rank(job: Job, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of every process by 'rank.name'."""
    parts = gathered(job, [tensors])
    return {f"{rank}.{k}": v for rank, part in enumerate(parts) for k, v in part.items()}


def gathered(job: Job, items: list) -> list:
    """The items of every process, by rank."""
    if job.accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def of_rank(job: Job, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This process's own tensors of what `by_rank` gave."""
    mine = f"{job.accelerator.process_index}."
    return {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}


def across(job: Job, values: torch.Tensor) -> torch.Tensor:
    """The sum over processes, on the device that the values came from."""
    return job.accelerator.reduce(values.to(job.accelerator.device), "sum").to(values.device)
