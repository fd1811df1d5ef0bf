"""`mskd data`: how the rows of a data set are read with a model's tokenizer and a template, and what is trained on.

shown = look(config, tokenizer, seed=0, items=3)
shown.print(Console())               # rich: trained tokens bold; without a terminal: in lines of their own
json.dumps(shown.document())
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mskd.config import ConfigError, DataConfig
from mskd.data.counts import Counts
from mskd.data.examples import SPELLED_OUT, Item, special_tokens, unmarked
from mskd.data.instructions import Example, read, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Shown:
    """What became of a data set: its counts, its first items, and what a run on it would stop at."""

    counts: Counts
    items: list[Item]
    split_of: dict[Example, str]
    tokenizer: PreTrainedTokenizerBase
    prompts_only: bool
    problem: str | None

    @property
    def special(self) -> re.Pattern[str]:
        return special_tokens(self.tokenizer)

    def print(self) -> None:
        """Write the counts, then the items as they are trained on."""
        from rich.console import Console

        console = Console()
        for line in self.counts.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self.prompts_only:
            console.print("no responses: read as prompts alone, as minillm and evaluation do", soft_wrap=True)
        if self.problem is not None:
            console.print(f"a run would stop here: {self.problem}", markup=False, highlight=False, soft_wrap=True)
        for number, item in enumerate(self.items, 1):
            console.print()
            console.print(self._title(number, item), markup=False, highlight=False, soft_wrap=True)
            (self._coloured if console.is_terminal else self._plain)(item, console.print)
            if note := self._note(item):
                console.print(note, markup=False, highlight=False, soft_wrap=True)

    def _title(self, number: int, item: Item) -> str:
        e = item.example
        place = f"row {item.row}" + (f", assistant turn {item.turn}" if self.counts.every_turn else "")
        held = self.split_of.get(e, "not used" if self.problem is None else "")
        tokens = f"{len(e.prompt_ids)} prompt tokens, {len(e.response_ids)} trained"
        return f"item {number} ({', '.join(filter(None, (place, held)))}): {tokens}"

    def _coloured(self, item: Item, say: Callable[..., None]) -> None:
        from rich.text import Text

        say(
            Text.assemble(*self._styled(item.prompt, "dim"), *self._styled(self._trained(item), "bold")), soft_wrap=True
        )

    def _styled(self, text: str, style: str) -> Iterator[tuple[str, str]]:
        """The pieces of a text, tokens of the template in another colour than those that are text."""
        for place, piece in enumerate(SPELLED_OUT.split(text)):
            plain = 0
            for token in self.special.finditer(piece) if place % 2 == 0 else ():
                yield visible(piece[plain : token.start()]), style
                yield token[0], f"{style} cyan"
                plain = token.end()
            yield visible(piece[plain:]), style

    def _plain(self, item: Item, say: Callable[..., None]) -> None:
        for name, text in (("prompt ", unmarked(item.prompt)), ("trained", unmarked(self._trained(item)))):
            for n, line in enumerate(visible(text).split("\n") if text else []):
                say(f"{name if n == 0 else ' ' * len(name)} | {line}", markup=False, highlight=False, soft_wrap=True)

    def _note(self, item: Item) -> str | None:
        spelled = dict.fromkeys(SPELLED_OUT.findall(item.prompt + self._trained(item)))
        return f"written in the data, so text and no token: {', '.join(spelled)}" if spelled else None

    def _trained(self, item: Item) -> str:
        """The text of the answer's ids."""
        return str(self.tokenizer.decode(list(item.example.response_ids))) if item.cut else item.answer

    def document(self) -> dict[str, Any]:
        """All of it as one JSON document."""
        return {**self.counts.as_dict(), "problem": self.problem, "items": [self._entry(item) for item in self.items]}

    def _entry(self, item: Item) -> dict[str, Any]:
        e = item.example
        return {
            "row": item.row,
            "turn": item.turn,
            "split": self.split_of.get(e),
            "prompt": unmarked(item.prompt),
            "response": unmarked(self._trained(item)),
            "prompt_ids": list(e.prompt_ids),
            "response_ids": list(e.response_ids),
        }


def look(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, items: int) -> Shown:
    """Read data.source as phases read it that train on its responses; without any, as prompts. Raises ConfigError."""
    need_responses = True
    try:
        reading = read(config.source, "data.source", config, tokenizer, need_responses)
    except ConfigError:
        need_responses = False
        reading = read(config.source, "data.source", config, tokenizer, need_responses)
        if reading.counts.answers:
            raise
    problem: str | None = None
    split_of: dict[Example, str] = {}
    try:
        splits = split(reading, config, tokenizer, seed=seed, need_responses=need_responses)
        for name in ("train", "validation", "test"):
            split_of |= dict.fromkeys(getattr(splits, name), name)
    except ConfigError as e:
        problem = str(e)
    return Shown(reading.counts, reading.items[:items], split_of, tokenizer, not need_responses, problem)


def visible(text: str) -> str:
    """Text for a terminal: whatever would steer it, or hide in it, is written as its code."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else _code(c) for c in text
    )


def _code(c: str) -> str:
    return c if c == "\u200d" else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{{{ord(c):x}}}"
