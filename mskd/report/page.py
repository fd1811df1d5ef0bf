"""A report as one HTML page that holds all it shows: no script, no font and no picture comes from elsewhere.

    html = page("demo", blocks, folder=Path("out/runs/demo"))

Its Content-Security-Policy forbids every request. Light and dark follow the reader's system; on a phone every row of
a table becomes a card of its own.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mskd.report.document import Attachment, Block, Code, Heading, Items, Picture, Table, Text, printable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5d6878; --line: #dde2e9; --page: #f6f7f9; --card: #fff;
  --code: #eef1f5; --accent: #0b63b0; --mid: #8f5a00; --low: #0a7a50; --best: #e9f3ec }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --soft: #9aa6b5; --line: #333c48; --page: #12161c;
  --card: #1a2028; --code: #252d38; --accent: #6cb2f5; --mid: #e8b04a; --low: #55c795; --best: #1d3328 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: break-word }
main { max-width: 74rem; margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 4rem }
h1 { font-size: 1.9rem; margin: 1rem 0 .5rem } h2 { font-size: 1.3rem; margin: 2.8rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--line) } h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem }
p, li { max-width: 62rem } .note { color: var(--soft); font-size: .87rem }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0; font-size: .92rem }
a { color: var(--accent) }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .87em; background: var(--code);
  border-radius: .3rem }
code { padding: .08em .3em } pre { padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  margin: .8rem 0 }
table { border-collapse: collapse; min-width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .7rem; text-align: right; vertical-align: top; white-space: nowrap }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom }
tr + tr td { border-top: 1px solid var(--line) } td.name, th.name { text-align: left }
td strong { background: var(--best); border-radius: .25rem; padding: .05em .25em }
td small { display: block; color: var(--soft); font-size: .78rem }
figure { margin: .8rem 0 } img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: .5rem;
  border: 1px solid var(--line) }
svg { display: block; font-family: system-ui, sans-serif }
svg .edge { fill: none; stroke: var(--soft); stroke-width: 1.6; opacity: .75 }
svg .box { fill: var(--card); stroke: var(--accent); stroke-width: 1.6 } svg .assistant .box { stroke: var(--mid) }
svg .student .box { stroke: var(--low) } svg text { fill: var(--text); font-size: 13px }
svg .title { font-weight: 650 } svg .soft { fill: var(--soft) } svg .best { font-weight: 700; fill: var(--low) }
@media (max-width: 600px) { thead { display: none } table, tbody, tr, td { display: block } tr { padding: .5rem 0 }
  tr + tr { border-top: 1px solid var(--line) } tr + tr td { border-top: 0 } td, td.name { display: flex; gap: .8rem;
  padding: .12rem .8rem; align-items: baseline; white-space: normal; text-align: right }
  td::before { content: attr(data-label); color: var(--soft); margin-right: auto; text-align: left }
  td small { display: inline } }
summary { cursor: pointer; color: var(--accent) } details pre { max-height: 30rem; overflow: auto }
"""


def page(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The whole page. Pictures are read from `folder`; OSError where one is missing."""
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{anchor(text)}">{inline(text)}</a>' for text in sections)
    parts = [_block(block, folder) for block in blocks]
    parts.insert(1, f"<nav>{links}</nav>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            name = f' id="{anchor(block.text)}"' if block.level == 2 else ""
            return f"<h{block.level}{name}>{inline(block.text)}</h{block.level}>"
        case Text():
            start = '<p class="note">' if block.note else "<p>"
            return f"{start}{inline(block.text)}</p>"
        case Items():
            return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in block.items)}</ul>"
        case Table():
            return _table(block)
        case Code():
            return f"<pre>{escape(printable(block.text))}</pre>"
        case Picture():
            return _picture(block, folder)
        case Attachment():
            file, text = escape(block.file), escape(printable(block.text))
            return f"<details><summary>All settings: {file}</summary><pre>{text}</pre></details>"


def _table(block: Table) -> str:
    """A table in a box that scrolls by itself; on a phone a cell is shown beside its label."""
    kinds = ["name"] * block.left + ["figure"] * (len(block.head) - block.left)
    titles = [re.sub("([,:]) ", r"\1 <br>", inline(text)) for text in block.head]
    head = "".join(f'<th class="{kind}">{title}</th>' for kind, title in zip(kinds, titles, strict=True))
    rows = "".join(f"<tr>{_cells(block, kinds, row)}</tr>" for row in block.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cells(block: Table, kinds: Sequence[str], row: Sequence[str]) -> str:
    """The cells of a row; an interval stands small after its figure."""
    texts = [re.sub(r" (\[[^\]<]*\])", r" <small>\1</small>", inline(cell)) for cell in row]
    cells = zip(kinds, block.head, texts, strict=True)
    return "".join(f'<td class="{k}" data-label="{escape(label)}"><span>{t}</span></td>' for k, label, t in cells)


def _picture(block: Picture, folder: Path) -> str:
    if block.svg:
        return f'<figure class="wide">{block.svg}</figure>'
    data = base64.b64encode((folder / block.file).read_bytes()).decode()
    return f'<figure><img alt="{escape(block.alt)}" src="data:image/png;base64,{data}"></figure>'


_INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*|\*(.+?)\*|\\(.)|([^`*\\]+|.)", re.DOTALL)


def inline(text: str) -> str:
    """Inline Markdown (document.py) as HTML."""
    parts = []
    for code, bold, emphasis, literal, plain in _INLINE.findall(text):
        tag, inside = ("code", escape(code)) if code else ("strong", bold) if bold else ("em", emphasis)
        if not (bold or emphasis or code):
            parts.append(escape(literal or plain))
        else:
            parts.append(f"<{tag}>{inside if code else inline(inside)}</{tag}>")
    return "".join(parts)


def anchor(text: str) -> str:
    """The id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
