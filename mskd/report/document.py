"""A report as blocks, and their Markdown; page.py writes the same blocks as HTML.

    markdown([Heading(1, "demo"), Text("Two *paths*."), Table(["Path", "ROUGE-L"], [["`a > b`", "**21.0** [19, 23]"]])])

Running text and cells are inline Markdown: `code`, **bold**, *emphasis*, and a backslash before any other character
that would mean something (`escaped`). Code and attachments hold any text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; a note explains a table or a picture."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Items:
    """A list with bullets."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first `left` columns are names, to the left; the others figures, to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report; the page shows `svg` in its place where there is one."""

    file: str
    alt: str
    svg: str = ""


@dataclass(frozen=True)
class Attachment:
    """A text file beside the report: Markdown has a link to it, the page the text itself, folded."""

    file: str
    text: str


Block = Heading | Text | Items | Table | Code | Picture | Attachment


def markdown(blocks: Iterable[Block]) -> str:
    """The blocks as one Markdown file."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Items():
            return "\n".join(f"- {item}" for item in block.items)
        case Table():
            return table(block)
        case Code():
            return fenced(block.text)
        case Picture():
            return f"![{block.alt}]({block.file})"
        case Attachment():
            return f"All settings: [{block.file}]({block.file})"


def table(block: Table) -> str:
    """A Markdown table."""
    rule = "|" + "|".join(["---"] * block.left + ["---:"] * (len(block.head) - block.left)) + "|"
    head, *rows = ("| " + " | ".join(map(_cell, row)) + " |" for row in [block.head, *block.rows])
    return "\n".join([head, rule, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def fenced(text: str) -> str:
    """Text shown as it is: a code block whose fence is longer than any run of backticks in it."""
    text = printable(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def printable(text: str) -> str:
    """Text without control characters; "(empty)" where nothing is left."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t") or "(empty)"


def escaped(text: str) -> str:
    """Text in running Markdown: characters that would mean something there are escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
