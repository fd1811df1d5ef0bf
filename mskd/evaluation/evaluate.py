"""Evaluation of a loaded model: ROUGE-L of its answers, perplexity, agreement with and reverse KL to teachers.

One JSON line for each item and seed goes to a file; reports and tests of significance read those lines.

    figures = evaluate(model, tokenizer, splits.test, config.evaluation, out=Path("evals/.../test-quick.jsonl"),
                       teachers={"teacher": teacher})

B sequences, T tokens, N response tokens, V vocabulary, H hidden.
reverse_kl = KL(model || teacher) = sum_v q(v) (log q(v) - log p(v)), q the model, p the teacher.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mskd_kernels import linear_logprobs, linear_reverse_kl
from torch import Tensor

from mskd.config import ConfigError, EvalConfig
from mskd.data.instructions import Example
from mskd.data.packing import cut
from mskd.evaluation.statistics import paired_bootstrap, summarize
from mskd.models import Head, Teacher, backbone, decoder_of, head_of
from mskd.models.batch import SequenceBatch
from mskd.models.folder.declared import as_ends
from mskd.models.heads import check_positions
from mskd.sampling.draw import draw, uniforms
from mskd.store.files import write_text
from mskd.store.hashes import digest, stream_seed
from mskd.store.reading import sealed_lines

__all__ = ["evaluate", "file_name", "generate", "paired_bootstrap", "rouge_l", "summarize"]

MAX_BYTES = 240  # of a file's name, of the 255 that file systems have
ARGMAX_BYTES = 64 * 2**20  # of the logits of one chunk where only their argmax is wanted

Tokens = Sequence[Sequence[int]]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    config: EvalConfig,
    *,
    out: Path,
    teachers: Mapping[str, Teacher] | None = None,
    eos_id: int | Collection[int] | None = None,
    need_references: bool = False,
    tick: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Evaluate a loaded causal language model; one JSON line for each item and seed goes to `out`, all or none.

    A line has: item, seed; prompt and references (in the lines of the first seed only); answer; rouge_l (0 to 100);
    nll, the sum in nats over the response tokens of the reference, EOS included and prompt excluded, and tokens, their
    number; answer_tokens (EOS included where the model came to it); and for every named teacher reverse_kl, the mean
    over the tokens of the model's OWN answer of the full-vocabulary KL(model || teacher) at temperature 1, and
    agreement, the share of reference response tokens where the model's most likely token is the teacher's.
    Items without a reference have null for rouge_l, nll and agreement. Perplexity, made from the lines, is exp of the
    mean nll per response token (EOS included, prompt excluded) over the set.

    Random numbers belong to (seed, item, position): models answer the same prompt with the same random numbers,
    whatever the order or size of batches, and no global random state is read or changed. A greedy protocol has one
    seed. One forward takes config.batch_size sequences. eos_id: the token that ends an answer, or several of which each
    does, by default the tokenizer's EOS (a chat template may have one of its own). tick: is told after every batch how
    many references and answers of how many are done.
    Returns `statistics.summarize` of the lines. Raises ConfigError where `need_references` and no item has a
    reference, FloatingPointError where the model's output is not finite, OSError where `out` cannot be written.
    """
    examples = examples[: config.limit]
    if not examples:
        raise ConfigError("there is no item to evaluate on: the test split is empty; set data.test or evaluation.limit")
    if need_references and not any(e.references for e in examples):
        raise ConfigError(
            f"none of the {len(examples)} items has a reference response, which ROUGE-L and perplexity need; "
            "give data with a response column"
        )
    teachers = teachers or {}
    pad = tokenizer.pad_token_id
    ends = as_ends(tokenizer.eos_token_id if eos_id is None else eos_id)
    seeds = config.seeds if config.sample else config.seeds[:1]
    done = _Count(sum(bool(e.response_ids) for e in examples) + len(examples) * len(seeds), tick)
    lines = []
    with _evaluation_mode(model):
        scores = _score_references(model, examples, teachers, config.batch_size, pad, done)
        for number, seed in enumerate(seeds):
            answers, divergences = _answer(model, examples, teachers, config, seed, ends, pad, done)
            for item, example in enumerate(examples):
                text = tokenizer.decode(_without_end(answers[item], ends), skip_special_tokens=True)
                line: dict[str, Any] = {"item": item, "seed": seed}
                if number == 0:
                    line |= {"prompt": example.prompt, "references": list(example.references)}
                line |= {"answer": text, "rouge_l": rouge_l(text, example.references)}
                line |= scores[item] | {"answer_tokens": len(answers[item])}
                lines.append(line | {"reverse_kl": divergences[item]})
    write_text(out, sealed_lines(lines))
    return summarize(lines)


class _Count:
    """How many of `total` are done; `tick` hears of it."""

    def __init__(self, total: int, tick: Callable[[int, int], None]) -> None:
        self.done, self.total, self.tick = 0, total, tick

    def add(self, count: int) -> None:
        self.done += count
        self.tick(self.done, self.total)


