"""The stored results of a run: its index, evaluations and metrics on disk, and the comparisons made from them.

    stored = Stored(Path("out/runs/demo"))          # settings(run) where a run is a sweep
    tests = comparisons(stored)

Only files are read, no model. Of what is not there the figures are None, and `Stored.absent` names it.

A run is one cell, a sweep several: a cell is a seed and a setting, the values of the grid. The cells of one setting are
read together: an item's value is the mean over them.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.evaluation.statistics import (
    Lines,
    holm,
    item_values,
    paired_bootstrap,
    paired_permutation,
    read_evaluation,
    summarize,
)
from mskd.store.done import METRICS, changed_since, read_own
from mskd.store.reading import Damaged, parsed, read_text
from mskd.store.records import Index, Step, checked, read_record
from mskd.store.run_config import read_config

Files = tuple[str, ...]  # the evaluations of one model, a file for each cell; empty where there is none

ON_POLICY = ("minillm", "lmops", "gkd", "distillm")  # phases that train on the student's own samples
COMPARED = ("rouge_l", "perplexity", "reverse_kl")  # what students of two paths are compared by
LEVEL = 0.05  # of significance, after Holm's correction over a run's comparisons


class Stored:
    """A run's stored files, read once each. `absent` collects what was looked for in vain.

    grid: which setting of a sweep, its values of the grid; by default the first one. `cells` are its cells, one for
    each seed; `nodes` those of the first. Raises ConfigError where `run` is no run or its index is damaged.
    """

    def __init__(self, run: Path, grid: Mapping[str, Any] | None = None) -> None:
        self.directory, self.out = Path(run), Path(os.path.realpath(run)).parent.parent
        self.index = _read_index(self.directory)
        cells = self.index.get("cells") or [{"nodes": self.index["nodes"], "evals": self.index.get("evals", [])}]
        self.grid = dict(cells[0].get("grid") or {}) if grid is None else dict(grid)
        self.cells = [cell for cell in cells if dict(cell.get("grid") or {}) == self.grid]
        self.name, self.nodes = self.index["name"], self.cells[0]["nodes"]
        self.seeds = [cell["seed"] for cell in self.cells if "seed" in cell]
        self.paths = list(dict.fromkeys(">".join(path) for path in self.index["paths"]))
        self.data: str | None = None  # a further data set, whose evaluations `final` gives instead
        self.absent: list[str] = []
        self._digests = {e["file"]: e["digest"] for c in cells for e in c.get("evals", []) if "digest" in e}
        self._lines: dict[str, Lines | None] = {}
        self._missed: set[str] = set()
        self._figures: dict[Files, dict[str, Any]] = {}
        self._config: tuple[dict[str, Any], str] | None = None
        self._done: dict[str, dict[str, Any] | None] = {}
        self._metrics: dict[str, list[dict[str, Any]]] = {}

    def each(self) -> list[Stored]:
        """The cells one by one."""
        views = [copy.copy(self) for _ in self.cells]
        for view, cell in zip(views, self.cells, strict=True):
            view.cells, view.nodes = [cell], cell["nodes"]
        return views

    def on(self, data: str) -> Stored:
        """The same run, its finished models as they were evaluated on a further data set."""
        view = copy.copy(self)
        view.data = data
        return view

    def further(self) -> list[str]:
        """The further data sets on which the finished models were evaluated."""
        return list(dict.fromkeys(e["data"] for cell in self.cells for e in cell.get("evals", []) if e.get("data")))

    def models(self) -> list[str]:
        """Every model of the table by key, each after the models above it."""
        prefixes = [">".join(path.split(">")[:n]) for path in self.paths for n in range(1, len(path.split(">")) + 1)]
        return list(dict.fromkeys(prefixes))

    def hops(self) -> list[str]:
        return [key for key in self.models() if ">" in key]

    def start(self, path: str) -> str:
        """What the last model of a path begins from: paths that share it and the top teacher may be compared."""
        name = self.nodes.get(path, {}).get("student", path.split(">")[-1])
        return self.nodes.get(name, {}).get("hash", name)

    def rivals(self, path: str) -> list[str]:
        """The paths, itself among them, whose students began as the same model under the same top teacher."""
        own = (path.split(">")[0], self.start(path))
        return [p for p in self.paths if (p.split(">")[0], self.start(p)) == own]

    def direct(self, path: str) -> str | None:
        """The direct hop that a path is judged against: of a chain the one to its model's name; else the first one."""
        found = [p for p in self.rivals(path) if p.count(">") == 1]
        same = [p for p in found if p.split(">")[-1] == path.split(">")[-1] and p != path]
        return next(iter(same or found), None)

    def stages(self, hop: str) -> list[tuple[str, Files]]:
        """(stage, evaluation files) of a hop in order: initial, after each phase, final."""
        names = ["initial", *[f"after {p}" for p in self.nodes.get(hop, {}).get("phases", [])[:-1]], "final"]
        found = [_stage_files(cell, hop, names) for cell in self.cells]
        return [
            (name, tuple(f for f in files if f)) for name, files in zip(names, zip(*found, strict=True), strict=True)
        ]

    def final(self, key: str) -> Files:
        """The evaluation files of a finished model."""
        if self.data is None and (self.nodes.get(key, {}).get("kind") == "hop" or ">" in key):
            return self.stages(key)[-1][1]
        entries = [[e["file"] for e in _evals(cell, self.data) if e["node"] == key] for cell in self.cells]
        return tuple(files[-1] for files in entries if files)

    def check(self) -> None:
        """Read all that a report is made of, so that damage is found before anything is drawn or written."""
        self.config()
        for cell in self.cells:
            for entry in cell.get("evals", []):
                self._read(entry["file"])
            for node in cell["nodes"].values():
                self._read_done(node["dir"])

    def lines(self, files: Files, what: str) -> Lines | None:
        """The lines of all files together; None where there is none of them."""
        if not files:
            self.miss(f"the evaluation of {what}")
        found = {file: self._read(file) for file in files}
        for file, lines in found.items():
            if lines is None and file not in self._missed:
                self._missed.add(file)
                self.miss(f"the evaluation of {what}: the file is not there ({file})")
        return [line for lines in found.values() for line in lines or []] or None

    def _read(self, file: str) -> Lines | None:
        """The lines of an evaluation file; None where it is not there. Raises Damaged."""
        if file not in self._lines:
            try:
                self._lines[file], found = read_evaluation(self.out / file)
                if self._digests.get(file, found) != found:
                    raise Damaged(self.out / file, "it is not the evaluation that index.json names")
            except FileNotFoundError:
                self._lines[file] = None
        return self._lines[file]

    def figures(self, files: Files, what: str) -> dict[str, Any]:
        """`summarize` of the files, {} where they are absent."""
        lines = self.lines(files, what)
        if lines is None:
            return {}
        if files not in self._figures:
            self._figures[files] = summarize(lines)
            if self._figures[files]["rouge_l"] is None:
                items = "the test items" if self.data is None else self.data
                self.miss(f"references of {items}, which ROUGE-L, perplexity and agreement need")
        return self._figures[files]

    def teacher_of(self, hop: str, figures: Mapping[str, Any]) -> str | None:
        """Under which name the evaluation holds the teacher of a hop: its model's name, or the key of its node."""
        key = self.nodes.get(hop, {}).get("teacher") or ">".join(hop.split(">")[:-1])
        names = [self.nodes.get(key, {}).get("name"), key, key.split(">")[-1]]
        return next((n for n in names if n in figures.get("reverse_kl", {})), None)

    def metrics(self, hop: str) -> list[dict[str, Any]]:
        """The lines of a hop's metrics.jsonl (the first cell's); none where they are not what the training wrote."""
        folder = self.nodes.get(hop, {}).get("dir", hop)
        if folder not in self._metrics:
            self._metrics[folder] = self._read_metrics(hop, folder)
        return self._metrics[folder]

    def _read_metrics(self, hop: str, folder: str) -> list[dict[str, Any]]:
        path = self.out / folder / METRICS
        done = self._read_done(folder) or {}
        try:
            if METRICS in changed_since(path.parent, done):
                raise Damaged(path, "it is not what the training wrote")
            *texts, _ = read_text(path).split("\n")  # behind the last end of a line stands what a kill tore, or nothing
            lines = [parsed(text, path, number) for number, text in enumerate(texts, 1)]
            return [checked(Step, line, path, number) for number, line in enumerate(lines, 1)]
        except FileNotFoundError:
            self.miss(f"the metrics of {shown(hop)}")
        except Damaged as e:
            self.miss(f"the metrics of {shown(hop)}: {folder}/{METRICS} is damaged: {e.what}")
        return []

    def seconds(self, path: str) -> float | None:
        """Training time of a path, the sum over its hops and the preparation of its models; the mean over the cells."""
        times = [
            [n.get("seconds") or 0.0 for n in nodes_of(cell, path)] for cell in self.cells if path in cell["nodes"]
        ]
        return sum(map(math.fsum, times)) / len(times) if times else None

    def done(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """done.json of a node, {} where it is absent."""
        done = self._read_done(node["dir"])
        if done is None:
            self.miss(f"done.json of {node['dir']}, which holds its tokens")
        return done or {}

    def _read_done(self, folder: str) -> dict[str, Any] | None:
        """done.json of a node's folder; None where it is absent. Raises Damaged."""
        if folder not in self._done:
            try:
                self._done[folder] = read_own(self.out / folder)
            except FileNotFoundError:
                self._done[folder] = None
        return self._done[folder]

    def config(self) -> tuple[dict[str, Any], str]:
        """config.toml as a tree and as text, both empty where it is absent. Raises Damaged."""
        if self._config is None:
            self._config = {}, ""
            try:
                _, text = read_config(self.directory / "config.toml")
                self._config = tomllib.loads(text), text
            except FileNotFoundError:
                self.miss("config.toml, the configuration of the run")
            except Damaged:
                raise
            except ConfigError as e:  # one of another version, perhaps
                self.miss(f"config.toml, the configuration of the run: {e}")
        return self._config

    def miss(self, what: str) -> None:
        if what not in self.absent:
            self.absent.append(what)


def settings(run: Path) -> list[Stored]:
    """The settings of a sweep in its order; a single one for a run without a grid."""
    first = Stored(run)
    grids = [dict(cell.get("grid") or {}) for cell in first.index.get("cells") or []]
    return [first, *(Stored(run, g) for n, g in enumerate(grids) if g != first.grid and g not in grids[:n])]


def _read_index(directory: Path) -> dict[str, Any]:
    """index.json, if it is one. Raises ConfigError."""
    path = directory / "index.json"
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no run: it is no folder; give a folder like OUT/runs/NAME")
    try:
        return read_record(Index, path)
    except FileNotFoundError:
        raise ConfigError(f"{directory} is no run: it has no index.json; give a folder like OUT/runs/NAME") from None
    except Damaged as e:
        raise Damaged(e.path, e.what, "run the same mskd distill again, which writes it anew") from None


def _evals(cell: Mapping[str, Any], data: str | None = None) -> list[Mapping[str, Any]]:
    """A cell's evaluations on the run's own test items, or on a further data set."""
    return [e for e in cell.get("evals", []) if e.get("data") == data]


def _stage_files(cell: Mapping[str, Any], hop: str, names: list[str]) -> list[str | None]:
    """The evaluation file of each stage of a hop in one cell."""
    own = [e for e in _evals(cell) if e["node"] == hop]
    start = [e for e in _evals(cell) if e["node"] == cell["nodes"].get(hop, {}).get("student")]
    files = []
    for name in names:
        # The start of a hop is a model of its own, evaluated once for all hops that begin with it.
        entries = [e for e in own if e["stage"] == name] or (start[-1:] if name == "initial" else [])
        if entries and entries[0] in own:
            own.remove(entries[0])
        files.append(entries[0]["file"] if entries else None)
    return files


def nodes_of(cell: Mapping[str, Any], path: str) -> list[Mapping[str, Any]]:
    """The nodes that a path needs in one cell: its models and its hops."""
    names = path.split(">")
    keys = [*names, *[">".join(names[:n]) for n in range(2, len(names) + 1)]]
    return [cell["nodes"][k] for k in keys if k in cell["nodes"]]


def shown(key: str) -> str:
    """A node's key as text: teacher > ta > student."""
    return " > ".join(key.split(">"))


# -- what a hop changed, and paths compared -----------------------------------------------------------


def on_policy(stored: Stored, hop: str) -> dict[str, Any] | None:
    """What the on-policy phases of a hop changed, or None where it has none.

    stages: the names of the stages around them; before, after: `summarize` of these ({} where absent); teacher: the
    name of the hop's teacher; reverse_kl, reverse_kl_top: paired bootstrap (after - before, over items) against the
    hop's teacher and the top one, or None.
    """
    phases, stages = stored.nodes.get(hop, {}).get("phases", []), stored.stages(hop)
    places = [i for i, phase in enumerate(phases) if phase.split()[0] in ON_POLICY]
    if not places:
        return None
    (first, file_before), (last, file_after) = stages[places[0]], stages[places[-1] + 1]
    before = stored.figures(file_before, f"{shown(hop)} {first}")
    after = stored.figures(file_after, f"{shown(hop)} {last}")
    own = stored.teacher_of(hop, after) or stored.teacher_of(hop, before)
    teachers = {"reverse_kl": own, "reverse_kl_top": hop.split(">")[0]}
    return {
        "stages": (first, last),
        "before": before,
        "after": after,
        "teacher": teachers["reverse_kl"],
        **{name: paired(stored, file_after, file_before, teacher) for name, teacher in teachers.items()},
    }


def paired(stored: Stored, a: Files, b: Files, teacher: str | None, field: str = "reverse_kl") -> Any:
    """Paired bootstrap of a - b between two evaluations on one field, or None where a side has no value."""
    sides = _sides(stored, a, b, teacher, field)
    return paired_bootstrap(*sides) if sides else None


def _sides(stored: Stored, a: Files, b: Files, teacher: str | None, field: str) -> Any:
    """The values by item of two evaluations; None unless both have them for the same items."""
    if not a or not b or (field == "reverse_kl" and teacher is None):
        return None
    sides = [_item_values(stored.lines(files, files[0]) or [], field, teacher) for files in (a, b)]
    return sides if sides[0] and sides[0].keys() == sides[1].keys() else None


def _item_values(lines: Lines, field: str, teacher: str | None) -> dict[int, float]:
    """`item_values`; for perplexity an item's share in its logarithm, so that the mean is that of the whole set."""
    if field != "perplexity":
        return item_values(lines, field, teacher)
    nll, tokens = item_values(lines, "nll"), item_values(lines, "tokens")
    scale = len(nll) / math.fsum(tokens[i] for i in nll) if nll else 0.0
    return {item: value * scale for item, value in nll.items()}


def comparisons(stored: Stored) -> list[dict[str, Any]]:
    """Every two paths whose students may be compared (`Stored.rivals`), item by item on every field of COMPARED.

    For each: a, b (paths), field, paired_bootstrap's keys for a - b (of perplexity its logarithm's), p (paired
    permutation test) and p_holm (corrected over all comparisons of the setting).
    """
    found = []
    for a, b in itertools.combinations(stored.paths, 2):
        for field in COMPARED if b in stored.rivals(a) else ():
            teacher = a.split(">")[0] if field == "reverse_kl" else None
            sides = _sides(stored, stored.final(a), stored.final(b), teacher, field)
            if sides and len(sides[0]) > 1:
                found.append({"a": a, "b": b, "field": field, **paired_bootstrap(*sides)})
                found[-1]["p"] = paired_permutation(*sides)
    for test, corrected in zip(found, holm([test["p"] for test in found]), strict=True):
        test["p_holm"] = corrected
    return found
