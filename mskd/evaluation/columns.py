"""The figures of a model as columns: their titles, which way is better, how a value is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DASH = "–"  # what is not known

# The figures of a model: title, field, whether more is better (None: neither), form of a value.
COLUMNS: tuple[tuple[str, str, bool | None, Callable[[float], str]], ...] = (
    ("ROUGE-L", "rouge_l", True, "{:.1f}".format),
    ("Perplexity", "perplexity", False, lambda x: f"{x:,.{0 if x >= 1000 else 1 if x >= 100 else 2}f}"),
    ("Agreement, %", "agreement", True, lambda x: f"{100 * x:.1f}"),
    ("Reverse KL", "reverse_kl", False, "{:z.3f}".format),
    ("Answer, tokens", "answer_tokens", None, "{:.1f}".format),
)

TITLE = {field: title for title, field, _, _ in COLUMNS}
MORE = {field: more for _, field, more, _ in COLUMNS}
FORM = {field: form for _, field, _, form in COLUMNS}


def figure(
    figures: Mapping[str, Any],
    field: str,
    teacher: str | None,
    form: Callable[[float], str],
    *,
    bold: bool = False,
    mark: str = "",
) -> str:
    """A cell: the value, its mark, its interval."""
    value = figures.get(field)
    if field in ("reverse_kl", "agreement"):
        value = (value or {}).get(teacher)
    if not value:
        return DASH
    text = form(value["mean"])
    text = f"**{text}**" if bold else text
    return f"{text}{f' {mark}' if mark else ''} [{form(value['low'])}, {form(value['high'])}]"


def mean(figures: Mapping[str, Any], field: str, teacher: str | None = None) -> float | None:
    """The mean of one figure of `summarize`, or None."""
    value = figures.get(field)
    if field in ("reverse_kl", "agreement"):
        value = (value or {}).get(teacher)
    return value["mean"] if value else None
