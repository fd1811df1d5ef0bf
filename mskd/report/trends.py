"""Statistics over the many students of a run: spread over seeds, differences between methods, what teachers predict.

    for table in (spread(settings), variance(settings), correlations(settings)): ...

settings: `results.settings(run)`. A method is a setting and a path. Every table is None where there are too few
students for it: spread and one-way ANOVA need seeds, Spearman's rank correlation MIN_PAIRS students.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mskd.evaluation.columns import FORM, TITLE, mean
from mskd.evaluation.statistics import anova, spearman
from mskd.report.document import Table, escaped
from mskd.report.results import Stored, shown
from mskd.report.tables import p_value

FIELDS = ("rouge_l", "perplexity", "agreement", "reverse_kl")
MIN_PAIRS = 4  # of a rank correlation; with three every order has p >= 1/3

NOTE = """\
Mean and standard deviation over the seeds. ANOVA: one-way, over the methods' students, one value a seed (its mean over
the items). Spearman: rank correlation between the students of one start and what trained them, one pair a student; p by
a t approximation, rough for few pairs; students of shared hops are not independent. These p-values are not corrected
for their number."""


def grid_text(grid: Mapping[str, Any]) -> str:
    """A setting in words, as inline Markdown."""
    return ", ".join(f"`{key} = {str(value).replace('`', '')}`" for key, value in grid.items())


def values(stored: Stored, path: str, field: str) -> list[float]:
    """The figure of a path's student in every cell that has it."""
    found = [figure_of(cell, path, field) for cell in stored.each()]
    return [v for v in found if v is not None]


def figure_of(cell: Stored, key: str, field: str) -> float | None:
    """One figure of one model, against the top teacher where it is a comparison."""
    return mean(cell.figures(cell.final(key), shown(key)), field, key.split(">")[0])


def spread(settings: Sequence[Stored]) -> Table | None:
    """Mean and standard deviation over the seeds of every method."""
    if max(len(stored.cells) for stored in settings) < 2:
        return None
    rows = []
    for stored in settings:
        for path in stored.paths:
            groups = {field: values(stored, path, field) for field in FIELDS}
            cells = [_mean_and_deviation(group, field) for field, group in groups.items()]
            method = [grid_text(stored.grid)] if len(settings) > 1 else []
            rows.append([*method, f"`{shown(path)}`", str(max(map(len, groups.values()))), *cells])
    names = ["Setting", "Path"] if len(settings) > 1 else ["Path"]
    return Table([*names, "Seeds", *[TITLE[f] for f in FIELDS]], rows, left=len(names))


def _mean_and_deviation(group: Sequence[float], field: str) -> str:
    if not group:
        return "–"
    centre = math.fsum(group) / len(group)
    if len(group) < 2:
        return FORM[field](centre)
    deviation = math.sqrt(math.fsum((v - centre) ** 2 for v in group) / (len(group) - 1))
    return f"{FORM[field](centre)} ± {FORM[field](deviation)}"


def variance(settings: Sequence[Stored]) -> Table | None:
    """One-way ANOVA over the methods: do their students differ by more than the seeds do?"""
    rows = []
    for name, methods in _families(settings).items():
        for field in FIELDS:
            groups = [group for stored, path in methods if len(group := values(stored, path, field)) > 1]
            test = anova(groups)
            if test:
                count = sum(map(len, groups))
                rows.append(
                    [name, TITLE[field], str(test["groups"]), str(count), f"{test['f']:.2f}", p_value(test["p"])]
                )
    return Table(["Students", "Figure", "Methods", "Students in all", "F", "p"], rows) if rows else None


def correlations(settings: Sequence[Stored]) -> Table | None:
    """Spearman between a student's figures and the perplexity and the size of the model that trained it."""
    rows = []
    for name, methods in _families(settings).items():
        for field in FIELDS:
            pairs = [pair for stored, path in methods for pair in _pairs(stored, path, field)]
            for i, what in ((1, "its teacher's perplexity"), (2, "its teacher's parameters")):
                known = [(pair[0], pair[i]) for pair in pairs if pair[i] is not None]
                test = spearman(*map(list, zip(*known, strict=True))) if len(known) >= MIN_PAIRS else None
                if test:
                    rho = f"{test['rho']:+.2f}"
                    rows.append([name, TITLE[field], what, str(test["pairs"]), rho, p_value(test["p"])])
    return Table(["Students", "Figure", "Against", "Pairs", "rho", "p"], rows, left=3) if rows else None


def _families(settings: Sequence[Stored]) -> dict[str, list[tuple[Stored, str]]]:
    """The methods whose students may be compared: those of one name and top teacher, or of one start."""
    families: dict[str, list[tuple[Stored, str]]] = {}
    for stored in settings:
        for path in stored.paths:
            first = stored.rivals(path)[0]
            families.setdefault(f"`{escaped(first.split('>')[-1])}`", []).append((stored, path))
    return families


def _pairs(stored: Stored, path: str, field: str) -> list[tuple[float, float | None, float | None]]:
    """(figure of the student, perplexity of its hop's teacher, parameters of that teacher) in every cell."""
    above, found = path.rpartition(">")[0], []
    for cell in stored.each():
        value = figure_of(cell, path, field)
        if value is not None:
            size = cell.nodes.get(above, {}).get("parameters")
            found.append((value, figure_of(cell, above, "perplexity"), size))
    return found
