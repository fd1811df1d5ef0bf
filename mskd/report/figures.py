"""The pictures of a report as PNG files in the run's folder, drawn with matplotlib from stored results.

    pictures = [losses(stored), reverse_kl(stored), validation(stored), graph(stored), gain(stored)]

Each gives the Picture to show, or None where there is nothing to draw; a picture of an earlier report goes then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mskd.evaluation.columns import FORM, TITLE, mean
from mskd.report.cost import cost
from mskd.report.document import Picture
from mskd.report.path_graph import GAP_X, HEIGHT, WIDTH, Spot, extent, layout, svg
from mskd.report.results import ON_POLICY, Stored, shown

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
STYLES = ("-", "--", "-.", ":")
BORDERS = {"teacher": "#0b63b0", "assistant": "#8f5a00", "student": "#0a7a50"}

Curves = dict[str, list[tuple[float, float]]]  # points by hop


# -- learning curves ------------------------------------------------------------------------------


def losses(stored: Stored) -> Picture | None:
    """One panel for each objective, the loss of every hop in it."""
    panels: dict[str, Curves] = {}
    for hop, line, x in _lines(stored):
        if (value := _number(line.get("train/loss"))) is not None:
            panels.setdefault(line.get("objective", ""), {}).setdefault(hop, []).append((x, value))
    titles = [f"{objective or 'training'}: loss" for objective in panels]
    return _curves(stored, "loss.png", "Loss of every hop", titles, list(panels.values()), ["loss"] * len(panels))


def reverse_kl(stored: Stored) -> Picture | None:
    """Reverse KL to the hop's teacher on the rollouts during the on-policy phases."""
    curves: Curves = {}
    for hop, line, x in _lines(stored):
        value = _number(line.get("train/reverse_kl"))
        if value is not None and line.get("objective", ON_POLICY[0]) in ON_POLICY:
            curves.setdefault(hop, []).append((x, value))
    title, label = "On-policy: reverse KL to the hop's teacher", "KL(student || teacher), nats per token"
    panels = [curves] if curves else []
    return _curves(stored, "reverse_kl.png", "Reverse KL of every hop", [title], panels, [label])


def validation(stored: Stored) -> Picture | None:
    """What was measured on the validation items during the training, a panel for each objective and figure."""
    panels: dict[tuple[str, str], Curves] = {}
    for hop, line, x in _lines(stored):
        for name in line:
            value = _number(line[name]) if name.startswith("eval/") else None
            if value is not None:
                panels.setdefault((line.get("objective", ""), name[5:]), {}).setdefault(hop, []).append((x, value))
    names = [TITLE.get(figure, figure) for _, figure in panels]
    titles = [
        f"{objective}: validation {n.lower() if n == 'loss' else n}"
        for (objective, _), n in zip(panels, names, strict=True)
    ]
    return _curves(stored, "validation.png", "Validation during the training", titles, list(panels.values()), names)


def _lines(stored: Stored) -> list[tuple[str, Mapping[str, Any], float]]:
    """Hop, line and step of the phase of every stored line of metrics."""
    lines = [(hop, line) for hop in stored.hops() for line in stored.metrics(hop)]
    return [(hop, line, line.get("phase_step", line["step"])) for hop, line in lines]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _curves(
    stored: Stored, file: str, alt: str, titles: Sequence[str], panels: Sequence[Curves], labels: Sequence[str]
) -> Picture | None:
    """A panel beside the other; a curve is a thin line of values under its running mean."""

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, title, curves, label in zip(grid, titles, panels, labels, strict=True):
            for hop, points in curves.items():
                _curve(axes, stored.hops().index(hop), shown(hop), points)
            axes.set(title=title, xlabel="optimizer step of the phase", ylabel=label)
            _plain(axes)
            axes.legend(frameon=False, fontsize=9)

    return _save(stored, file, alt, (max(6.5, 5.0 * len(panels)), 4.2), draw if panels else None)


