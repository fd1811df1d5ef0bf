"""What a model's forward takes: sequences in rows, and the places that predict a response token.

B rows, T tokens of the longest one, N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Prompts with responses in rows padded on the right, and the places that predict a response token.

    Without position_ids a row holds one sequence; with them it holds several, one after the other, each counting from
    0, and padding is 0 throughout. Models then keep the sequences of a row apart.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 1 = counts
    positions: Tensor  # [N] int64: b * T + t of the hidden state that predicts the target
    targets: Tensor  # [N] int64, in order of sequence, then of position
    position_ids: Tensor | None = None  # [B, T] int64

    @classmethod
    def from_sequences(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad_id: int,
        *,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> SequenceBatch:
        """A batch of prompts (at least one token each) and responses (maybe empty); N is the sum of their lengths.

        rows: the sequences of each row, every one in exactly one of them (`packing.fill_rows`); default: a row each.
        Targets come in the order of the sequences given, wherever they lie. Padding is known by length, never by its
        id: pad == eos loses no end token. Raises ValueError.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; give one response a prompt")
        if not all(prompts):
            raise ValueError("a prompt has no token, so nothing predicts the first token of its response")
        places = [[i] for i in range(len(prompts))] if rows is None else rows
        if sorted(i for row in places for i in row) != list(range(len(prompts))):
            raise ValueError(f"rows must hold each of the {len(prompts)} sequences once; got {list(map(list, places))}")
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        width = max((sum(lengths[i] for i in row) for row in places), default=0)
        ids = torch.full((len(places), width), pad_id, dtype=torch.int64)
        mask, own = torch.zeros_like(ids), torch.zeros_like(ids)
        predicting: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(prompts)
        for b, row in enumerate(places):
            start = 0
            for i in row:
                span = slice(start, start + lengths[i])
                ids[b, span] = torch.tensor([*prompts[i], *responses[i]], dtype=torch.int64)
                mask[b, span] = 1
                own[b, span] = torch.arange(lengths[i])
                first = b * width + start + len(prompts[i]) - 1
                predicting[i] = torch.arange(first, first + len(responses[i]))
                start += lengths[i]
        return cls(
            input_ids=ids,
            attention_mask=mask,
            positions=torch.cat([torch.zeros(0, dtype=torch.int64), *predicting]),
            targets=torch.tensor([token for response in responses for token in response], dtype=torch.int64),
            position_ids=None if rows is None else own,
        )

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on a device."""
        return SequenceBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            positions=self.positions.to(device),
            targets=self.targets.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
        )
