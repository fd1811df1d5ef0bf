"""Sampling from the student, or from the mixture of teacher and student, into a flat Rollout.

    rollout = sample(student, teacher, prompts, eos_id=2, pad_id=0, max_new_tokens=256, mix_alpha=0.2,
                     temperature=1.0, top_p=1.0, top_k=0, batch_size=32, seed=7, sequence_ids=range(len(prompts)))

Both models decode in lockstep, each with its own KV cache; all log-probabilities that the objective needs are recorded
while sampling. One uniform number belongs to each (seed, sequence id, response position), so neither the batch size nor
the order of the prompts changes what is drawn.

B sequences (b of them decoding now), P longest prompt of a batch, T response positions, N response tokens, S tokens in
all, V tokens common to both vocabularies, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from mskd.config import ConfigError
from mskd.data import SequenceBatch
from mskd.draw import draw, signed, uniforms
from mskd.models import Head, Teacher, backbone, head_of, num_layers


class Interrupted(Exception):
    """`should_stop` asked to end; the unfinished rollout is dropped (the same call draws it again)."""


# -- the result -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """B sampled sequences without padding, on the CPU. Per-token fields run by sequence, then by response position.

    tokens [S] int64: prompt and response of each sequence, one after the other; offsets [B + 1], prompt_lengths [B].
    old_logprobs [N]: log q_old(y) of the student that sampled, unmixed and untruncated, at the sampling temperature.
    mixture_logprobs [N]: log p~(y) under the distribution that was really sampled (mixed, truncated, renormalised).
    teacher_logprobs [N]: log p(y), untruncated; None where the teacher did not decode: `objective.score` fills it.
    vocab_size [] int64: tokens common to student and teacher, over which all log-probabilities are normalised.
    Log-probabilities are fp32 (fp64 if the student is). A response ends with its EOS token, or at max_new_tokens.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lengths: Tensor
    old_logprobs: Tensor
    mixture_logprobs: Tensor
    teacher_logprobs: Tensor | None
    vocab_size: Tensor

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64, EOS included."""
        return self.offsets.diff() - self.prompt_lengths

    @property
    def response_offsets(self) -> Tensor:
        """[B + 1] int64: sequence i owns the per-token values response_offsets[i] up to response_offsets[i + 1]."""
        return _offsets(self.response_lengths)

    @property
    def response_tokens(self) -> Tensor:
        """[N] int64."""
        return self.tokens[_spans(self.offsets[:-1] + self.prompt_lengths, self.response_lengths)]

    @property
    def importance_weights(self) -> Tensor:
        """[N]: q_old(y) / p~(y), in (0, 1 / (1 - mix_alpha)] (0 only by underflow)."""
        return (self.old_logprobs - self.mixture_logprobs).exp()

    def prompts(self) -> list[list[int]]:
        """The prompts, without padding."""
        return [t[:p].tolist() for t, p in zip(self._sequences(), self.prompt_lengths.tolist(), strict=True)]

    def responses(self) -> list[list[int]]:
        """The responses, EOS included."""
        return [t[p:].tolist() for t, p in zip(self._sequences(), self.prompt_lengths.tolist(), strict=True)]

    def _sequences(self) -> tuple[Tensor, ...]:
        return self.tokens.split(self.offsets.diff().tolist())

    def token_indices(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Where the per-token values of the given sequences lie, [n] int64: for values kept beside the rollout."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return _spans(self.response_offsets[chosen], self.response_lengths[chosen])

    def select(self, indices: Sequence[int] | Tensor) -> Rollout:
        """The given sequences, in the given order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths, flat = self.offsets.diff()[chosen], self.token_indices(chosen)
        return Rollout(
            tokens=self.tokens[_spans(self.offsets[chosen], lengths)],
            offsets=_offsets(lengths),
            prompt_lengths=self.prompt_lengths[chosen],
            old_logprobs=self.old_logprobs[flat],
            mixture_logprobs=self.mixture_logprobs[flat],
            teacher_logprobs=None if self.teacher_logprobs is None else self.teacher_logprobs[flat],
            vocab_size=self.vocab_size,
        )

    def to_batch(self, pad_id: int) -> SequenceBatch:
        """Right-padded, with the response tokens as targets, in the order of the per-token fields."""
        return SequenceBatch.from_sequences(self.prompts(), self.responses(), pad_id)

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token values [N] as [B, T], and their mask [B, T] bool; `result[mask]` gives the values back."""
        lengths = self.response_lengths
        mask = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths[:, None]
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """[sum of lengths] int64: start, start + 1, ... of every span, one after the other."""
    within = torch.arange(int(lengths.sum())) - _offsets(lengths)[:-1].repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within


# -- one model that decodes -----------------------------------------------------------------------


class _Layer(DynamicLayer):
    """Keys and values of one layer in a buffer of fixed capacity: a new token is written, the past is never copied."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.buffers: list[Tensor] = []  # keys and values [b, heads, capacity, head size]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        new = key_states, value_states
        if not self.buffers:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.buffers = [x.new_empty(*x.shape[:2], self.capacity, x.shape[-1]) for x in new]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, start : start + x.shape[-2]] = x
        return self._show(start + key_states.shape[-2])

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in place."""
        end = self.get_seq_length()
        for buffer in self.buffers:
            buffer[: len(rows), :, :end] = buffer[rows, :, :end]
        self.buffers = [buffer[: len(rows)] for buffer in self.buffers]
        self._show(end)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


class _Decoder:
    """One model with its head cut to the common vocabulary, and the KV cache of the batch that it decodes now."""

    def __init__(self, model: PreTrainedModel, head: Head, temperature: float):
        self.model, self.head, self.temperature = model, head, temperature
        self.device = head.weight.device
        if self.device.type == "cpu" and head.weight.dtype in (torch.float16, torch.bfloat16):
            # torch.mm(out_dtype=...) is CUDA's. Logits rounded to 16 bits would change the distribution.
            self.head = replace(head, weight=head.weight.float())

    def cut(self, vocab_size: int) -> None:
        bias = self.head.bias
        self.head = replace(
            self.head, weight=self.head.weight[:vocab_size], bias=None if bias is None else bias[:vocab_size]
        )

    def start(self, capacity: int) -> None:
        self.layers = [_Layer(capacity) for _ in range(num_layers(self.model))]
        self.cache = Cache(layers=list(self.layers))

    def keep(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows)

    def logits(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Next-token logits [b, V] over the temperature, fp32 (fp64), for the last column of input_ids [b, n]."""
        hidden, _ = backbone(
            self.model,
            input_ids.to(self.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        last, weight = hidden[:, -1], self.head.weight
        if weight.dtype in (torch.float16, torch.bfloat16):
            logits = torch.mm(last.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            logits = last.to(weight.dtype) @ weight.T
        if self.head.bias is not None:
            logits = logits + self.head.bias
        if self.head.scale != 1.0:
            logits = logits * self.head.scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature


def _decoder(model: PreTrainedModel | Teacher, temperature: float) -> _Decoder:
    if isinstance(model, Teacher):
        return _Decoder(model.model, model.head, temperature)
    return _Decoder(model, head_of(model), temperature)


# -- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    student: PreTrainedModel | Teacher,
    teacher: PreTrainedModel | Teacher | None,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    mix_alpha: float,
    temperature: float,
    top_p: float,
    top_k: int,
    batch_size: int,
    seed: int,
    sequence_ids: Sequence[int],
    should_stop: Callable[[], bool] | None = None,
) -> Rollout:
    """One response to every prompt, from p~ as `draw` defines it, in the order of the prompts.

    teacher None or mix_alpha 0: no teacher decodes and teacher_logprobs is None; a teacher that is given still bounds
    the vocabulary, over whose common tokens all log-probabilities are normalised. sequence_ids: distinct, one a prompt;
    with `seed` they own the random numbers. should_stop is asked before every token.
    Raises Interrupted when should_stop says so, ConfigError when a prompt is empty or prompt and response exceed a
    model's positions, FloatingPointError when a model gives logits that are not numbers.
    """
    decoders = [_decoder(student, temperature)]
    if teacher is not None:
        decoders.append(_decoder(teacher, temperature))
    _check(decoders, prompts, sequence_ids, max_new_tokens)
    vocab_size = min(d.head.weight.shape[0] for d in decoders)
    for decoder in decoders:
        decoder.cut(vocab_size)
    if mix_alpha == 0:
        decoders = decoders[:1]

    # Longest first: little padding, and the batch that needs the most memory comes first.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    responses: list[_Response | None] = [None] * len(prompts)
    with _evaluating(d.model for d in decoders):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids = torch.tensor([signed(sequence_ids[i]) for i in chosen])
            u = uniforms(seed, ids[:, None], torch.arange(max_new_tokens)[None]).to(decoders[0].device)
            pick = partial(draw, mix_alpha=mix_alpha, top_p=top_p, top_k=top_k)
            decoded = _decode(decoders, [prompts[i] for i in chosen], u, pick, eos_id, pad_id, should_stop)
            for i, response in zip(chosen, decoded, strict=True):
                responses[i] = response
    return _flatten(prompts, [r for r in responses if r is not None], decoders)


def _check(decoders: list[_Decoder], prompts: Sequence[Sequence[int]], ids: Sequence[int], max_new_tokens: int) -> None:
    if len(ids) != len(prompts) or len(set(ids)) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many distinct sequence_ids; got {len(ids)} ids")
    if not all(len(p) for p in prompts):
        raise ConfigError("a prompt has no tokens; every prompt needs at least one to sample from")
    longest = max((len(p) for p in prompts), default=0) + max_new_tokens
    for decoder in decoders:
        limit = getattr(decoder.model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"a prompt and max_new_tokens need {longest} positions, {type(decoder.model).__name__} has {limit}; "
                "lower max_new_tokens or data.max_prompt_tokens"
            )


@contextmanager
def _evaluating(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Dropout off while sampling, whatever state training left the models in."""
    training = [m for m in models if m.training]
    try:
        for m in training:
            m.eval()
        yield
    finally:
        for m in training:
            m.train()


_Response = tuple[Tensor, Tensor]  # of one sequence: tokens [t], log-probabilities [2 or 3, t] (student, p~, teacher)
_LOOK_EVERY_CUDA = 8  # tokens between looks at what has finished: each is a synchronisation with the GPU


def _decode(
    decoders: list[_Decoder],
    prompts: list[Sequence[int]],
    u: Tensor,
    pick: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]],
    eos_id: int,
    pad_id: int,
    should_stop: Callable[[], bool] | None,
) -> list[_Response]:
    """Sample one batch to its end. u [B, T] float64: the random numbers of its sequences."""
    (B, T), device = u.shape, u.device
    look_every = 1 if device.type == "cpu" else _LOOK_EVERY_CUDA
    input_ids, mask, positions = _left_pad(prompts, T, pad_id, device)
    P = input_ids.shape[1]
    padded = not bool(mask[:, :P].all())
    for decoder in decoders:
        decoder.start(P + T)
    tokens = torch.full((B, T), pad_id, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(decoders) + 1, B, T, dtype=torch.float64, device=device)
    lengths = torch.zeros(B, dtype=torch.int64, device=device)
    rows = torch.arange(B, device=device)  # the rows of `tokens` that the models still compute
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(T):
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped while sampling, at token {t} of {T}")
        seen = mask[:, : P + t] if padded else None
        logits = [d.logits(input_ids, seen, positions) for d in decoders]
        token, *drawn = pick(logits[0], logits[1] if len(logits) > 1 else None, u[rows, t])
        tokens[rows, t] = token.masked_fill(done, pad_id)
        logprobs[:, rows, t] = torch.stack([x for x in drawn if x is not None])
        lengths[rows] += ~done
        done |= token == eos_id
        input_ids, positions = token[:, None], positions[:, -1:] + 1
        if (t + 1) % look_every == 0:
            finished = int(done.sum())
            if finished == len(rows):
                break
            if 4 * finished >= len(rows):  # copying the caches of the others pays then
                keep = (~done).nonzero()[:, 0]
                rows, done, mask = rows[keep], done[keep], mask[keep]
                input_ids, positions = input_ids[keep], positions[keep]
                for decoder in decoders:
                    decoder.keep(keep)
    found = zip(tokens.cpu(), logprobs.cpu().unbind(1), lengths.tolist(), strict=True)
    return [(x[:n], lp[:, :n]) for x, lp, n in found]


def _left_pad(prompts: list[Sequence[int]], T: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids [B, P], mask [B, P + T] int64 with the T columns to come all valid, positions [B, P])."""
    P = max(len(p) for p in prompts)
    input_ids = torch.tensor([[pad_id] * (P - len(p)) + list(p) for p in prompts], dtype=torch.int64)
    padding = torch.tensor([P - len(p) for p in prompts])[:, None]
    mask = (torch.arange(P + T) >= padding).long()
    positions = (torch.arange(P) - padding).clamp(min=0)
    return input_ids.to(device), mask.to(device), positions.to(device)


def _flatten(prompts: Sequence[Sequence[int]], responses: list[_Response], decoders: list[_Decoder]) -> Rollout:
    dtype = torch.float64 if decoders[0].head.weight.dtype == torch.float64 else torch.float32
    pieces = [x for p, (r, _) in zip(prompts, responses, strict=True) for x in (torch.tensor(p, dtype=torch.int64), r)]
    prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    logprobs = torch.cat([torch.zeros(len(decoders) + 1, 0, dtype=torch.float64), *(lp for _, lp in responses)], 1)
    if logprobs[:2].isnan().any():
        raise FloatingPointError(
            "a model gave logits that are not numbers while sampling; its weights or activations overflow "
            f"in {decoders[0].head.weight.dtype}"
        )
    return Rollout(
        tokens=torch.cat([torch.zeros(0, dtype=torch.int64), *pieces]),
        offsets=_offsets(prompt_lengths + torch.tensor([len(r) for r, _ in responses], dtype=torch.int64)),
        prompt_lengths=prompt_lengths,
        old_logprobs=logprobs[0].to(dtype),
        mixture_logprobs=logprobs[1].to(dtype),
        teacher_logprobs=logprobs[2].to(dtype) if len(decoders) > 1 else None,
        vocab_size=torch.tensor(decoders[0].head.weight.shape[0]),
    )
