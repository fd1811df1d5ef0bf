"""What became of the rows of a data set: how many are used, which are dropped and why, and how long they are.

print("\\n".join(counts.lines()))
counts.check_half(yes=False)          # ConfigError where fewer than half of the rows are used
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mskd.config import ConfigError
from mskd.data.conversations import Columns, Refused

QUANTILES = {"least": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1.0}
HELD_OUT = "with the prompt of a test or validation row"


@dataclass
class Counts:
    """Counts of one data set. Rows are those of the file or the hub, counted after data.limit."""

    source: str
    rows: int
    columns: Columns
    dropped: Counter[str] = field(default_factory=Counter)  # rows by reason
    first: dict[str, str] = field(default_factory=dict)  # the first row of each reason, and what is wrong with it
    turns_left_out: Counter[str] = field(default_factory=Counter)  # of rows that are used, by reason
    every_turn: bool = False  # data.turns is "all"
    turns: int = 0  # assistant turns trained on
    prompts_alone: Counter[str] = field(default_factory=Counter)  # used without an answer, by reason
    answers: int = 0  # that the data has, whether a template can write them or not
    earlier: int = 0  # assistant turns that are not trained on, since data.turns is "last"
    cut: int = 0  # answers cut at data.max_tokens, so that they have no end token
    apart: int = 0  # answers whose first token the template's whole conversation shares with the prompt
    several: int = 0  # rows with several references
    unanswered: int = 0  # rows that would be prompts for phases that need no response
    repeated: tuple[int, int] = (0, 0)  # prompts that occur more than once, and their rows
    splits: dict[str, int] = field(default_factory=dict)  # examples by split
    tokens: int = 0  # of all examples, prompts and responses
    longest: int = 0  # of the longest example of each row: what its conversation would be as one sequence
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)  # by the names of QUANTILES
    response_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return self.rows - self.dropped.total()

    def drop(self, why: Refused) -> None:
        """Count a row that is not used."""
        self.dropped[why.reason] += 1
        self.first.setdefault(why.reason, why.message)

    def reasons(self) -> str:
        """Why rows were dropped: "2 without a response, 1 without an instruction"."""
        return ", ".join(f"{n} {why}" for why, n in self.dropped.items())

    def first_message(self) -> str:
        return next(iter(self.first.values()), "")

    def check_half(self, yes: bool) -> None:
        """Raise ConfigError where fewer than half of the rows are used, unless `yes`."""
        if 2 * self.used < self.rows and not yes:
            raise ConfigError(
                f"{self.source}: only {self.used} of {self.rows} rows can be used: {self.reasons()}; the first: "
                f"{self.first_message()}; look with mskd data, or go ahead with --yes"
            )

    def lines(self) -> list[str]:
        """The counts in words; the first line alone is enough where all is well."""
        parts = ", ".join(f"{name} {count}" for name, count in self.splits.items() if count)
        named = ", ".join(f"{name} ({kind})" if name != kind else name for kind, name in self.columns.named.items())
        unread = ", ".join(self.columns.unread)
        further = [
            f"columns: {named}" + (f"; not read: {unread}" if unread else ""),
            *(f"dropped: {n} {why}; the first: {self.first[why]}" for why, n in self.dropped.items()),
            *(f"turns left out: {n} {why}" for why, n in self.turns_left_out.items()),
            *(f"prompts alone: {n} {why}" for why, n in self.prompts_alone.items()),
            *(line for wanted, line in self._remarks() if wanted),
        ]
        for what, tokens in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            if tokens:
                middle = f"5 % {tokens['p5']}, median {tokens['median']}, 95 % {tokens['p95']}"
                further.append(f"{what} tokens: {tokens['least']} to {tokens['most']} ({middle})")
        first = f"{self.source}: {self.used} of {self.rows} rows used" + (f" ({parts})" if parts else "")
        return [first, *(f"  {line}" for line in further)]

    def _remarks(self) -> list[tuple[Any, str]]:
        """What else may be said, each with whether there is reason to."""
        more = self.tokens / max(self.longest, 1)
        prompts, rows = self.repeated
        return [
            (self.unanswered, f"dropped, but prompts for minillm and evaluation: {self.unanswered}"),
            (self.earlier, f"earlier assistant turns that are not trained on: {self.earlier} (data.turns = 'last')"),
            (self.every_turn, f"assistant turns trained on: {self.turns} (data.turns = 'all')"),
            (self.every_turn, f"tokens in all: {self.tokens}, {more:.2f} times the conversations' own (docs/data.md)"),
            (self.several, f"rows with several references, trained on the first: {self.several}"),
            (self.cut, f"answers cut at data.max_tokens, without an end token: {self.cut}"),
            (self.apart, f"answers tokenised apart from their prompt, since a token would span both: {self.apart}"),
            (prompts, f"prompts that occur more than once: {prompts}, in {rows} rows"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The counts as a JSON document has them."""
        return {
            "rows": self.rows,
            "used": self.used,
            "dropped": dict(self.dropped),
            "turns": self.turns,
            "turns_left_out": dict(self.turns_left_out),
            "prompts_alone": dict(self.prompts_alone),
            "earlier_turns": self.earlier,
            "unanswered": self.unanswered,
            "cut": self.cut,
            "apart": self.apart,
            "several_references": self.several,
            "repeated_prompts": {"prompts": self.repeated[0], "rows": self.repeated[1]},
            "prompts_in_train_and_test": self.dropped[HELD_OUT],
            "splits": self.splits,
            "tokens": {"all": self.tokens, "prompt": dict(self.prompt_tokens), "response": dict(self.response_tokens)},
        }


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """The lengths that so many of them do not exceed, by name; of none: {}."""
    if not lengths:
        return {}
    values = np.quantile(np.array(lengths), list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, map(int, values), strict=True))