def file_name(
    data: str,
    fingerprint: str,
    config: EvalConfig,
    teachers: Mapping[str, str] | None = None,
    ends: Sequence[int] = (),
) -> str:
    """The name of the file of one evaluation: <data>-<protocol>-<8 hex digits>.jsonl.

    The digits cover what changes the figures: the data's fingerprint, the values of the protocol (not the batch size),
    the content hashes of the teachers by name, and the tokens that end an answer where they are several. A file of that
    name never answers another question. A long name of data is cut: a file's has at most 255 bytes, and it is written
    under a longer one first.
    """
    values = config.model_dump(exclude={"batch_size", "data"})
    several = [list(ends)] if len(ends) > 1 else []
    end = f"-{config.protocol}-{digest([fingerprint, values, dict(teachers or {}), *several])[:8]}.jsonl"
    return data.encode(errors="replace")[: MAX_BYTES - len(end)].decode(errors="ignore") + end


def rouge_l(answer: str, references: Sequence[str]) -> float | None:
    """ROUGE-L of one answer, 0 to 100: Google's rouge_score, stemmer on, F-measure, best over the references."""
    if not references:
        return None
    return 100 * max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


# -- answers --------------------------------------------------------------------------------------


def generate(
    model: Any, prompts: Tokens, config: EvalConfig, seed: int, *, eos_id: int | Collection[int], pad_id: int
) -> list[list[int]]:
    """An answer to every prompt: ids up to and with the first end token, at most config.max_new_tokens of them."""
    answers: list[list[int]] = [[] for _ in prompts]
    for items, batch, _ in _decode(model, prompts, config, seed, as_ends(eos_id), pad_id):
        for item, answer in zip(items, batch, strict=True):
            answers[item] = answer
    return answers


