"""What is trained and tested on: examples, and how they are split.

split = draw(groups, 50, "0:test")
epoch = order(len(examples), 3, seed)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from mskd.data.conversations import Refused
from mskd.data.counts import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
# Around a special token that the data spells out, which is text and no token; no characters of any language.
OPEN, CLOSE = "\U0010fff0", "\U0010fff1"
SPELLED_OUT = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One prompt and its answer. response_ids: of the first reference, with the end token unless cut at max_tokens."""

    prompt: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # () where there is no response
    references: tuple[str, ...]


@dataclass(frozen=True)
class Spelled:
    """An exchange in text and ids, before it is cut to length. Without an answer, `lacks` says why.

    The texts have marks around special tokens that the data spells out.
    """

    prompt: str
    begins: str  # what the tokenizer puts before the prompt
    prompt_ids: list[int]
    answer: str = ""  # with its end token
    answer_ids: tuple[int, ...] = ()
    reference: str = ""  # the answer as a model's own is decoded: without special tokens
    apart: bool = False  # a token of the whole conversation would span the place where prompt and answer meet
    lacks: Refused | None = None


@dataclass(frozen=True)
class Item:
    """An example with where it comes from, and its texts with special tokens, with marks as in `Spelled`."""

    example: Example
    row: int  # from 1
    turn: int  # the answer's place among the assistant turns of its row, from 1
    prompt: str
    answer: str  # all of it, where the example's ids are cut too
    cut: bool


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of examples. No prompt of a later set is in an earlier one."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    fingerprint: str  # sha256 of everything above and of the plain text; of content, not of paths
    counts: Counts | None = field(default=None, compare=False)  # what became of the rows


def draw(items: Sequence[T], count: int, salt: str) -> list[T]:
    """`count` items drawn by the salt."""
    return [items[i] for i in shuffled(len(items), salt)[:count]]


def order(n: int, epoch: int, seed: int) -> list[int]:
    """The order of n items in an epoch, the same on every machine."""
    return shuffled(n, f"{seed}:{epoch}")


def shuffled(n: int, salt: str) -> list[int]:
    """A permutation that is the same on every machine and in every version of Python."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{salt}:{i}".encode()).digest())


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def special_tokens(tokenizer: PreTrainedTokenizerBase, *others: str) -> re.Pattern[str]:
    """Finds the special tokens of a tokenizer, and others, in a text, of two that begin alike the longer one."""
    names = [*(token.content for token in tokenizer.added_tokens_decoder.values() if token.special), *others]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
