"""What one call of `hop.train` needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mskd.config import Config
from mskd.config.hardware import Hardware
from mskd.config.phases import Phase
from mskd.data.instructions import Splits
from mskd.models import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Job:
    """All that one call of `train` needs. `seed` is the node's own: every random stream derives from it."""

    name: str
    directory: Path
    seed: int
    phases: tuple[Phase, ...]
    student: Any  # a loaded transformers model in fp32
    tokenizer: Any
    ends: tuple[int, ...]  # the ids that end an answer; the first one ends the responses that are trained on
    teacher: Teacher | None
    data: Splits
    text: tuple[tuple[int, ...], ...]
    config: Config
    hardware: Hardware
    accelerator: Accelerator
    save_dtype: torch.dtype | None = None  # of the finished weights on disk; None: fp32, as they are trained
    stop: Callable[[], bool] = lambda: False
    validate_rollouts: Callable[[Any, str], float] | None = None  # of a minillm phase with keep = "best"