def _decode(
    model: Any, prompts: Tokens, config: EvalConfig, seed: int, ends: Sequence[int], pad_id: int
) -> Iterator[tuple[list[int], list[list[int]], Tensor]]:
    """Batches of prompts (config.batch_size, longest first, padded on the left): items, answers, hidden states [N, H].

    The hidden states are those from which the answers' tokens were drawn, in order of answer, then of position.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    settings = GenerationConfig(
        do_sample=False,  # the drawing is done by _Draw, with random numbers that belong to the item
        max_new_tokens=config.max_new_tokens,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        eos_token_id=list(ends),
        pad_token_id=pad_id,
        use_cache=True,
    )
    check_positions(model.config, max(map(len, prompts), default=0) + config.max_new_tokens, "an answer")
    for items in _by_length([len(p) for p in prompts], config.batch_size):
        ids, mask = _pad_left([prompts[i] for i in items], pad_id)
        sampler = _Draw(config, seed, items, model.device) if config.sample else None
        with _own_settings_hidden(model, settings), _last_states(model) as states, torch.no_grad():
            tokens = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler] if sampler else []),
            )[:, ids.shape[1] :].tolist()
        if sampler and not sampler.finite:
            raise FloatingPointError("the model's logits are not finite while it answers; its weights have diverged")
        answers = [_until_end(answer, ends) for answer in tokens]
        hidden = torch.stack(states, dim=1)  # [B, T, H]
        yield items, answers, torch.cat([rows[: len(a)] for rows, a in zip(hidden, answers, strict=True)])


@contextlib.contextmanager
def _last_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect the hidden states [B, H] at the last place of every forward: what the next token is drawn from."""
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[:, -1].clone())

    hook = decoder_of(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()


class _Draw:
    """A logits processor that draws the next token with the item's own random numbers and lets only it through."""

    def __init__(self, config: EvalConfig, seed: int, items: Sequence[int], device: torch.device) -> None:
        sequence, position = torch.tensor(items, device=device), torch.arange(config.max_new_tokens, device=device)
        self.numbers = uniforms(stream_seed(seed, "evaluate"), sequence[:, None], position[None])  # [B, T]
        self.temperature, self.top_p = config.temperature, config.top_p
        self.position = 0
        self.finite = torch.tensor(True, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> [B, V], 0 at the token drawn and -inf elsewhere."""
        logits, u = scores.float() / self.temperature, self.numbers[:, self.position]
        token, logprobs, _, _ = draw(logits, None, u, mix_alpha=0.0, top_p=self.top_p, top_k=0)
        self.finite &= logprobs.isfinite().all()
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _pad_left(sequences: Tokens, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T] int64, padded on the left."""
    width = max(len(s) for s in sequences)
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def _without_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """An answer less its end token, which may be an ordinary word of the vocabulary."""
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def _by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first, so that memory is short at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _answer(
    model: Any,
    examples: Sequence[Example],
    teachers: Mapping[str, Teacher],
    config: EvalConfig,
    seed: int,
    ends: Sequence[int],
    pad: int,
    done: _Count,
) -> tuple[list[list[int]], list[dict[str, float]]]:
    """Every item's answer, and for every teacher the mean over the answer's tokens of KL(model || teacher), nats."""
    answers: list[list[int]] = [[] for _ in examples]
    divergences: list[dict[str, float]] = [{} for _ in examples]
    head = head_of(model)
    for items, batch, hidden in _decode(model, [e.prompt_ids for e in examples], config, seed, ends, pad):
        for item, answer in zip(items, batch, strict=True):
            answers[item] = answer
        inputs = _batch([examples[i].prompt_ids for i in items], batch, pad, model)
        for name, teacher in teachers.items():
            values = _reverse_kl(hidden, head, teacher.hidden(inputs), teacher.head)
            for item, part in zip(items, values.split([len(a) for a in batch]), strict=True):
                divergences[item][name] = _finite(part.double().mean(), item)
        done.add(len(items))
    return answers, divergences


# -- teacher-forced scores ------------------------------------------------------------------------


def _score_references(
    model: Any, examples: Sequence[Example], teachers: Mapping[str, Teacher], size: int, pad: int, done: _Count
) -> list[dict[str, Any]]:
    """nll, tokens and agreement with each teacher, for every item."""
    scores: list[dict[str, Any]] = [{"nll": None, "tokens": 0, "agreement": dict.fromkeys(teachers)} for _ in examples]
    with_response = [i for i, e in enumerate(examples) if e.response_ids]
    lengths = [len(examples[i].prompt_ids) + len(examples[i].response_ids) for i in with_response]
    for chosen in cut(lengths, size, "bucket"):
        items = [with_response[k] for k in chosen]
        batch = _batch([examples[i].prompt_ids for i in items], [examples[i].response_ids for i in items], pad, model)
        parts = [len(examples[i].response_ids) for i in items]
        head, hidden = head_of(model), _hidden(model, batch)
        logprobs, _ = linear_logprobs(
            hidden, head.weight, batch.targets, bias=head.bias, logit_scale=head.scale, softcap=head.softcap
        )
        for item, part in zip(items, logprobs.split(parts), strict=True):
            scores[item] |= {"nll": _finite(-part.double().sum(), item), "tokens": len(part)}
        for name, teacher in teachers.items():
            vocabulary = min(len(head.weight), len(teacher.head.weight))
            same = _top1(hidden, head, vocabulary) == _teacher_top1(teacher, batch, vocabulary)
            for item, part in zip(items, same.split(parts), strict=True):
                scores[item]["agreement"][name] = part.double().mean().item()
        done.add(len(items))
    return scores


def _reverse_kl(hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head) -> Tensor:
    """KL(model || teacher) of every token [N] from hidden states [N, Hs] and [N, Ht], at temperature 1."""
    return linear_reverse_kl(
        hidden, head.weight, teacher_hidden, teacher_head.weight,
        student_bias=head.bias, student_logit_scale=head.scale, student_softcap=head.softcap,
        teacher_bias=teacher_head.bias, teacher_logit_scale=teacher_head.scale, teacher_softcap=teacher_head.softcap,
    )  # fmt: skip


def _top1(hidden: Tensor, head: Head, vocabulary: int) -> Tensor:
    """The most likely token [N] int64 among the first `vocabulary`. Scale (positive) and soft-cap keep the order.

    In chunks of tokens: no [N, V] tensor exists.
    """
    weight = head.weight[:vocabulary].to(hidden.dtype)
    bias = None if head.bias is None else head.bias[:vocabulary].to(hidden.dtype)
    rows = max(1, ARGMAX_BYTES // (vocabulary * hidden.element_size()))
    return torch.cat([torch.nn.functional.linear(h, weight, bias).argmax(dim=-1) for h in hidden.split(rows)])


def _teacher_top1(teacher: Teacher, batch: SequenceBatch, vocabulary: int) -> Tensor:
    """The teacher's, made once for a batch of references: every model of a run is compared with it on the same ones."""
    parts = [t.cpu().numpy().tobytes() for t in (batch.input_ids, batch.positions)]
    key = (vocabulary, *[hashlib.sha256(part).digest() for part in parts])
    if key not in teacher.top1:
        teacher.top1[key] = _top1(teacher.hidden(batch), teacher.head, vocabulary)
    return teacher.top1[key]


def _batch(prompts: Tokens, responses: Tokens, pad: int, model: Any) -> SequenceBatch:
    return SequenceBatch.from_sequences(prompts, responses, pad).to(model.device)


def _hidden(model: Any, batch: SequenceBatch) -> Tensor:
    """The hidden states [N, H] that predict the batch's targets: padding is on the right, where nothing sees it."""
    hidden, _ = backbone(model, batch.input_ids)
    return hidden.flatten(0, 1)[batch.positions]


def _finite(value: Tensor, item: int) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise FloatingPointError(f"item {item}: the log-likelihood or the divergence is {number}; a model has diverged")
    return number


# -- state that must be as it was -----------------------------------------------------------------


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """No dropout and no gradient; afterwards the training flag and the random state are as they were."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)


@contextlib.contextmanager
def _own_settings_hidden(model: Any, settings: Any) -> Iterator[None]:
    """Hide the model's own generation_config: generate() would fill in its penalties, top-k and further EOS tokens."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
