"""One figure of dots: a row a shape, a colour a series. What kl_kernel and compare draw.

draw(path, "title", [Panel("ms", {"linear ...": {"eager": 2200.0, "ours": 1900.0}}, log=True)])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "os^Dv"


@dataclass(frozen=True)
class Panel:
    """Values of one unit: row -> {series: value}; `limit` is a line to compare with."""

    unit: str
    rows: Mapping[str, Mapping[str, float]]
    log: bool = False
    limit: float | None = None


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the panels side by side to a PNG; panels share their rows and the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = list(dict.fromkeys(name for panel in panels for row in panel.rows.values() for name in row))
    labels = list(dict.fromkeys(label for panel in panels for label in panel.rows))
    height = 1.4 + 0.5 * len(labels)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2 + 4.5 * len(panels), height), sharey=True, squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        _dots(axis, panel, series, labels)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines() if h.get_label() in series}
    figure.suptitle(title, fontsize=9)
    figure.legend([handles[s] for s in series], series, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.12 + 0.3 / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _decades(panel: Panel) -> float:
    values = [x for row in panel.rows.values() for x in row.values() if x > 0]
    return log10(max(values) / min(values)) if values else 0.0


def _dots(axis, panel: Panel, series: Sequence[str], labels: Sequence[str]) -> None:
    for i, name in enumerate(series):
        found = [(row[name], labels.index(label)) for label, row in panel.rows.items() if name in row]
        x, y = zip(*found, strict=True) if found else ((), ())
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        axis.plot(x, y, linestyle="", label=name, alpha=0.7, **style)
    if panel.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}" if _decades(panel) < 1 else "")
    if panel.limit is not None:
        axis.axvline(panel.limit, color="0.5", linewidth=1)
    axis.set_xlabel(panel.unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", color="0.9")
