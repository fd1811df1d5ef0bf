"""One model that decodes many sequences at once, each in a slot of a KV cache of fixed capacity.

    decoder = Decoder(model, head, temperature=1.0)
    with decoder.opened(slots=16, capacity=320):
        logits = decoder.advance(tokens, [Span(slot=0, row=5, start=0, end=40), ...])     # [spans, V]

The new tokens of all spans are packed into one row without padding: whole prompts beside single tokens, so that a
prompt that refills a slot costs no pass over the weights of its own. A token's column in its slot is its position.
Attention reads the columns up to it, which the present sequence has written: nothing of an older one is seen.
transformers' own modules compute everything but attention, which this file gives them as an attention function.

For a later capture as a CUDA graph: caches and `tokens` lie at fixed addresses; a step of single tokens needs a fixed
number of spans (idle slots repeat their last token) and the window rounded up to a few sizes, one graph for each.

S slots, C capacity, M tokens of a pass, b spans of one token each, V vocabulary, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from mskd.models import Head, decoder_of

PASS_TOKENS = 2048  # most tokens of one pass: a bound on the memory of activations


class Span(NamedTuple):
    """Tokens start..end (positions, end excluded) of one sequence: `tokens[row]`, in slot `slot` of the cache."""

    slot: int
    row: int
    start: int
    end: int


class Decoder:
    """A model with its head at a temperature, and the KV cache of the sequences that it decodes now."""

    def __init__(self, model: PreTrainedModel, head: Head, temperature: float):
        self.model, self.head, self.temperature = model, head, temperature
        self.device = head.weight.device
        if self.device.type == "cpu" and head.weight.dtype in (torch.float16, torch.bfloat16):
            # torch.mm(out_dtype=...) is CUDA's. Logits rounded to 16 bits would change the distribution.
            self.head = replace(head, weight=head.weight.float())

    def cut(self, vocab_size: int) -> None:
        """Leave only the first `vocab_size` tokens of the vocabulary."""
        bias = self.head.bias
        self.head = replace(
            self.head, weight=self.head.weight[:vocab_size], bias=None if bias is None else bias[:vocab_size]
        )

    @contextmanager
    def opened(self, slots: int, capacity: int) -> Iterator[None]:
        """An empty cache and this file's attention, with dropout off; afterwards the model is as it was."""
        config: Any = decoder_of(self.model).config
        training = self.model.training
        attention = config._attn_implementation
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [S, C, KV heads, D]
        self.slots, self.capacity = slots, capacity
        try:
            self.model.eval()
            config._attn_implementation = _NAME
            yield
        finally:
            config._attn_implementation = attention
            self.model.train(training)
            self.caches = {}

    def advance(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """Next-token logits over the temperature [spans, V], fp32 (fp64), after the last token of every span.

        tokens [rows, at least capacity] int64, on the student's device. What came before a span must be in its slot.
        """
        parts, size = [[]], 0  # type: list[list[Span]], int
        for span in spans:
            if parts[-1] and size + span.end - span.start > PASS_TOKENS:
                parts, size = [*parts, []], 0
            parts[-1].append(span)
            size += span.end - span.start
        logits = [self._pass(tokens, part) for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        for pair in self.caches.values():
            for cache in pair:
                cache[target, :length] = cache[source, :length]

    def _pass(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        # Single tokens first: one attention call serves all of them.
        order = sorted(range(len(spans)), key=lambda i: (spans[i].end - spans[i].start > 1, spans[i].slot))
        pack = _Pack(self, [spans[i] for i in order])
        out = decoder_of(self.model)(
            input_ids=tokens.flatten()[pack.places(tokens.shape[1], "row").to(tokens.device)][None].to(self.device),
            position_ids=pack.positions[None],
            use_cache=False,
            pack=pack,
        )
        back = sorted(range(len(order)), key=order.__getitem__)
        return self._logits(out.last_hidden_state[0, pack.last(back)])

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight
        if weight.dtype in (torch.float16, torch.bfloat16):
            logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            logits = hidden.to(weight.dtype) @ weight.T
        if self.head.bias is not None:
            logits += self.head.bias
        if self.head.scale != 1.0:
            logits *= self.head.scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


# -- attention over slots -------------------------------------------------------------------------


@dataclass
class _Pack:
    """Where the M tokens of one pass lie, and what each may see. Spans of one token first, in the order of slots."""

    decoder: Decoder
    spans: list[Span]
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # of the single tokens, by sliding window

    def __post_init__(self) -> None:
        self.singles = sum(s.end - s.start == 1 for s in self.spans)
        device = self.decoder.device
        if self.singles == len(self.spans):
            positions = torch.tensor([s.start for s in self.spans])
        else:
            positions = torch.cat([torch.arange(s.start, s.end) for s in self.spans])
        self.positions = positions.to(device)
        self.columns = self.places(self.decoder.capacity, "slot").to(device)
        slots = [s.slot for s in self.spans[: self.singles]]
        self.top = max(slots, default=-1) + 1  # the single tokens' attention runs over the slots below
        self.window = max((s.end for s in self.spans[: self.singles]), default=0)
        self.used = None if slots == list(range(self.top)) else torch.tensor(slots).to(device)

    def places(self, width: int, line: str) -> Tensor:
        """[M] int64: the tokens' places in a flat [lines, width]; a span's line is its `slot` or its `row`."""
        if self.singles == len(self.spans):
            return torch.tensor([getattr(s, line) * width + s.start for s in self.spans])
        return torch.cat([torch.arange(s.start, s.end) + getattr(s, line) * width for s in self.spans])

    def last(self, order: list[int]) -> Tensor:
        """[spans] int64: the last token of the spans, in the given order."""
        ends = torch.tensor([s.end - s.start for s in self.spans]).cumsum(0) - 1
        return ends[order].to(self.decoder.device)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [M, KV heads, D]; return the layer's cache [S, C, KV heads, D], twice."""
        decoder = self.decoder
        if layer not in decoder.caches:
            shape = decoder.slots, decoder.capacity
            # Zeros: what is masked is multiplied by 0, which must not meet a NaN of old memory.
            decoder.caches[layer] = key.new_zeros(*shape, *key.shape[1:]), value.new_zeros(*shape, *value.shape[1:])
        for cache, new in zip(decoder.caches[layer], (key, value), strict=True):
            cache.flatten(0, 1).index_copy_(0, self.columns, new)
        return decoder.caches[layer]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[top, 1, 1, columns] additive: what the single token of every slot sees; an idle slot sees one column."""
        if window not in self.masks:
            positions = torch.zeros(self.top, dtype=torch.int64, device=self.positions.device)
            positions[self.used if self.used is not None else slice(None)] = self.positions[: self.singles]
            seen = _seen(positions, self.window, window)
            self.masks[window] = _additive(seen, dtype)[:, None, None]
        return self.masks[window]


def _seen(positions: Tensor, columns: int, window: int | None) -> Tensor:
    """[n, columns] bool: the columns that tokens at the given positions [n] attend to."""
    at = torch.arange(columns, device=positions.device)
    seen = at <= positions[:, None]
    return seen if window is None else seen & (at > positions[:, None] - window)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: _Pack,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of a packed pass: query, key, value [1, heads, M, D] -> [1, M, heads, D]."""
    keys, values = pack.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    parts, b = [], pack.singles
    if b:
        # The query heads that share a KV head become rows of one small matrix: keys and values are not repeated.
        q = query[0, :, :b].transpose(0, 1).unflatten(1, (keys.shape[2], -1))
        if pack.used is not None:
            q = q.new_zeros(pack.top, *q.shape[1:]).index_copy_(0, pack.used, q)
        k, v = (x[: pack.top, : pack.window].transpose(1, 2) for x in (keys, values))
        out = _attention(q, k, v, pack.mask(sliding_window, q.dtype), scaling, softcap)
        parts.append((out if pack.used is None else out[pack.used]).flatten(1, 2))
    for span in pack.spans[b:]:
        n = span.end - span.start
        q = query[:, :, b : b + n]
        k, v = (x[span.slot, : span.end].transpose(0, 1)[None] for x in (keys, values))
        mask = None
        if span.start > 0 or softcap is not None or (sliding_window is not None and sliding_window < n):
            mask = _additive(_seen(pack.positions[b : b + n], span.end, sliding_window), q.dtype)
        parts.append(_attention(q, k, v, mask, scaling, softcap)[0].transpose(0, 1))
        b += n
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Softmax attention, causal without a mask, which a softcap needs; query heads may be a multiple of KV heads."""
    groups = q.shape[1] // k.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
    assert mask is not None
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (softcap * torch.tanh(scores / softcap) + mask).softmax(-1) @ v


_NAME = "mskd_slots"
AttentionInterface.register(_NAME, _attend)
