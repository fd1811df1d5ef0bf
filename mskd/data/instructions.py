"""Instruction data: rows of a file or of the hub -> prompts and answers in token ids, and splits.

    splits = load_data(config.data, tokenizer, seed=0)          # Splits of Examples, with a fingerprint and counts
    blocks = load_text("corpus.txt", tokenizer, max_tokens=512) # plain text for the language-modelling term

Rows are read by rows.py, put in words by conversations.py, and spelled by alpaca.py or by chat.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mskd.config import ConfigError, DataConfig
from mskd.data.alpaca import ALPACA, ALPACA_CONTEXT, Alpaca, plain_ids
from mskd.data.chat import Chat
from mskd.data.conversations import Exchange, Refused, exchanges, find_columns, read_row
from mskd.data.counts import HELD_OUT, Counts, quantiles
from mskd.data.examples import Example, Item, Spelled, Splits, draw, order, unmarked
from mskd.data.rendering import TemplateError
from mskd.data.rows import missing, read_documents, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What others use of this room's instruction data.
__all__ = [
    "ALPACA", "ALPACA_CONTEXT", "Example", "Reading", "Splits", "end_token_id", "further", "load_data", "load_items",
    "load_text", "order", "read", "split",
]  # fmt: skip

log = logging.getLogger(__name__)

Group = list[Item]  # what one row gives


@dataclass
class Reading:
    """The usable rows of a data set, each with the examples that it gives, in the order of the file."""

    groups: list[Group]
    counts: Counts

    @property
    def items(self) -> list[Item]:
        return [item for group in self.groups for item in group]


def load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, need_responses: bool = True
) -> Splits:
    """Read, format, tokenise and split the data of a run.

    A number of test rows is drawn by data.seed, by default `seed`; of the demo's own 50 it takes the first ones. Rows
    are dropped, and counted, where they ask nothing, where the prompt is too long, where a needed response is empty,
    where the template cannot hold them, and where they have the prompt of a row held out from them. Without
    need_responses, rows may have prompts only. Raises ConfigError.
    """
    reading = read(config.source, "data.source", config, tokenizer, need_responses)
    _warn(reading.counts)
    splits = split(reading, config, tokenizer, seed=seed, need_responses=need_responses)
    if twins := reading.counts.dropped[HELD_OUT]:
        log.warning("%s: %d rows dropped: %s", config.source, twins, HELD_OUT)
    return splits


def split(
    reading: Reading, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, need_responses: bool
) -> Splits:
    """Split what was read of data.source; the examples of a row stay together. Raises ConfigError."""
    seed = seed if config.seed is None else config.seed
    groups, counts, drawn = reading.groups, reading.counts, 0
    if isinstance(config.test, str):
        own = read(config.test, "data.test", config, tokenizer, need_responses)
        _warn(own.counts)
        test = own.groups
    elif config.source == "demo":
        test = read("demo", "data.test", config, tokenizer, need_responses).groups[: config.test]
    else:
        drawn = min(500, max(1, len(groups) // 10)) if config.test is None else config.test
        test = draw(groups, drawn, f"{seed}:test")
    if drawn + config.validation >= len(groups):
        raise ConfigError(
            f"{config.source} has {len(groups)} usable rows: {drawn} for the test (data.test) and "
            f"{config.validation} for the validation (data.validation) leave none to train on; lower them or add rows"
        )
    rest = _without(test, groups)
    validation = draw(rest, config.validation, f"{seed}:validation")
    train = _without(validation, rest)
    twins = len(groups) - drawn - len(validation) - len(train)
    if twins:
        said = f"{counts.repeated[0]} prompts of {config.source} are in several rows"
        for _ in range(twins):
            counts.drop(Refused(HELD_OUT, said))
    if not train:
        raise ConfigError(
            f"{config.source}: all rows left to train on have the prompt of a test or validation row; hold out none "
            "with data.test = 0 and data.validation = 0, or give data.test a file of its own with other prompts"
        )
    parts = {"train": _examples(train), "validation": _examples(validation), "test": _examples(test)}
    counts.splits = {name: len(part) for name, part in parts.items()}
    return Splits(**parts, fingerprint=_fingerprint(config, list(parts.values())), counts=counts)


def load_items(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str = "data.test"
) -> tuple[tuple[Example, ...], str]:
    """Every usable row of config.source as a test item (of the demo its test rows, of a hub id its split "test").

    key: what the user calls the source, for errors. Returns the items and their fingerprint. Raises ConfigError.
    """
    reading = read(config.source, key, config, tokenizer, False)
    _warn(reading.counts)
    items = _examples(reading.groups)
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
    stream = [i for ids in plain_ids(read_documents(path), tokenizer) for i in (*ids, end)]
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


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    (shown,) = Chat(tokenizer, DataConfig()).render([(turns, None, add_generation_prompt)])
    if isinstance(shown, TemplateError):
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConfigError(f"the tokenizer's chat template refuses the turns {roles}: {shown}")
    return shown


# -- splits ---------------------------------------------------------------------------------------


def _without(held_out: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The groups, in their order, less those that are held out or have a prompt of one of them."""
    prompts = {item.example.prompt for group in held_out for item in group}
    return [group for group in groups if not any(item.example.prompt in prompts for item in group)]


def _examples(groups: Sequence[Group]) -> tuple[Example, ...]:
    return tuple(item.example for group in groups for item in group)


def _fingerprint(config: DataConfig, splits: Sequence[Sequence[Example]]) -> str:
    """sha256 of what the run sees. Template, columns, seed and limits count through what they change, and only so."""
    digest = hashlib.sha256()
    for part in splits:
        for e in part:
            digest.update(json.dumps([e.prompt, e.prompt_ids, e.response_ids, e.references]).encode() + b"\n")
        digest.update(b"\n")
    if config.text is not None:
        digest.update(json.dumps([config.max_tokens, read_documents(config.text)]).encode())
    return digest.hexdigest()


