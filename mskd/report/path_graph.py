"""All paths of a run as one graph, a node a model with its figures; drawn here as SVG, in figures.py as PNG.

    nodes = layout(stored)
    text = svg(nodes)

From left to right models get smaller, each name has a column; a model reached along two paths is two nodes, for these
are two models. Children stand below one another, a parent at the middle of its children. An edge bends before the next
column and then follows the row of its child, where no other node stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from mskd.evaluation.columns import DASH, FORM, mean
from mskd.report.results import Stored, shown
from mskd.report.tables import best_paths, parameters

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 168, 92, 64, 20, 12  # of a node and around it, in SVG units
FIGURES = (("perplexity", "Perplexity"), ("reverse_kl", "Reverse KL"), ("rouge_l", "ROUGE-L"))


@dataclass(frozen=True)
class Spot:
    """One node of the graph: its place, upper left corner, and what stands in it."""

    key: str
    kind: str  # teacher, assistant, student
    x: float
    y: float
    title: str
    lines: tuple[tuple[str, str, bool], ...]  # name, value, whether it is the best

    @property
    def above(self) -> str:
        return self.key.rpartition(">")[0]


def layout(stored: Stored) -> list[Spot]:
    """A spot for every model of every path, parents before children."""
    keys = stored.models()
    columns, rows = _columns(stored), _rows(keys)
    figures = {key: stored.figures(stored.final(key), shown(key)) for key in keys}
    best = best_paths(stored, figures)
    spots = []
    for key in keys:
        top, name = key.split(">")[0], key.split(">")[-1]
        lines = []
        for field, title in FIGURES:
            value = mean(figures[key], field, top)
            lines.append((title, DASH if value is None else FORM[field](value), key in best[field]))
        kind = "teacher" if key == top else "student" if key in stored.paths else "assistant"
        size = stored.nodes.get(key, stored.nodes.get(name, {})).get("parameters")
        x = MARGIN + columns[name] * (WIDTH + GAP_X)
        y = MARGIN + rows[key] * (HEIGHT + GAP_Y)
        spots.append(Spot(key, kind, x, y, f"{_fitting(name)}, {parameters(size)}", tuple(lines)))
    return spots


def _fitting(name: str) -> str:
    """A name that fits into a node; the whole one is in its tooltip."""
    return name if len(name) <= 14 else f"{name[:13]}…"


def _columns(stored: Stored) -> dict[str, int]:
    """The column of every model's name: right of all that stand above it on a path; students share the last one."""
    columns: dict[str, int] = {}
    for _ in stored.paths:  # as often as a path can push another to the right
        for path in stored.paths:
            names = path.split(">")
            for i, name in enumerate(names):
                columns[name] = max(columns.get(name, 0), columns[names[i - 1]] + 1 if i else 0)
    last = max(columns.values())
    return columns | {path.split(">")[-1]: last for path in stored.paths}


def _rows(keys: list[str]) -> dict[str, float]:
    """The row of every key: leaves one below the other, a parent amid its children."""
    children = {key: [k for k in keys if k.rpartition(">")[0] == key] for key in keys}
    rows: dict[str, float] = {}
    leaves = 0

    def place(key: str) -> float:
        nonlocal leaves
        below = [place(child) for child in children[key]]
        if not below:
            leaves += 1
        rows[key] = (below[0] + below[-1]) / 2 if below else leaves - 1
        return rows[key]

    for key in keys:
        if ">" not in key:
            place(key)
    return rows


def extent(spots: list[Spot]) -> tuple[float, float]:
    """Width and height of the drawing."""
    return max(s.x for s in spots) + WIDTH + MARGIN, max(s.y for s in spots) + HEIGHT + MARGIN


def svg(spots: list[Spot]) -> str:
    """The graph as inline SVG; its colours are the page's."""
    width, height = extent(spots)
    places = {s.key: s for s in spots}
    edges = [_edge(places[s.above], s) for s in spots if s.above in places]
    label = "All paths: " + ", ".join(shown(s.key) for s in spots if s.kind == "student")
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(edges)}{"".join(map(_box, spots))}</svg>'
    )


def _edge(a: Spot, b: Spot) -> str:
    x, y, end_x, end_y = a.x + WIDTH, a.y + HEIGHT / 2, b.x, b.y + HEIGHT / 2
    curve = f"C{x + GAP_X / 2:g} {y:g} {x + GAP_X / 2:g} {end_y:g} {x + GAP_X:g} {end_y:g}"
    return f'<path class="edge" d="M{x:g} {y:g} {curve} H{end_x:g}"/>'


def _box(s: Spot) -> str:
    parts = [f'<title>{escape(shown(s.key))}</title><rect class="box" rx="8" width="{WIDTH}" height="{HEIGHT}"/>']
    parts.append(f'<text class="title" x="12" y="22">{escape(s.title)}</text>')
    for i, (name, value, best) in enumerate(s.lines):
        y = 44 + 18 * i
        parts.append(f'<text class="soft" x="12" y="{y}">{name}</text>')
        kind = "best" if best else "value"
        parts.append(f'<text class="{kind}" x="{WIDTH - 12}" y="{y}" text-anchor="end">{value}</text>')
    return f'<g class="{s.kind}" transform="translate({s.x:g} {s.y:g})">{"".join(parts)}</g>'
