"""Rows in words: who says what, with which tools, and which turns answer. A tokenizer's template takes it from there.

    columns = find_columns(rows, source, "data.source", config)
    for exchange in exchanges(read_row(rows[0], columns, "a.jsonl, row 1"), "all", "a.jsonl, row 1"):
        exchange.asked, exchange.answer

Read are columns of an instruction, its context and its response (text, or lists of messages), columns of messages as
{role, content} or ShareGPT's {from, value}, and beside them columns of tools, of a system prompt and of the history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mskd.config import ConfigError, DataConfig
from mskd.config.problems import nearest
from mskd.data.rows import NotText, missing, plain

INSTRUCTION = ("instruction", "prompt", "question", "query", "input", "turns")
CONTEXT = ("context", "input")
RESPONSE = ("response", "output", "answer", "completion", "responses", "outputs", "answers", "references")
MESSAGES = ("messages", "conversation", "conversations")
TOOLS, SYSTEM, HISTORY = ("tools",), ("system", "system_prompt"), ("history",)
# How ShareGPT files, and those of trainers that took their form, name the roles.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
MARKS = (
    "train",
    "training",
    "loss",
    "weight",
)  # keys by which data says of an assistant turn that it is not trained on
DEEPEST = 64  # levels of tools and calls

Turn = dict[str, Any]  # role, content and what else a template may ask for


class Refused(Exception):
    """Why a row, or a turn of it, is not used. reason: under which it is counted; message: which row it is, and why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read, by what they hold, of those that are present."""

    named: Mapping[str, str]
    present: tuple[str, ...]

    @property
    def unread(self) -> list[str]:
        return [name for name in self.present if name not in self.named.values()]

    def get(self, kind: str) -> str | None:
        return self.named.get(kind)


@dataclass(frozen=True)
class Conversation:
    """A row in words. own: the first turn that may be trained on, where those before it are given as the prompt."""

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] | None = None
    own: int = 0
    references: tuple[str, ...] = ()  # of the turn `own`, where a column holds the answers; trained on is the first
    instruction: str = ""  # of columns: the Alpaca template keeps it apart from its context
    context: str = ""


@dataclass(frozen=True)
class Exchange:
    """What is asked, and the turn that answers it; without one, `lacks` says why."""

    asked: tuple[Turn, ...]
    answer: Turn | None
    number: int  # of the answer among the assistant turns of its row, from 1
    tools: tuple[Any, ...] | None
    references: tuple[str, ...]
    instruction: str
    context: str
    lacks: Refused | None

    @property
    def asks(self) -> bool:
        last = self.asked[-1] if self.asked else {"role": "user", "content": ""}
        return bool(last["content"].strip() or last.get("tool_calls") or last["role"] == "tool")


def find_columns(rows: Sequence[Mapping[str, Any]], source: str, key: str, config: DataConfig) -> Columns:
    """Which column holds what: those that the configuration names, others by their usual names. Raises ConfigError."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    found = {kind: getattr(config, kind) for kind in ("instruction", "context", "response", "messages")}
    for kind, name in found.items():
        if name is not None and name not in present:
            raise missing(f"data.{kind} = {name!r} is no column", key, source, present, nearest(name, present))
    if not any(found.values()):
        found["messages"] = _usual(MESSAGES, present)
    if found["messages"] is not None:
        if found["instruction"] or found["context"] or found["response"]:
            raise ConfigError("data.messages takes the place of data.instruction, context and response; name one kind")
    else:
        for kind, names in (("instruction", INSTRUCTION), ("context", CONTEXT), ("response", RESPONSE)):
            if found[kind] is None:
                found[kind] = _usual(names, present, taken=[name for name in found.values() if name])
            if found["instruction"] is None:
                raise missing("no column holds the instruction; name it with data.instruction", key, source, present)
    if config.template == "chat":  # the Alpaca template has no place for them
        for kind, usual in (("tools", TOOLS), ("system", SYSTEM), ("history", HISTORY)):
            found[kind] = _usual(usual, present, taken=[name for name in found.values() if name])
    return Columns({kind: name for kind, name in found.items() if name is not None}, tuple(present))


def _usual(names: Sequence[str], present: Sequence[str], taken: Sequence[str] = ()) -> str | None:
    """The first column that bears one of the names, in the order of the names, whatever its capitals."""
    columns = {c.strip().lower(): c for c in reversed(present) if c not in taken}
    return next((columns[name] for name in names if name in columns), None)