# -- rows to examples -----------------------------------------------------------------------------


def read(
    source: str, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, need_responses: bool
) -> Reading:
    """The usable rows of one file or hub id, and what became of the others. Raises ConfigError where there is none."""
    rows = read_rows(source, key, config)
    if not rows:
        raise ConfigError(f"{key} {source!r} holds no rows")
    if key == "data.source" and config.limit is not None:
        rows = rows[: config.limit]
    columns = find_columns(rows, source, key, config)
    if need_responses and not (columns.get("messages") or columns.get("response")):
        raise missing("no column holds the response; name it with data.response", key, source, list(columns.present))
    counts = Counts(source, len(rows), columns, every_turn=config.turns == "all")
    asked: list[tuple[int, Exchange]] = []
    for i, row in enumerate(rows, 1):
        where = f"{source}, row {i}"
        try:
            made = exchanges(read_row(row, columns, where), config.turns, where)
        except Refused as why:
            counts.drop(why)
        else:
            asked += [(i, exchange) for exchange in made]
    groups = _items(asked, counts, config, tokenizer, need_responses)
    if not groups:
        said = f"{counts.reasons()}; the first: {counts.first_message()}"
        raise ConfigError(f"{key} {source!r}: none of its {len(rows)} rows can be used: {said}")
    return Reading(groups, counts)


def _warn(counts: Counts) -> None:
    if counts.dropped:
        log.warning(
            "%s: %d of %d rows dropped: %s", counts.source, counts.dropped.total(), counts.rows, counts.reasons()
        )


def _items(
    asked: Sequence[tuple[int, Exchange]],
    counts: Counts,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    need_responses: bool,
) -> list[Group]:
    """What every row gives that can be used; all else is counted."""
    groups: dict[int, Group] = {row: [] for row, _ in asked}
    refused: dict[int, list[Refused]] = {row: [] for row in groups}
    for (row, exchange), result in zip(asked, _spell(asked, counts.source, config, tokenizer), strict=True):
        made = _item(row, exchange, result, counts, config, need_responses)
        if isinstance(made, Refused):
            refused[row].append(made)
        else:
            groups[row].append(made)
    for row, why in refused.items():
        if groups[row]:
            counts.turns_left_out.update(w.reason for w in why)
        elif why:
            counts.drop(why[-1])
    used = [group for group in groups.values() if group]
    _measure(used, counts)
    return used


def _spell(
    asked: Sequence[tuple[int, Exchange]], source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Spelled | Refused]:
    end = end_token_id(tokenizer, config.template)
    by = Chat(tokenizer, config, end) if config.template == "chat" else Alpaca(tokenizer, end)
    wheres = [f"{source}, row {row}" for row, _ in asked]
    idle = {i for i, (_, exchange) in enumerate(asked) if not exchange.asks}
    left = [i for i in range(len(asked)) if i not in idle]
    spelled = iter(by.spell([asked[i][1] for i in left], [wheres[i] for i in left]))
    nothing = "without an instruction"
    return [Refused(nothing, f"{wheres[i]} asks nothing") if i in idle else next(spelled) for i in range(len(asked))]


def _item(
    row: int, exchange: Exchange, spelled: Spelled | Refused, counts: Counts, config: DataConfig, need_responses: bool
) -> Item | Refused:
    """The example of an exchange, cut to length."""
    counts.answers += exchange.answer is not None
    if isinstance(spelled, Refused):
        return spelled
    if spelled.lacks is not None and need_responses:
        counts.unanswered += exchange.answer is None
        return spelled.lacks
    longest = min(config.max_prompt_tokens, config.max_tokens - 1)  # one token of the response has to fit
    if len(spelled.prompt_ids) > longest:
        return Refused(
            f"with a prompt over {longest} tokens (data.max_prompt_tokens, data.max_tokens)",
            f"{counts.source}, row {row} has {len(spelled.prompt_ids)}",
        )
    room = config.max_tokens - len(spelled.prompt_ids)
    references = exchange.references or ((spelled.reference,) if spelled.reference.strip() else ())
    if not references and exchange.answer is not None:
        references = (exchange.answer["content"].rstrip(),)
    counts.prompts_alone.update([spelled.lacks.reason] if spelled.lacks else [])
    counts.cut += len(spelled.answer_ids) > room
    counts.apart += spelled.apart
    counts.several += len(references) > 1
    counts.turns += bool(spelled.answer_ids)
    counts.earlier += sum(turn["role"] == "assistant" for turn in exchange.asked) if config.turns == "last" else 0
    prompt_ids, answer_ids = tuple(spelled.prompt_ids), tuple(spelled.answer_ids[:room])
    example = Example(unmarked(spelled.prompt), prompt_ids, answer_ids, references)
    return Item(
        example, row, exchange.number, spelled.begins + spelled.prompt, spelled.answer, len(spelled.answer_ids) > room
    )


def _measure(groups: Sequence[Group], counts: Counts) -> None:
    examples = _examples(groups)
    times = Counter(e.prompt for e in examples)
    again = [n for n in times.values() if n > 1]
    counts.repeated = (len(again), sum(again))
    lengths = [[len(e.prompt_ids) + len(e.response_ids) for e in _examples([group])] for group in groups]
    counts.tokens, counts.longest = sum(map(sum, lengths)), sum(map(max, lengths))
    counts.prompt_tokens = quantiles([len(e.prompt_ids) for e in examples])
    counts.response_tokens = quantiles([len(e.response_ids) for e in examples if e.response_ids])
