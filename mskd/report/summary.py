"""The figures and checks of a run as one JSON document: the last line of `mskd distill`.

document = summary(Path("out/runs/demo"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mskd.evaluation.columns import mean
from mskd.report.results import Stored, on_policy, shown

# What a student must reach; the summary says for each whether it did.
PERPLEXITY_GAIN, PERPLEXITY_RISE, ANSWER_KEPT = 5.0, 1.2, 0.75


def summary(run: Path) -> dict[str, Any]:
    """The figures and checks of every path as one JSON document; None (null) where a file is absent.

    For each path: parameters, seconds (training time of the whole path), rouge_l and agreement with the top teacher,
    each with its interval; perplexity and answer_tokens of the last hop initially, before its on-policy phase and at
    its end; reverse_kl (on own samples, against the hop's teacher) and reverse_kl_top (against the top teacher) before
    and after the on-policy phase; data, the student's figures on further data sets, where there are any; and the
    checks. Raises ConfigError where `run` is no run.
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
    further = {data: _further(stored.on(data), path) for data in stored.further()}
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
        **({"data": further} if further else {}),
        "checks": {
            "perplexity_5x_below_untrained": _at_least(perplexity["initial_over_final"], PERPLEXITY_GAIN),
            "reverse_kl_lower": None if divergence["high"] is None else divergence["high"] < 0,
            "perplexity_rise_at_most_20_percent": _at_most(perplexity["final_over_before"], PERPLEXITY_RISE),
            "answer_length_drop_at_most_25_percent": _at_least(answers["final_over_before"], ANSWER_KEPT),
        },
    }


def _further(view: Stored, path: str) -> dict[str, Any]:
    """The figures of a path's student on a further data set; comparisons are with the top teacher."""
    figures, top = view.figures(view.final(path), f"{shown(path)} on {view.data}"), path.split(">")[0]
    compared = {field: figures.get(field, {}).get(top) for field in ("agreement", "reverse_kl")}
    return {"items": figures.get("items"), **{f: figures.get(f) for f in ("rouge_l", "perplexity")}, **compared}


def _stages(*figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(zip(("initial", "before_on_policy", "final"), figures, strict=True))


def _change(
    change: Mapping[str, Any], name: str, before: dict[str, Any], after: dict[str, Any], teacher: str | None
) -> dict[str, Any]:
    test = change.get(name) or {}
    means = {"before": mean(before, "reverse_kl", teacher), "after": mean(after, "reverse_kl", teacher)}
    interval = {"difference": test.get("mean"), "low": test.get("low"), "high": test.get("high")}
    return {"teacher": teacher, **means, **interval, "share_below_zero": test.get("below_zero")}


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
