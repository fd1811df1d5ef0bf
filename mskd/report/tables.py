"""The tables of a report, made from a run's stored results: models, comparisons, the stages of a hop.

    table = results(stored, comparisons(stored))

Cells are inline Markdown (document.py). What is not known is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mskd.evaluation.columns import COLUMNS, DASH, FORM, MORE, TITLE, figure, mean
from mskd.report.document import Table
from mskd.report.results import LEVEL, Stored, on_policy, shown

BETTER, WORSE = "▲", "▼"

DEFINITIONS = """\
Every figure is followed by its 95 % interval (percentile bootstrap over the test items); of the students with one start
the best is bold. ROUGE-L: Google's rouge_score, stemmer on, F-measure, best over the references, mean x 100.
Perplexity: exp of the mean negative log-likelihood per response token (EOS included, prompt excluded) over the test
set. Agreement: share of the reference's response tokens where the model's most likely token is the top teacher's.
Reverse KL: KL(model || top teacher) over the whole vocabulary at temperature 1, on the model's own answers (mean over
an answer's tokens, then over the items). Answer: its mean length, EOS included."""

LEGEND = f"""\
{BETTER} better, {WORSE} worse than the direct hop: paired permutation test over the test items, p < {LEVEL:g} after
Holm's correction over the table of the paths compared. No mark: no difference is shown, or the figure is not tested
(agreement, length). The direct hop:"""


def legend(stored: Stored) -> str:
    """What the marks mean; "" where no path can be judged against a direct hop."""
    judged = dict.fromkeys(d for path in stored.paths if (d := stored.direct(path)) not in (None, path))
    return f"{LEGEND} {', '.join(f'`{shown(path)}`' for path in judged if path)}." if judged else ""


def results(stored: Stored, tests: Sequence[Mapping[str, Any]]) -> Table:
    """One row a model, as in the paper: teacher, assistants, student, and the student's figures."""
    keys, rows = stored.models(), []
    figures = {key: stored.figures(stored.final(key), shown(key)) for key in keys}
    best, marks = best_paths(stored, figures), significance(stored, tests)
    for key in keys:
        names, top = key.split(">"), key.split(">")[0]
        row = [f"`{top}`", " > ".join(f"`{n}`" for n in names[1:-1]) or DASH]
        row += [f"`{names[-1]}`" if len(names) > 1 else DASH, parameters(stored.nodes.get(key, {}).get("parameters"))]
        for _, field, _, form in COLUMNS:
            mark = marks.get((key, field), "")
            row.append(figure(figures[key], field, top, form, bold=key in best[field], mark=mark))
        time = stored.seconds(key) if ">" in key else None
        rows.append([*row, DASH if time is None else duration(time)])
    titles = [title for title, *_ in COLUMNS]
    return Table(["Teacher", "Assistants", "Student", "Parameters", *titles, "Training time"], rows, left=3)


def best_paths(stored: Stored, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each field the paths whose student is best among its rivals; none where it has none."""
    best: dict[str, set[str]] = {field: set() for field in TITLE}
    for path in stored.paths:
        for field, more in MORE.items():
            values = {p: mean(figures[p], field, p.split(">")[0]) for p in stored.rivals(path)}
            known = [v for v in values.values() if v is not None]
            if more is not None and len(known) > 1 and values[path] == (max(known) if more else min(known)):
                best[field].add(path)
    return best


def significance(stored: Stored, tests: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """(path, field) -> BETTER or WORSE than the path's direct hop, where the corrected test says so."""
    marks = {}
    for test in tests:
        for path, other, sign in ((test["a"], test["b"], 1), (test["b"], test["a"], -1)):
            if other == stored.direct(path) and test["p_holm"] < LEVEL:
                marks[path, test["field"]] = BETTER if (sign * test["mean"] > 0) == MORE[test["field"]] else WORSE
    return marks


# -- paths compared -------------------------------------------------------------------------------


def compared(tests: Sequence[Mapping[str, Any]]) -> Table:
    """Every two paths, item by item."""
    head = ["a", "b", "Figure", "a - b", "p", "p, Holm", "Verdict"]
    return Table(head, [_comparison(test) for test in tests], left=3)


def _comparison(test: Mapping[str, Any]) -> list[str]:
    field = test["field"]
    better = "a" if (test["mean"] > 0) == MORE[field] else "b"
    verdict = f"**{better} is better**" if test["p_holm"] < LEVEL else "no difference is shown"
    mean_, low, high = (difference(field, test[name]) for name in ("mean", "low", "high"))
    p_values = [p_value(test[name]) for name in ("p", "p_holm")]
    names = [f"`{shown(test[side])}`" for side in ("a", "b")]
    return [*names, TITLE[field], f"{mean_} [{low}, {high}]", *p_values, verdict]


def difference(field: str, value: float) -> str:
    """A difference of two models; of perplexity, whose logarithm is compared, in per cent."""
    if field == "perplexity":
        return f"{100 * math.expm1(value):+.1f} %"
    return f"{value:+.1f}" if field == "rouge_l" else f"{value:+.3f}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# -- hops -----------------------------------------------------------------------------------------


def stages(stored: Stored, hop: str) -> Table:
    """The models along one hop's training: before it, after each phase, at its end."""
    top, rows = hop.split(">")[0], []
    found = stored.stages(hop)
    figures = [stored.figures(files, f"{shown(hop)} {stage}") for stage, files in found]
    teacher = next((t for t in (stored.teacher_of(hop, f) for f in figures[::-1]) if t), None)
    teachers = list(dict.fromkeys((teacher or "", top)))
    for (stage, _), f in zip(found, figures, strict=True):
        row = [stage, figure(f, "perplexity", None, FORM["perplexity"])]
        row += [figure(f, "reverse_kl", t, FORM["reverse_kl"]) for t in teachers]
        rows.append([*row, *[figure(f, field, None, FORM[field]) for field in ("answer_tokens", "rouge_l")]])
    titles = [f"Reverse KL to {t or 'its teacher'}" for t in teachers]
    return Table(["Stage", "Perplexity", *titles, "Answer, tokens", "ROUGE-L"], rows)


def change(stored: Stored, hop: str) -> str:
    """In words, what the on-policy phases of a hop changed."""
    found = on_policy(stored, hop)
    if hop not in stored.nodes:
        return "This hop has not ended."
    if found is None:
        return "This hop has no on-policy phase."
    before, after = found["before"], found["after"]
    sentence = f"From *{found['stages'][0]}* to *{found['stages'][1]}*, the on-policy training"
    parts = []
    for name, teacher in (("reverse_kl", found["teacher"]), ("reverse_kl_top", hop.split(">")[0])):
        test = found[name]
        if test is not None and (name == "reverse_kl" or teacher != found["teacher"]):
            parts.append(
                f"reverse KL to {teacher} by {test['mean']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}] "
                f"(paired bootstrap over {test['items']} items, lower on {100 * test['items_below_zero']:.0f} %)"
            )
    for field, title in (("perplexity", "perplexity"), ("answer_tokens", "answer length")):
        a, b = mean(before, field), mean(after, field)
        if a and b is not None:
            parts.append(f"{title} by {100 * (b / a - 1):+.1f} %")
    return f"{sentence} changed {'; '.join(parts)}." if parts else f"{sentence} changed what is not known."


# -- forms ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def parameters(count: int | None) -> str:
    return DASH if count is None else short(count)


def short(count: float) -> str:
    """A big number with its unit: 84.9 M."""
    unit, name = next(((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= u), (1, ""))
    return f"{count / unit:.1f} {name}" if name else f"{count:.0f}"
