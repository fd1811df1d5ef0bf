"""What the students of a run gained and what they cost: training time, machine hours, tokens.

    for path in stored.paths:
        print(cost(stored, path))

A path costs all its hops and the preparation of its models, also where another path shares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mskd.evaluation.columns import DASH, FORM, mean
from mskd.report.document import Table
from mskd.report.results import Stored, nodes_of, shown
from mskd.report.tables import duration, short

GAINS = (("Perplexity", "perplexity"), ("Reverse KL", "reverse_kl"), ("ROUGE-L", "rouge_l"))


@dataclass(frozen=True)
class Cost:
    """What one path took, the mean over its cells; None where it is not stored.

    seconds: wall time of the training; hours: of one device (wall hours x processes); tokens: response tokens in the
    losses of all optimizer steps; device: "CPU" or "GPU"; hardware: its names.
    """

    seconds: float | None
    hours: float | None
    tokens: float | None
    device: str
    hardware: tuple[str, ...]


def cost(stored: Stored, path: str) -> Cost:
    """The cost of one path."""
    cells = [nodes_of(cell, path) for cell in stored.cells if path in cell["nodes"]]
    trained = [[(node, stored.done(node)) for node in nodes if node.get("phases")] for nodes in cells]
    every = [pair for pairs in trained for pair in pairs]
    seconds = stored.seconds(path)
    tokens = [done.get("tokens") for _, done in every]
    hours = sum((node.get("seconds") or 0.0) * done.get("processes", 1) for node, done in every) / 3600
    here = (stored.index.get("hardware") or {}).get("device", "cpu")
    kinds = {str(done.get("device", here)).partition(":")[0] for _, done in every}
    return Cost(
        seconds,
        hours / len(cells) if cells else None,
        None if not cells or None in tokens else sum(t for t in tokens if t) / len(cells),
        " and ".join(sorted("CPU" if kind == "cpu" else "GPU" for kind in kinds)) or "CPU",
        tuple(dict.fromkeys(str(done["hardware"]) for _, done in every if "hardware" in done)),
    )


def table(stored: Stored) -> Table:
    """Cost and figures of every path; a gain is the student's figure before its last hop -> after it."""
    costs = {path: cost(stored, path) for path in stored.paths}
    device = " or ".join(dict.fromkeys(c.device for c in costs.values()))
    head = [
        "Path",
        "Training time",
        f"{device} hours",
        "Tokens",
        *[f"{title}: untrained → trained" for title, _ in GAINS],
    ]
    return Table(head, [_row(stored, path, c) for path, c in costs.items()])


def _row(stored: Stored, path: str, c: Cost) -> list[str]:
    stages = stored.stages(path)
    ends = [stored.figures(files, f"{shown(path)} {stage}") for stage, files in (stages[0], stages[-1])]
    row = [f"`{shown(path)}`", DASH if c.seconds is None else duration(c.seconds)]
    row += [DASH if c.hours is None else f"{c.hours:.3g}", DASH if c.tokens is None else short(c.tokens)]
    return row + [" → ".join(_value(f, field, path) for f in ends) for _, field in GAINS]


def _value(figures: Mapping[str, Any], field: str, path: str) -> str:
    value = mean(figures, field, path.split(">")[0])
    return DASH if value is None else FORM[field](value)


def note(stored: Stored) -> str:
    """What the columns of the table mean, and what the run as a whole took."""
    hardware = dict.fromkeys(name for path in stored.paths for name in cost(stored, path).hardware)
    nodes = [node for cell in stored.cells for node in cell["nodes"].values()]
    unique = {node.get("dir", key): node.get("seconds") or 0.0 for key, node in enumerate(nodes)}
    return (
        "A path's time covers all its hops and the preparation of its models, evaluation excluded, also where another "
        f"path shares them; trained once each, all models of this setting took {duration(sum(unique.values()))}. "
        "Hours: wall time x processes. Tokens: response tokens in the losses of all optimizer steps, repeated epochs "
        "counted again." + (f" Trained on: {', '.join(hardware)}." if hardware else "")
    )
