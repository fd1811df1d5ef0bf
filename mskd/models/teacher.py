"""The frozen model above a hop, its layers in 8 bits.

teacher = load_teacher(folder, "int8", detect())
hidden = teacher.hidden(batch)                      # [N, Ht], no gradient
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mskd.config import ConfigError, Precision
from mskd.config.hardware import Hardware
from mskd.models.batch import SequenceBatch
from mskd.models.heads import Head, head_of, hidden_at, layers_of
from mskd.models.load import cast, load_model
from mskd.models.offload import Waiting
from mskd.models.quantize import import_bitsandbytes, quantize_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Teacher:
    """A frozen model: no parameter requires a gradient, eval mode. Made by `load_teacher`."""

    model: PreTrainedModel
    precision: Precision
    waiting: Waiting | None = None  # its weights but the head's, where they wait in host memory
    top1: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)  # evaluation's, by batch

    @property
    def head(self) -> Head:
        return head_of(self.model)

    def on_device(self) -> AbstractContextManager[None]:
        """Inside, the whole model is on its device; `hidden` does this by itself. The head is there all the time."""
        return nullcontext() if self.waiting is None else self.waiting.lent()

    @torch.no_grad()
    def hidden(self, inputs: SequenceBatch) -> Tensor:
        """Hidden states [N, Ht] at inputs.positions, in the teacher's dtype, whatever autocast is on."""
        with self.on_device(), torch.autocast(inputs.input_ids.device.type, enabled=False):
            return hidden_at(self.model, inputs)


def load_teacher(folder: Path, precision: Precision, hardware: Hardware, *, offload: bool = False) -> Teacher:
    """The frozen model of a folder, its layers' weights in `precision`, on hardware.device.

    int8: weight-only (see quantize.py), activations in hardware.teacher_dtype. Embedding and lm_head stay in it too:
    one is a lookup and no GEMM, they are often the same tensor, errors of the head go straight into the logits, and the
    fused losses take its weight as it is. offload: the layers wait in host memory while they do not compute. Raises
    ConfigError.
    """
    check_precision(precision, hardware)
    if offload:
        check_offload(precision, hardware)
    dtype, device = hardware.teacher_dtype, hardware.device
    options: dict[str, Any] = {"attention": hardware.attention}
    if precision == "int8":
        # In the checkpoint's own dtype: int8 weights then depend on the checkpoint alone, not on this machine.
        model = load_model(folder, dtype="auto", **options)
        quantize_layers(layers_of(model))
        cast(model, dtype)
        model.to(device)  # type: ignore[arg-type]
    elif precision == "llm_int8":
        from transformers import BitsAndBytesConfig

        # On a CPU it says for every layer that it casts activations to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

        quantization = BitsAndBytesConfig(load_in_8bit=True)
        model = load_model(folder, dtype=dtype, device=device, quantization_config=quantization, **options)
    else:
        own = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        model = load_model(folder, dtype=own, device=device, **options)
    head = head_of(model.requires_grad_(False).eval())
    stay = [t for t in (head.weight, head.bias) if t is not None]
    return Teacher(model, precision, Waiting(model, stay=stay, device=device) if offload else None)


def check_offload(precision: Precision, hardware: Hardware) -> None:
    """Raise ConfigError unless a teacher of this precision can wait in host memory (`run.teacher_offload`)."""
    if hardware.device.type == "cpu":
        raise ConfigError("run.teacher_offload: on a CPU the teacher is in host memory already; leave it off")
    if precision == "llm_int8":
        raise ConfigError("run.teacher_offload: the weights of LLM.int8 cannot be moved; use int8, or leave it off")


def check_precision(precision: Precision, hardware: Hardware) -> None:
    """Raise ConfigError unless a teacher of this precision can be loaded on this machine."""
    if precision == "llm_int8" and not hardware.llm_int8:
        raise ConfigError(f"precision = 'llm_int8': {hardware.reasons['int8']}; use int8")
    if precision in ("int8", "llm_int8"):
        import_bitsandbytes()