def _curve(axes: Any, number: int, label: str, points: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    window = max(1, len(y) // 12)
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
    if window > 1:
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(x) < 12 else None
    axes.plot(x, _running_mean(y, window), label=label, linewidth=1.8, color=colour, linestyle=style, marker=marker)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the window - 1 before it (fewer at the start)."""
    parts = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# -- all paths ------------------------------------------------------------------------------------


def graph(stored: Stored) -> Picture:
    """The graph of all paths."""
    spots = layout(stored)
    width, height = extent(spots)

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        places = {s.key: s for s in spots}
        for s in spots:
            if s.above in places:
                _edge(axes, places[s.above], s)
            _box(axes, s)

    picture = _save(stored, "graph.png", "All paths, a node a model with its figures", (width / 92, height / 92), draw)
    assert picture is not None
    return Picture(picture.file, picture.alt, svg(spots))


def _edge(axes: Any, a: Spot, b: Spot) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    x, y, end = a.x + WIDTH, a.y + HEIGHT / 2, b.y + HEIGHT / 2
    points = [(x, y), (x + GAP_X / 2, y), (x + GAP_X / 2, end), (x + GAP_X, end), (b.x, end)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor="#8d97a5", linewidth=1.4))


def _box(axes: Any, s: Spot) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=8"
    box = FancyBboxPatch((s.x, s.y), WIDTH, HEIGHT, style, facecolor="white", edgecolor=BORDERS[s.kind], linewidth=1.5)
    axes.add_patch(box)
    axes.text(s.x + 12, s.y + 20, s.title, fontsize=9, fontweight="bold", va="center")
    for i, (name, value, best) in enumerate(s.lines):
        y, weight, colour = s.y + 40 + 18 * i, "bold" if best else "normal", BORDERS["student"] if best else "black"
        axes.text(s.x + 12, y, name, fontsize=8.5, color="#5d6878", va="center")
        axes.text(s.x + WIDTH - 12, y, value, fontsize=8.5, fontweight=weight, color=colour, ha="right", va="center")


# -- gain against cost ----------------------------------------------------------------------------


def gain(stored: Stored) -> Picture | None:
    """Figures of every student against its training time and its tokens, with 95 % intervals."""
    costs = {path: cost(stored, path) for path in stored.paths}
    sides = [
        ("training time, minutes", {path: c.seconds / 60 for path, c in costs.items() if c.seconds}),
        ("tokens trained on", {path: c.tokens for path, c in costs.items() if c.tokens}),
    ]
    figures = {path: stored.figures(stored.final(path), shown(path)) for path in stored.paths}
    fields = [f for f in ("reverse_kl", "perplexity") if any(mean(v, f, p.split(">")[0]) for p, v in figures.items())]
    sides = [side for side in sides if side[1]]

    def draw(figure: Any) -> None:
        grid = figure.subplots(len(fields), len(sides), squeeze=False)
        for row, field in zip(grid, fields, strict=True):
            for axes, (label, xs) in zip(row, sides, strict=True):
                _points(axes, field, xs, figures)
                axes.set(xlabel=label, ylabel=f"{TITLE[field]} (lower is better)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9, ncols=2)

    drawn = draw if fields and sides else None
    return _save(stored, "gain.png", "Gain against cost", (4.4 * len(sides), 3.0 * len(fields) + 0.6), drawn)


def _points(axes: Any, field: str, xs: Mapping[str, float], figures: Mapping[str, Mapping[str, Any]]) -> None:
    for number, (path, x) in enumerate(xs.items()):
        value = figures[path].get(field)
        value = (value or {}).get(path.split(">")[0]) if field == "reverse_kl" else value
        if value:
            error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "os^Dv"[number % 5]}
            axes.errorbar(x, value["mean"], yerr=error, capsize=3, linestyle="none", label=shown(path), **style)
            axes.annotate(
                FORM[field](value["mean"]), (x, value["mean"]), (7, 4), textcoords="offset points", fontsize=8
            )
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    _plain(axes)


# -- files ----------------------------------------------------------------------------------------


def _save(
    stored: Stored, file: str, alt: str, size: tuple[float, float], draw: Callable[[Any], None] | None
) -> Picture | None:
    """Draw and save one picture; without anything to draw, remove an old one."""
    path = stored.directory / file
    if draw is None:
        path.unlink(missing_ok=True)
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout=None if file == "graph.png" else "constrained")
    draw(figure)
    tmp = path.with_name(f".tmp-{file}")
    try:
        figure.savefig(tmp, format="png")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return Picture(file, alt)
