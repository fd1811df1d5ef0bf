"""The stored results of a run: its index, evaluations and metrics on disk, and the figures and checks made from them.

    stored = Stored(Path("out/runs/demo"))
    document = summary(Path("out/runs/demo"))       # what the last line of `mskd distill` prints

Only files are read, no model. Of what is not there the figures are None, and `Stored.absent` names it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.statistics import Lines, holm, item_values, paired_bootstrap, paired_permutation, read_lines, summarize

ON_POLICY = ("minillm", "lmops")
COMPARED = ("rouge_l", "reverse_kl")  # what students of two paths are compared by
LEVEL = 0.05  # of significance, after Holm's correction over a run's comparisons
# What a student must reach; the summary says for each whether it did.
PERPLEXITY_GAIN, PERPLEXITY_RISE, ANSWER_KEPT = 5.0, 1.2, 0.75


class Stored:
    """A run's stored files, read once each. `absent` collects what was looked for in vain."""

    def __init__(self, run: Path) -> None:
        self.directory, self.out = Path(run), Path(run).resolve().parent.parent
        try:
            self.index = json.loads((self.directory / "index.json").read_text(encoding="utf-8"))
            self.name, self.nodes = self.index["name"], self.index["nodes"]
            self.paths = [">".join(path) for path in self.index["paths"]]
        except OSError:
            raise ConfigError(f"{run} is no run: it has no index.json; give a folder like OUT/runs/NAME") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{run} is damaged: index.json cannot be read; run the same mskd distill again") from None
        self.absent: list[str] = []
        self._lines: dict[str, Lines | None] = {}
        self._figures: dict[str, dict[str, Any]] = {}

    def models(self) -> list[str]:
        """Every model of the table by key, each after the models above it."""
        prefixes = [">".join(path.split(">")[:n]) for path in self.paths for n in range(1, len(path.split(">")) + 1)]
        return list(dict.fromkeys(prefixes))

    def stages(self, hop: str) -> list[tuple[str, str | None]]:
        """(stage, evaluation file or None) of a hop in order: initial, after each phase, final."""
        node = self.nodes.get(hop, {})
        names = ["initial", *[f"after {p}" for p in node.get("phases", [])[:-1]], "final"]
        own = [e for e in self.index.get("evals", []) if e["node"] == hop]
        start = [e for e in self.index.get("evals", []) if e["node"] == node.get("student")]
        found = []
        for name in names:
            # The start of a hop is a model of its own, evaluated once for all hops that begin with it.
            entries = [e for e in own if e["stage"] == name] or (start[-1:] if name == "initial" else [])
            if entries and entries[0] in own:
                own.remove(entries[0])
            found.append((name, entries[0]["file"] if entries else None))
        return found

    def final(self, key: str) -> str | None:
        """The evaluation file of a finished model."""
        if self.nodes.get(key, {}).get("kind") == "hop" or ">" in key:
            return self.stages(key)[-1][1]
        entries = [e for e in self.index.get("evals", []) if e["node"] == key]
        return entries[-1]["file"] if entries else None

    def lines(self, file: str | None, what: str) -> Lines | None:
        if file is None:
            self.miss(f"the evaluation of {what}")
            return None
        if file not in self._lines:
            try:
                self._lines[file] = read_lines(self.out / file)
            except (OSError, ValueError) as e:
                reason = "the file is not there" if isinstance(e, FileNotFoundError) else "the file cannot be read"
                self.miss(f"the evaluation of {what}: {reason} ({file})")
                self._lines[file] = None
        return self._lines[file]

    def figures(self, file: str | None, what: str) -> dict[str, Any]:
        """`summarize` of a file, {} where it is absent."""
        lines = self.lines(file, what)
        if lines is None or file is None:
            return {}
        if file not in self._figures:
            self._figures[file] = summarize(lines)
        return self._figures[file]

    def teacher_of(self, hop: str, figures: Mapping[str, Any]) -> str | None:
        """Under which name the evaluation holds the teacher of a hop: its model's name, or the key of its node."""
        key = self.nodes.get(hop, {}).get("teacher") or ">".join(hop.split(">")[:-1])
        names = [self.nodes.get(key, {}).get("name"), key, key.split(">")[-1]]
        return next((n for n in names if n in figures.get("reverse_kl", {})), None)

    def metrics(self, hop: str) -> list[dict[str, Any]]:
        """The lines of a hop's metrics.jsonl; what a kill tore is left out."""
        path = self.out / self.nodes.get(hop, {}).get("dir", hop) / "metrics.jsonl"
        lines = []
        try:
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and "step" in line:
                    lines.append(line)
        except OSError:
            self.miss(f"the metrics of {shown(hop)}")
        return lines

    def seconds(self, path: str) -> float | None:
        """Training time of a path: the sum over its hops and the preparation of its models."""
        names = path.split(">")
        keys = [*names, *[">".join(names[:n]) for n in range(2, len(names) + 1)]]
        times = [self.nodes[k].get("seconds") for k in keys if k in self.nodes]
        return sum(t or 0.0 for t in times) if path in self.nodes else None

    def miss(self, what: str) -> None:
        if what not in self.absent:
            self.absent.append(what)