def read_row(row: Mapping[str, Any], columns: Columns, where: str) -> Conversation:
    """A row in words. where: the file and the row, for messages. Raises Refused."""
    try:
        return _read(row, columns, where)
    except NotText as e:
        raise Refused(f"with a {e.kind} in place of text", str(e)) from None


def _read(row: Mapping[str, Any], columns: Columns, where: str) -> Conversation:
    def cell(kind: str) -> Any:
        name = columns.get(kind)
        return None if name is None else row.get(name)

    def text(kind: str) -> str:
        return plain(cell(kind), f"{where}, {columns.get(kind)}").strip()

    tools = _tools(cell("tools"), where)
    before = _history(cell("history"), where)
    if system := text("system"):
        before = [{"role": "system", "content": system}, *before]
    if columns.get("messages"):
        turns = _messages(cell("messages"), where)
        if system and turns and turns[0]["role"] == "system":
            raise Refused("with two system prompts", f"{where}: a system prompt stands in a column and in the messages")
        return Conversation((*before, *turns), tools)
    instruction = context = ""
    if _is_messages(cell("instruction")):
        asked = _messages(cell("instruction"), where)
    else:
        instruction, context = _instruction(row, columns, where), text("context")
        content = f"{instruction}\n\n{context}" if context else instruction
        asked = [{"role": "user", "content": content}] if instruction else []
    if _is_messages(cell("response")):
        answers, answered = [], _messages(cell("response"), where)
    else:
        answers = _texts(cell("response"), f"{where}, {columns.get('response')}")
        answered = [{"role": "assistant", "content": answer} for answer in answers[:1]]
    references = tuple(answer.rstrip() for answer in answers)
    own = len(before) + len(asked)
    return Conversation((*before, *asked, *answered), tools, own, references, instruction, context)


def _instruction(row: Mapping[str, Any], columns: Columns, where: str) -> str:
    name = columns.named["instruction"]
    asked = row.get(name)
    if name == "turns" and isinstance(asked, list | tuple) and len(asked) == 1:  # Vicuna's questions
        asked = asked[0]
    return plain(asked, f"{where}, {name}").strip()


def _texts(value: Any, where: str) -> list[str]:
    """The answers of a cell that are not blank, with the spaces that they begin and end with."""
    several = value if isinstance(value, list | tuple) else [value]
    return [text for text in (plain(answer, where) for answer in several) if text.strip()]


def _is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(m, Mapping) for m in value)


# -- messages -------------------------------------------------------------------------------------


def _messages(value: Any, where: str) -> list[Turn]:
    """Turns of a cell: {role, content} or {from, value}, with whatever else they hold. Raises Refused."""
    if not isinstance(value, list | tuple | None) or not all(isinstance(m, Mapping) for m in value or ()):
        raise Refused(
            "with messages that are no list of {role, content}",
            f"{where}: messages must be a list of {{role, content}}, not {type(value).__name__}",
        )
    return [_message(message, where) for message in value or ()]


def _message(message: Mapping[str, Any], where: str) -> Turn:
    named = message.get("role") if message.get("role") is not None else message.get("from")
    if named is None or named == "":
        raise Refused(
            "with a message without a role", f"{where}: a message has no role; it needs the keys role and content"
        )
    if not isinstance(named, str):
        raise Refused("with a role that is no text", f"{where}: a role is {named!r}, not text like 'user'")
    content = message["content"] if message.get("content") is not None else message.get("value")
    further = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
    turn: Turn = {"role": ROLES.get(named.strip(), named.strip()), "content": _content(content, where)}
    if named == "function_call":
        further["tool_calls"], turn["content"] = _decoded(turn["content"], "a function call", where), ""
    if further.get("tool_calls"):
        further["tool_calls"] = [_call(call, where) for call in _list(further["tool_calls"])]
    else:
        further.pop("tool_calls", None)
    _check_json(further, where)
    return turn | further


