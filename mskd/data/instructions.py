"""Instruction data: rows of a file or of the hub -> prompts, token ids, splits, batches.

    splits = load_data(config.data, tokenizer, seed=0)          # Splits of Examples, with a fingerprint
    blocks = load_text("corpus.txt", tokenizer, max_tokens=512) # plain text for the language-modelling term
    batch = SequenceBatch.from_sequences(prompts, responses, pad_id)

B sequences, T tokens of the longest one, N response tokens of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mskd.config import ConfigError, DataConfig
from mskd.config.problems import nearest
from mskd.data.rows import clean, first_line, missing, read_documents, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

INSTRUCTION = ("instruction", "prompt", "question", "query", "input", "turns")
CONTEXT = ("context", "input")
RESPONSE = ("response", "output", "answer", "completion", "responses", "outputs", "answers", "references")
MESSAGES = ("messages", "conversation", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # how ShareGPT files name them

# The template of Stanford Alpaca, as MiniLLM's released code writes it.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One prompt and its answer. response_ids: of the first reference, with the end token unless cut at max_tokens."""

    prompt: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # () where there is no response
    references: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of examples. No prompt of a later set is in an earlier one."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    fingerprint: str  # sha256 of everything above and of the plain text; of content, not of paths


def order(n: int, epoch: int, seed: int) -> list[int]:
    """The order of n items in an epoch, the same on every machine."""
    return _shuffled(n, f"{seed}:{epoch}")