def shown(key: str) -> str:
    """A node's key as text: teacher > ta > student."""
    return " > ".join(key.split(">"))


# -- figures of one hop, and the checks -----------------------------------------------------------


def on_policy(stored: Stored, hop: str) -> dict[str, Any] | None:
    """What the on-policy phases of a hop changed, or None where it has none.

    stages: the names of the stages around them; before, after: `summarize` of these ({} where absent); teacher: the
    name of the hop's teacher; reverse_kl, reverse_kl_top: paired bootstrap (after - before, over items) against the
    hop's teacher and the top one, or None.
    """
    phases, stages = stored.nodes.get(hop, {}).get("phases", []), stored.stages(hop)
    places = [i for i, phase in enumerate(phases) if phase in ON_POLICY]
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


def paired(stored: Stored, a: str | None, b: str | None, teacher: str | None, field: str = "reverse_kl") -> Any:
    """Paired bootstrap of a - b between two evaluation files on one field, or None where a side has no value."""
    sides = _sides(stored, a, b, teacher, field)
    return paired_bootstrap(*sides) if sides else None


def _sides(stored: Stored, a: str | None, b: str | None, teacher: str | None, field: str) -> Any:
    """The values by item of two evaluation files; None unless both have them for the same items."""
    if a is None or b is None or (field == "reverse_kl" and teacher is None):
        return None
    sides = [item_values(stored.lines(file, file) or [], field, teacher) for file in (a, b)]
    return sides if sides[0] and sides[0].keys() == sides[1].keys() else None


def comparisons(stored: Stored) -> list[dict[str, Any]]:
    """Every two paths with the same teacher and student, compared item by item on every field of COMPARED.

    For each: a, b (paths), field, paired_bootstrap's keys for a - b, p (paired permutation test) and p_holm (corrected
    over all comparisons of the run).
    """
    found = []
    paths = list(dict.fromkeys(stored.paths))
    ends = {path: (path.split(">")[0], path.split(">")[-1]) for path in paths}
    for a, b in itertools.combinations(paths, 2):
        for field in COMPARED if ends[a] == ends[b] else ():
            teacher = ends[a][0] if field == "reverse_kl" else None
            sides = _sides(stored, stored.final(a), stored.final(b), teacher, field)
            if sides and len(sides[0]) > 1:
                found.append({"a": a, "b": b, "field": field, **paired_bootstrap(*sides)})
                found[-1]["p"] = paired_permutation(*sides)
    for test, corrected in zip(found, holm([test["p"] for test in found]), strict=True):
        test["p_holm"] = corrected
    return found


