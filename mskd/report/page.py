"""A report as one HTML page that holds all it shows: no script, no font and no picture comes from elsewhere.

    html = page("demo", blocks, folder=Path("out/runs/demo"))

page.html.j2 beside this file is the page: its Content-Security-Policy forbids every request, light and dark follow the
reader's system, on a phone every row of a table becomes a card of its own.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from mskd.report.document import Block, Heading, printable

# Of Markdown only what document.py names: no link, no HTML, no entity can come in by a text of others.
_MARKDOWN = MarkdownIt("zero").enable(["escape", "backticks", "emphasis"])


def page(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The whole page. Pictures are read from `folder`; OSError where one is missing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    environment.filters |= {
        "anchor": anchor,
        "base64": lambda file: base64.b64encode((folder / file).read_bytes()).decode(),
        "broken": lambda text: Markup(re.sub("([,:]) ", r"\1 <br>", str(text))),  # a long title in two lines
        "inline": inline,
        "printable": printable,
        "small_intervals": lambda text: Markup(re.sub(r" (\[[^\]<]*\])", r" <small>\1</small>", str(text))),
    }
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    return environment.get_template("page.html.j2").render(title=title, blocks=blocks, sections=sections)


def inline(text: str) -> Markup:
    """Inline Markdown (document.py) as HTML."""
    return Markup(_MARKDOWN.renderInline(text))


def anchor(text: str) -> str:
    """The id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
