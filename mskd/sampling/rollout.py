"""Sampling from the student, or from the mixture of teacher and student, into a flat Rollout.

    rollout = sample(student, teacher, prompts, eos_id=2, pad_id=0, max_new_tokens=256, mix_alpha=0.2,
                     temperature=1.0, top_p=1.0, top_k=0, batch_size=32, seed=7, sequence_ids=range(len(prompts)))

One uniform number belongs to each (seed, sequence id, response position), so neither the batch size nor the order of
the prompts changes what is drawn. slots.py says which sequences decode together and when the teacher decodes; decode.py
is one model with its KV cache.

B sequences, T response positions, N response tokens, S tokens in all, V tokens common to both vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mskd.config import ConfigError
from mskd.models import Teacher, head_of
from mskd.models.batch import SequenceBatch
from mskd.models.folder.declared import as_ends
from mskd.models.heads import check_positions
from mskd.sampling.decode import Decoder
from mskd.sampling.draw import signed, uniforms
from mskd.sampling.slots import Slots


class Interrupted(Exception):
    """`should_stop` asked to end; the unfinished rollout is dropped (the same call draws it again)."""


# -- the result -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """B sampled sequences without padding, on the CPU. Per-token fields run by sequence, then by response position.

    tokens [S] int64: prompt and response of each sequence, one after the other; offsets [B + 1], prompt_lengths [B].
    old_logprobs [N]: log q_old(y) of the student that sampled, unmixed and untruncated, at the sampling temperature.
    mixture_logprobs [N]: log p~(y) under the distribution that was really sampled (mixed, truncated, renormalised).
    teacher_logprobs [N]: log p(y), untruncated.
    Either is None where the teacher did not decode every token, until `objective.score` fills it: teacher_logprobs of
    every rollout without truncation, mixture_logprobs of those among them that the teacher took part in.
    vocab_size [] int64: tokens common to student and teacher, over which all log-probabilities are normalised.
    Log-probabilities are fp32 (fp64 if the student is). A response ends with an end token, or at max_new_tokens.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lengths: Tensor
    old_logprobs: Tensor
    mixture_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    vocab_size: Tensor

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64, end tokens included."""
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
        """[N]: q_old(y) / p~(y), in (0, 1 / (1 - mix_alpha)] (0 only by underflow). ValueError before scoring."""
        if self.mixture_logprobs is None:
            raise ValueError("the rollout has no mixture_logprobs yet; fill them with objective.score first")
        return (self.old_logprobs - self.mixture_logprobs).exp()

    def prompts(self) -> list[list[int]]:
        """The prompts, without padding."""
        return [t[:p].tolist() for t, p in zip(self._sequences(), self.prompt_lengths.tolist(), strict=True)]

    def responses(self) -> list[list[int]]:
        """The responses, end tokens included."""
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
            mixture_logprobs=None if self.mixture_logprobs is None else self.mixture_logprobs[flat],
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


# -- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    student: PreTrainedModel | Teacher,
    teacher: PreTrainedModel | Teacher | None,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int | Collection[int],
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
    lazy: bool = True,
) -> Rollout:
    """One response to every prompt, from p~ as `draw` defines it, in the order of the prompts.

    Without truncation (top_p 1, top_k 0) the teacher decodes only where its tokens are needed (see slots.py) and the
    rollout has neither teacher_logprobs nor mixture_logprobs before `objective.score`. teacher None or mix_alpha 0: no
    teacher decodes and only teacher_logprobs is None; a teacher that is given still bounds the vocabulary, over whose
    common tokens all log-probabilities are normalised. eos_id: the token that ends a response, or several of which each
    does. batch_size: sequences that decode together. sequence_ids:
    distinct, one a prompt; with `seed` they own the random numbers. should_stop is asked before every token. lazy
    False: the teacher decodes every token, and all log-probabilities are recorded while sampling.
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
    ids = torch.tensor([signed(i) for i in sequence_ids], dtype=torch.int64)
    u = uniforms(seed, ids[:, None], torch.arange(max_new_tokens)[None])
    slots = min(batch_size, len(prompts))
    capacity = max((len(p) for p in prompts), default=0) + max_new_tokens
    with ExitStack() as stack:
        for decoder in decoders:
            stack.enter_context(decoder.opened(slots, capacity))
        batch = Slots(
            decoders,
            prompts,
            u,
            ends=as_ends(eos_id),
            slots=slots,
            mix_alpha=mix_alpha,
            top_p=top_p,
            top_k=top_k,
            lazy=lazy,
        )
        _decode(batch, should_stop)
        return _flatten(prompts, batch, vocab_size)


def _decoder(model: PreTrainedModel | Teacher, temperature: float) -> Decoder:
    if isinstance(model, Teacher):
        return Decoder(model.model, model.head, temperature)
    return Decoder(model, head_of(model), temperature)


def _decode(batch: Slots, should_stop: Callable[[], bool] | None) -> None:
    while batch.unfinished:
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped while sampling, after {batch.steps} steps")
        batch.step()


def _check(decoders: list[Decoder], prompts: Sequence[Sequence[int]], ids: Sequence[int], max_new_tokens: int) -> None:
    if len(ids) != len(prompts) or len(set(ids)) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many distinct sequence_ids; got {len(ids)} ids")
    if not all(len(p) for p in prompts):
        raise ConfigError("a prompt has no tokens; every prompt needs at least one to sample from")
    longest = max((len(p) for p in prompts), default=0) + max_new_tokens
    for decoder in decoders:
        check_positions(decoder.model.config, longest, "a prompt with max_new_tokens")
        limit = getattr(decoder.model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"a prompt and max_new_tokens need {longest} positions, {type(decoder.model).__name__} has {limit}; "
                "lower max_new_tokens or data.max_prompt_tokens"
            )


def _flatten(prompts: Sequence[Sequence[int]], batch: Slots, vocab_size: int) -> Rollout:
    weight = batch.decoders[0].head.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    responses = batch.responses()
    pieces = [x for p, (r, _) in zip(prompts, responses, strict=True) for x in (torch.tensor(p, dtype=torch.int64), r)]
    prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    none = torch.zeros(len(batch.logprobs), 0, dtype=torch.float64)
    logprobs = torch.cat([none, *(lp for _, lp in responses)], 1)
    if logprobs[:2].isnan().any():
        raise FloatingPointError(
            "a model gave logits that are not numbers while sampling; its weights or activations overflow "
            f"in {weight.dtype}"
        )
    return Rollout(
        tokens=torch.cat([torch.zeros(0, dtype=torch.int64), *pieces]),
        offsets=_offsets(prompt_lengths + torch.tensor([len(r) for r, _ in responses], dtype=torch.int64)),
        prompt_lengths=prompt_lengths,
        old_logprobs=logprobs[0].to(dtype),
        mixture_logprobs=None if batch.lazy else logprobs[1].to(dtype),
        teacher_logprobs=logprobs[2].to(dtype) if len(logprobs) > 2 else None,
        vocab_size=torch.tensor(vocab_size),
    )
