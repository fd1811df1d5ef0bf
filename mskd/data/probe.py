"""Whether a chat template writes all that a row holds: the exchange again, with a word of its own in each part.

other, words = probe(exchange)          # render it: a word that is not there is a part that the template leaves out
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mskd.data.conversations import Exchange, Turn
from mskd.data.rendering import TemplateError

REASONING = ("reasoning_content", "reasoning", "thinking")
THOUGHT = "</think>"  # ends one that an answer's content begins with
WORD = "zq{}qz"


@dataclass(frozen=True)
class Shown:
    """What a chat template makes of an exchange: the prompt of the answer, and the conversation to the answer's end."""

    exchange: Exchange
    where: str
    prompt: str | TemplateError
    whole: str | TemplateError | None  # None: there is no answer


def calls(e: Exchange) -> list[Mapping[str, Any]]:
    """The functions that the turns call, each {name, arguments}."""
    turns = (*e.asked, *([e.answer] if e.answer else []))
    return [call["function"] for turn in turns for call in turn.get("tool_calls", ())]


def with_text_arguments(e: Exchange) -> Exchange:
    """The exchange with the arguments of its calls as JSON text."""

    def of(turn: Turn) -> Turn:
        if "tool_calls" not in turn:
            return turn
        calls = [
            call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
            for call in turn["tool_calls"]
        ]
        return turn | {"tool_calls": calls}

    return replace(e, asked=tuple(map(of, e.asked)), answer=of(e.answer) if e.answer else None)


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def needs_probe(s: Shown) -> bool:
    """Whether a look at the text cannot tell that all is there."""
    text, e = (s.prompt if s.whole is None else s.whole), s.exchange
    if isinstance(text, TemplateError) or isinstance(s.prompt, TemplateError):
        return False  # refused anyway
    turns = [turn for turn in e.asked if turn["role"] != "assistant"] + ([e.answer] if e.answer else [])
    answers = e.answer is not None and any(key in e.answer for key in REASONING)
    return bool(e.tools or calls(e) or answers) or any(turn["content"].strip() not in text for turn in turns)


def probe(e: Exchange) -> tuple[Exchange, list[tuple[str, str, bool]]]:
    """The exchange with a word of its own in each part; the words, with the name of the part, and whether it is of the
    answer. What earlier answers said may go: templates of models that think leave it out."""
    words: list[tuple[str, str, bool]] = []

    def word(part: str, own: bool = False) -> str:
        words.append((WORD.format(len(words)), part, own))
        return words[-1][0]

    def named(function: Mapping[str, Any], part: str, own: bool) -> dict[str, Any]:
        return {**function, "name": f"{function.get('name', '')}{word(part, own)}"}

    def of(turn: Turn, own: bool) -> Turn:
        turn = dict(turn)
        if own and THOUGHT in turn["content"]:
            turn["content"] = turn["content"].replace(THOUGHT, word("thought", own) + THOUGHT, 1)
        if turn["content"].strip() and (own or turn["role"] != "assistant"):
            turn["content"] += word(f"{turn['role']} turn", own)
        if "tool_calls" in turn:
            turn["tool_calls"] = [
                {**call, "function": named(call["function"], "tool call", own)} for call in turn["tool_calls"]
            ]
        for key in REASONING:
            if own and isinstance(turn.get(key), str) and turn[key].strip():
                turn[key] += word("reasoning", own)
                break
        return turn

    asked = tuple(of(turn, False) for turn in e.asked)
    answer = None if e.answer is None else of(e.answer, True)
    tools = e.tools and tuple({**tool, "function": named(tool["function"], "tools", False)} for tool in e.tools)
    return replace(e, asked=asked, answer=answer, tools=tools), words


def strings(e: Exchange) -> Iterator[str]:
    """Every text of an exchange, but for roles and the names of keys."""
    level: list[Any] = [*e.asked, e.answer, e.tools]
    while level:
        value = level.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            level += [v for k, v in value.items() if k != "role"]
        elif isinstance(value, list | tuple):
            level += value


def mapped(e: Exchange, change: Callable[[str], str]) -> Exchange:
    """The exchange with every text in it changed, but for roles and the names of keys."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {k: v if k == "role" else of(v) for k, v in value.items()}
        return [of(v) for v in value] if isinstance(value, list | tuple) else value

    return replace(e, asked=tuple(of(e.asked)), answer=of(e.answer), tools=of(e.tools))