def summary(run: Path) -> dict[str, Any]:
    """The figures and checks of every path as one JSON document; None (null) where a file is absent.

    For each path: parameters, seconds (training time of the whole path), rouge_l and agreement with the top teacher,
    each with its interval; perplexity and answer_tokens of the last hop initially, before its on-policy phase and at
    its end; reverse_kl (on own samples, against the hop's teacher) and reverse_kl_top (against the top teacher) before
    and after the on-policy phase; and the checks. Raises ConfigError where `run` is no run.
    """
    stored = Stored(run)
    paths = {path: _path_summary(stored, path) for path in stored.paths}
    checks = [check for path in paths.values() for check in path["checks"].values()]
    document = {
        "run": stored.name,
        "protocol": stored.index.get("protocol"),
        "paths": paths,
        "all_checks_passed": None if None in checks else all(checks),
        "absent": stored.absent,
    }
    return _finite(document)


def _path_summary(stored: Stored, path: str) -> dict[str, Any]:
    stages = stored.stages(path)
    initial = stored.figures(stages[0][1], f"{shown(path)} {stages[0][0]}")
    final = stored.figures(stages[-1][1], f"{shown(path)} {stages[-1][0]}")
    change = on_policy(stored, path) or {}
    before, after = change.get("before", {}), change.get("after", {})
    perplexity = {name: mean(f, "perplexity") for name, f in _stages(initial, before, final)}
    perplexity["initial_over_final"] = _ratio(perplexity["initial"], perplexity["final"])
    perplexity["final_over_before"] = _ratio(perplexity["final"], perplexity["before_on_policy"])
    answers = {name: mean(f, "answer_tokens") for name, f in _stages(initial, before, final)}
    answers["final_over_before"] = _ratio(answers["final"], answers["before_on_policy"])
    divergence = _change(change, "reverse_kl", before, after, change.get("teacher"))
    return {
        "parameters": stored.nodes.get(path, {}).get("parameters"),
        "seconds": stored.seconds(path),
        "items": final.get("items"),
        "perplexity": perplexity,
        "reverse_kl": divergence,
        "reverse_kl_top": _change(change, "reverse_kl_top", before, after, path.split(">")[0]),
        "answer_tokens": answers,
        "rouge_l": final.get("rouge_l"),
        "agreement": final.get("agreement", {}).get(path.split(">")[0]),
        "checks": {
            "perplexity_5x_below_untrained": _at_least(perplexity["initial_over_final"], PERPLEXITY_GAIN),
            "reverse_kl_lower": None if divergence["high"] is None else divergence["high"] < 0,
            "perplexity_rise_at_most_20_percent": _at_most(perplexity["final_over_before"], PERPLEXITY_RISE),
            "answer_length_drop_at_most_25_percent": _at_least(answers["final_over_before"], ANSWER_KEPT),
        },
    }


def _stages(*figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(zip(("initial", "before_on_policy", "final"), figures, strict=True))


def _change(
    change: Mapping[str, Any], name: str, before: dict[str, Any], after: dict[str, Any], teacher: str | None
) -> dict[str, Any]:
    test = change.get(name) or {}
    means = {"before": mean(before, "reverse_kl", teacher), "after": mean(after, "reverse_kl", teacher)}
    interval = {"difference": test.get("mean"), "low": test.get("low"), "high": test.get("high")}
    return {"teacher": teacher, **means, **interval, "share_below_zero": test.get("below_zero")}


def mean(figures: Mapping[str, Any], field: str, teacher: str | None = None) -> float | None:
    """The mean of one figure of `summarize`, or None."""
    value = figures.get(field)
    if field in ("reverse_kl", "agreement"):
        value = (value or {}).get(teacher)
    return value["mean"] if value else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _at_least(value: float | None, limit: float) -> bool | None:
    return None if value is None else value >= limit


def _at_most(value: float | None, limit: float) -> bool | None:
    return None if value is None else value <= limit


def _finite(value: Any) -> Any:
    """The same tree with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