def _content(content: Any, where: str) -> str:
    """The text of a message; of a list of parts, that of all of them, one after the other."""
    if not isinstance(content, list | tuple):
        return plain(content, f"{where}, content")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if isinstance(part, Mapping) and (kind != "text" or "text" not in part):
            raise Refused(
                f"with {kind} parts", f"{where}: a message has a part of type {kind!r}; only text can be read"
            )
        texts.append(plain(part["text"] if isinstance(part, Mapping) else part, f"{where}, content"))
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as templates take it: {type, function: {name, arguments}}, arguments as a table if they are one."""
    own = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str):
        raise Refused("with a tool call that names no function", f"{where}: a tool call is no {{name, arguments}}")
    arguments = own.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = _decoded(arguments, "a call's arguments", where)
        except Refused:
            pass  # text that is no JSON is rendered as it is
    function = {**own, "arguments": {} if arguments is None else arguments}
    kept = {k: v for k, v in call.items() if k != "function" and v is not None} if "function" in call else {}
    return {"type": "function", **kept, "function": function}


def _tools(value: Any, where: str) -> tuple[Any, ...] | None:
    """The tools of a row, each {type, function: {name, ...}}; a cell of JSON text is decoded."""
    if isinstance(value, str) and value.strip():
        value = _decoded(value, "the column of tools", where)
    if not value:
        return None
    tools = tuple(_tool(tool, where) for tool in _list(value))
    _check_json(tools, where)
    return tools


def _tool(tool: Any, where: str) -> dict[str, Any]:
    own = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str):
        said = f"{where}: tools must be a list of {{type, function: {{name, ...}}}}"
        raise Refused("with tools that are no functions", said)
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(own)}


def _history(value: Any, where: str) -> list[Turn]:
    """Earlier questions with their answers, as pairs of text."""
    if not value:
        return []
    turns: list[Turn] = []
    for pair in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("with a history of no pairs", f"{where}: the history must be a list of [question, answer]")
        question, answer = (plain(part, f"{where}, history") for part in pair)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _decoded(text: str, what: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("with JSON text that is no JSON", f"{where}: {what} is no JSON") from None


def _check_json(value: Any, where: str) -> None:
    """Raise Refused unless a template can be given this: plain values, not nested without end."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        odd = next((v for v in level if not isinstance(v, str | int | float | Mapping | list | tuple | None)), None)
        if odd is not None:
            raise Refused("with a message that is no JSON", f"{where}: a message holds a {type(odd).__name__}")
        if not level:
            return
    raise Refused("with messages nested too deeply", f"{where}: nested more than {DEEPEST} levels deep")


# -- what is asked, what answers ------------------------------------------------------------------


def exchanges(conversation: Conversation, turns: Literal["last", "all"], where: str) -> list[Exchange]:
    """What a row gives to train on: its last turn where that answers, or every turn that does.

    A row whose last turn does not answer asks with all its turns; its exchange has no answer. Raises Refused.
    """
    c = conversation
    if not c.turns:
        raise Refused("without an instruction", f"{where} asks nothing")
    answers = [i for i, turn in enumerate(c.turns) if turn["role"] == "assistant"]
    own = [i for i in answers if i >= c.own]
    ends = bool(own) and own[-1] == len(c.turns) - 1  # with an answer
    chosen = own if turns == "all" else own[-1:] if ends else []
    made = [_answered(c, i, answers.index(i) + 1, where) for i in chosen]
    if not ends:
        said = f"it ends with a {c.turns[-1]['role']} turn" if answers else "the messages have no assistant turn"
        lacks = Refused("without a response", f"{where}: {said if c.own == 0 else 'it has no response'}")
        made.append(_exchange(c, len(c.turns), None, len(answers) + 1, lacks))
    return made


def _answered(c: Conversation, place: int, number: int, where: str) -> Exchange:
    answer = c.turns[place]
    lacks = None
    if not answer["content"].strip() and not answer.get("tool_calls"):
        lacks = Refused("without a response", f"{where}: the assistant turn is empty")
    elif any(mark in answer and not answer[mark] for mark in MARKS):
        lacks = Refused("with an answer marked as not to be trained on", f"{where}: the assistant turn is marked so")
    return _exchange(c, place, None if lacks else answer, number, lacks)


def _exchange(c: Conversation, place: int, answer: Turn | None, number: int, lacks: Refused | None) -> Exchange:
    references = c.references if place == c.own else ()
    return Exchange(c.turns[:place], answer, number, c.tools, references, c.instruction, c.context, lacks)