def load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, need_responses: bool = True
) -> Splits:
    """Read, format, tokenise and split the data of a run.

    A number of test rows is drawn by data.seed, by default `seed`; of the demo's own 50 it takes the first ones. Rows
    are dropped, and counted in the log, where the prompt is empty or too long, where a needed response is empty, and
    where they have the prompt of a row held out from them. Without need_responses, rows may have prompts only. Raises
    ConfigError.
    """
    seed = seed if config.seed is None else config.seed
    examples = _load(config.source, "data.source", config, tokenizer, need_responses)
    drawn = 0
    if isinstance(config.test, str):
        test = _load(config.test, "data.test", config, tokenizer, need_responses)
    elif config.source == "demo":
        test = _load("demo", "data.test", config, tokenizer, need_responses)[: config.test]
    else:
        drawn = min(500, max(1, len(examples) // 10)) if config.test is None else config.test
        test = _draw(examples, drawn, seed, "test")
    if drawn + config.validation >= len(examples):
        raise ConfigError(
            f"{config.source} has {len(examples)} usable rows: {drawn} for the test (data.test) and "
            f"{config.validation} for the validation (data.validation) leave none to train on; lower them or add rows"
        )
    rest = _without(test, examples)
    validation = _draw(rest, config.validation, seed, "validation")
    train = _without(validation, rest)
    twins = len(examples) - drawn - len(validation) - len(train)
    if not train:
        raise ConfigError(f"{config.source}: all rows left to train on have the prompt of a test or validation row")
    if twins:
        log.warning("%s: %d rows dropped: with the prompt of a test or validation row", config.source, twins)
    return Splits(tuple(train), tuple(validation), tuple(test), _fingerprint(config, (train, validation, test)))


def load_items(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str = "data.test"
) -> tuple[tuple[Example, ...], str]:
    """Every usable row of config.source as a test item (of the demo its test rows, of a hub id its split "test").

    key: what the user calls the source, for errors. Returns the items and their fingerprint. Raises ConfigError.
    """
    items = tuple(_load(config.source, key, config, tokenizer, False))
    return items, _fingerprint(config, (items,))


def further(config: DataConfig, source: str) -> DataConfig:
    """The same settings for another data set, whose columns are found by their usual names."""
    own = {"instruction", "context", "response", "messages", "limit", "revision", "text", "test"}
    return config.model_copy(update=dict.fromkeys(own) | {"source": source})


def load_text(path: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Plain text in blocks of max_tokens ids, an end token after each document; the last block may be shorter.

    path: .txt, a document a line, or .jsonl with `text`. Raises ConfigError.
    """
    end = end_token_id(tokenizer)
    stream = [i for ids in _ids(read_documents(path), tokenizer) for i in (*ids, end)]
    blocks = [tuple(stream[i : i + max_tokens]) for i in range(0, len(stream), max_tokens)]
    return tuple(block for block in blocks if len(block) > 1)  # one token alone predicts nothing


def end_token_id(tokenizer: PreTrainedTokenizerBase, template: str = "alpaca") -> int:
    """The id that ends a response, and so ends sampling: the template's end of turn, else the tokenizer's eos."""
    if template == "chat":
        answer = "ANSWER"
        shown = _render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}], False)
        _, found, tail = shown.rpartition(answer)
        ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"] if found else []
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


# -- splits ---------------------------------------------------------------------------------------


def _draw(examples: Sequence[Example], count: int, seed: int, purpose: str) -> list[Example]:
    """`count` examples drawn by the seed; each purpose draws anew."""
    return [examples[i] for i in _shuffled(len(examples), f"{seed}:{purpose}")[:count]]


def _without(held_out: Sequence[Example], examples: Sequence[Example]) -> list[Example]:
    """The examples, in their order, less those that are held out or have the same prompt as one of them."""
    prompts = {e.prompt for e in held_out}
    return [e for e in examples if e.prompt not in prompts]


def _shuffled(n: int, salt: str) -> list[int]:
    """A permutation that is the same on every machine and in every version of Python."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{salt}:{i}".encode()).digest())


def _fingerprint(config: DataConfig, splits: Sequence[Sequence[Example]]) -> str:
    """sha256 of what the run sees. Template, columns, seed and limits count through what they change, and only so."""
    digest = hashlib.sha256()
    for split in splits:
        for e in split:
            digest.update(json.dumps([e.prompt, e.prompt_ids, e.response_ids, e.references]).encode() + b"\n")
        digest.update(b"\n")
    if config.text is not None:
        digest.update(json.dumps([config.max_tokens, read_documents(config.text)]).encode())
    return digest.hexdigest()


# -- rows to examples -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row in words: what is asked, in one or several turns, and the answers there are."""

    turns: list[dict[str, str]]
    instruction: str
    context: str
    references: tuple[str, ...]


def _load(
    source: str, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, need_responses: bool
) -> list[Example]:
    """The usable examples of one file or hub id, in its order; says how many rows it dropped and why."""
    raw = read_rows(source, key, config)
    if not raw:
        raise ConfigError(f"{key} {source!r} holds no rows")
    if key == "data.source" and config.limit is not None:
        raw = raw[: config.limit]
    rows = _rows(raw, source, key, config, need_responses)
    end = end_token_id(tokenizer, config.template)
    prompts = [_prompt(row, f"{source}, row {i}", tokenizer, config.template) for i, row in enumerate(rows, 1)]
    prompt_ids = _encode_prompts(prompts, tokenizer, config.template)
    responses = _encode_responses([row.references[0] if row.references else "" for row in rows], tokenizer, end)
    longest = min(config.max_prompt_tokens, config.max_tokens - 1)  # one token of the response has to fit
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for row, prompt, ids, response in zip(rows, prompts, prompt_ids, responses, strict=True):
        if not row.instruction:
            dropped["without an instruction"] += 1
        elif need_responses and not row.references:
            dropped["without a response"] += 1
        elif len(ids) > longest:
            dropped[f"with a prompt over {longest} tokens (data.max_prompt_tokens, data.max_tokens)"] += 1
        else:
            answer = response[: config.max_tokens - len(ids)] if row.references else []
            examples.append(Example(prompt, tuple(ids), tuple(answer), row.references))
    reasons = ", ".join(f"{n} {why}" for why, n in dropped.items())
    if not examples:
        raise ConfigError(f"{key} {source!r}: none of its {len(raw)} rows can be used: {reasons}")
    if dropped:
        log.warning("%s: %d of %d rows dropped: %s", source, dropped.total(), len(raw), reasons)
    return examples


def _encode_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """Ids of prompts. Prompt and response are tokenised apart, so that the boundary is exact: sampling starts from the
    ids of the prompt alone, and a merge across the boundary would train on other ids than those."""
    if template == "chat":  # the template writes its own special tokens
        return tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    # What the tokenizer puts at the start (Llama's and OPT's do) stays, as in pre-training; an end token goes.
    encoded = tokenizer(prompts, split_special_tokens=True, verbose=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def _encode_responses(texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int) -> list[list[int]]:
    """Ids of responses, each with exactly one end token, whether or not the text spells one out at its end."""
    spelled = str(tokenizer.convert_ids_to_tokens(end))
    return [[*ids, end] for ids in _ids([text.removesuffix(spelled).rstrip() for text in texts], tokenizer)]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of plain text: no special token is added, and one that the text spells out is text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _prompt(row: _Row, where: str, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    if template == "alpaca":
        if len(row.turns) > 1:
            raise ConfigError(
                f"{where}: {len(row.turns)} turns come before the response, and the Alpaca template takes one; "
                "set data.template = 'chat'"
            )
        return (ALPACA_CONTEXT if row.context else ALPACA).format(instruction=row.instruction, context=row.context)
    try:
        return _render(tokenizer, row.turns, True) if row.instruction else ""
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("data.template is 'chat', but the tokenizer has no chat template; use 'alpaca'")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as e:  # a template is a program of its own, and raises what it likes
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConfigError(f"the tokenizer's chat template refuses the turns {roles}: {first_line(e)}") from None


def _rows(raw: list[dict[str, Any]], source: str, key: str, config: DataConfig, need_responses: bool) -> list[_Row]:
    """Rows in words. A column that the configuration does not name is found by its usual names."""
    present = list(dict.fromkeys(name for row in raw for name in row))
    found = {kind: getattr(config, kind) for kind in ("instruction", "context", "response", "messages")}
    for kind, name in found.items():
        if name is not None and name not in present:
            raise missing(f"data.{kind} = {name!r} is no column", key, source, present, nearest(name, present))
    if not any(found.values()):
        found["messages"] = _usual(MESSAGES, present)
    if found["messages"] is not None:
        if found["instruction"] or found["context"] or found["response"]:
            raise ConfigError("data.messages takes the place of data.instruction, context and response; name one kind")
        column = found["messages"]
        return [_chat_row(row.get(column), f"{source}, row {i}", need_responses) for i, row in enumerate(raw, 1)]
    if found["instruction"] is None:
        found["instruction"] = _usual(INSTRUCTION, present, taken=(found["context"], found["response"]))
    if found["instruction"] is None:
        raise missing("no column holds the instruction; name it with data.instruction", key, source, present)
    if found["context"] is None:
        found["context"] = _usual(CONTEXT, present, taken=(found["instruction"], found["response"]))
    if found["response"] is None:
        found["response"] = _usual(RESPONSE, present, taken=(found["instruction"], found["context"]))
    if found["response"] is None and need_responses:
        raise missing("no column holds the response; name it with data.response", key, source, present)
    return [_plain_row(row, found, f"{source}, row {i}") for i, row in enumerate(raw, 1)]


def _usual(names: Sequence[str], present: Sequence[str], taken: Sequence[str | None] = ()) -> str | None:
    """The first column that bears one of the names, in the order of the names, whatever its capitals."""
    columns = {c.strip().lower(): c for c in reversed(present) if c not in taken}
    return next((columns[name] for name in names if name in columns), None)


def _plain_row(row: Mapping[str, Any], found: Mapping[str, str | None], where: str) -> _Row:
    def cell(kind: str) -> Any:
        return row.get(found[kind] or "")

    asked = cell("instruction")
    if found["instruction"] == "turns" and isinstance(asked, list | tuple) and len(asked) == 1:  # Vicuna's questions
        asked = asked[0]
    instruction = clean(asked, f"{where}, {found['instruction']}")
    context = clean(cell("context"), f"{where}, {found['context']}")
    answers = cell("response") if isinstance(cell("response"), list | tuple) else [cell("response")]
    references = [clean(answer, f"{where}, {found['response']}") for answer in answers]
    content = f"{instruction}\n\n{context}" if context else instruction
    return _Row([{"role": "user", "content": content}], instruction, context, tuple(r for r in references if r))


def _chat_row(value: Any, where: str, need_responses: bool) -> _Row:
    """A row of chat messages: the last assistant turn is the response, what comes before it the prompt."""
    if not isinstance(value, list | tuple | None) or not all(isinstance(m, Mapping) for m in value or ()):
        raise ConfigError(f"{where}: messages must be a list of {{role, content}}, not {type(value).__name__}")
    turns = []
    for message in value or ():
        role = clean(message.get("role") or message.get("from"), where)
        if not role:
            raise ConfigError(f"{where}: a message has no role; it needs the keys role and content")
        content = message["content"] if message.get("content") is not None else message.get("value")
        turns.append({"role": ROLES.get(role, role), "content": clean(content, f"{where}, content")})
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if turns and not answers and need_responses:
        raise ConfigError(f"{where}: the messages have no assistant turn, and a phase needs a response")
    reference = turns[answers[-1]]["content"] if answers else ""
    asked = turns[: answers[-1]] if answers else turns
    instruction = asked[-1]["content"] if asked else ""
    return _Row(asked, instruction, "", (reference,) if reference else ())
