"""Statistics of stored evaluations: means with 95 % bootstrap intervals, comparisons of two models and of many.

Input are the lines that `evaluate.evaluate` writes, one for each item and seed. The item (the prompt) is always
the unit that is resampled; an item's values are averaged over its seeds first. Numpy and scipy, no model is needed.

    summary = summarize("evals/.../test-quick.jsonl")
    test = paired_bootstrap(item_values(after, "reverse_kl", "teacher"), item_values(before, "reverse_kl", "teacher"))
    p_values = holm([paired_permutation(a, b) for a, b in pairs])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mskd.store import records
from mskd.store.reading import Damaged

RESAMPLES = 10_000
SEED = 0  # of the resampling: the same lines give the same interval, always

Lines = Sequence[Mapping[str, Any]]


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of an evaluation file, each a `records.Line`. Raises FileNotFoundError, Damaged."""
    return read_evaluation(Path(path))[0]


def read_evaluation(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of an evaluation file and their digest. Raises FileNotFoundError, Damaged."""
    lines, digest = records.read_lines(records.Line, path)
    asked = {(line["item"], line["seed"]) for line in lines}
    items, seeds = ({pair[i] for pair in asked} for i in (0, 1))
    if len(lines) != len(asked) or len(asked) != len(items) * len(seeds) or max(items) != len(items) - 1:
        raise Damaged(path, f"{len(lines)} lines are not one for every item and seed")
    return lines, digest


def item_values(lines: Lines, field: str, teacher: str | None = None) -> dict[int, float]:
    """One value an item, the mean over its seeds; items without a value are left out.

    field: rouge_l, nll, tokens, answer_tokens; or reverse_kl, agreement together with the teacher's name.
    """
    values: dict[int, list[float]] = {}
    for line in lines:
        value = line.get(field) if teacher is None else (line.get(field) or {}).get(teacher)
        if value is not None:
            values.setdefault(line["item"], []).append(float(value))
    return {item: math.fsum(v) / len(v) for item, v in sorted(values.items())}


def summarize(evaluation: str | Path | Lines) -> dict[str, Any]:
    """Means of one evaluation with 95 % percentile bootstrap intervals over items, as plain values.

    Keys: items, seeds (counts); rouge_l (0 to 100), perplexity, answer_tokens, and for every teacher by name reverse_kl
    (nats per token of the model's own answer, mean over items) and agreement (share of the reference tokens). Each
    figure is {"mean", "low", "high", "items"}, or None where no item has a value. Perplexity is exp of the mean
    negative log-likelihood per response token (EOS included, prompt excluded) over the set: a ratio of sums,
    resampled by item.
    """
    lines = read_lines(evaluation) if isinstance(evaluation, str | Path) else evaluation
    teachers = sorted({name for line in lines for name in line.get("reverse_kl") or {}})
    tokens = item_values(lines, "tokens")

    def ratio(values: Mapping[int, float]) -> dict[str, Any] | None:
        return _interval([values[i] for i in values], [tokens[i] for i in values])

    def mean(values: Mapping[int, float]) -> dict[str, Any] | None:
        return _interval(list(values.values()))

    nll = ratio(item_values(lines, "nll"))
    agreement = {t: item_values(lines, "agreement", t) for t in teachers}
    return {
        "items": len({line["item"] for line in lines}),
        "seeds": len({line["seed"] for line in lines}),
        "rouge_l": mean(item_values(lines, "rouge_l")),
        "perplexity": nll and {k: v if k == "items" else _exp(v) for k, v in nll.items()},
        "answer_tokens": mean(item_values(lines, "answer_tokens")),
        "reverse_kl": {t: mean(item_values(lines, "reverse_kl", t)) for t in teachers},
        "agreement": {t: ratio({i: share * tokens[i] for i, share in agreement[t].items()}) for t in teachers},
    }


def paired_bootstrap(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
    """The mean of a - b over the same items, with its 95 % percentile bootstrap interval.

    Gives mean, low, high, below_zero (share of the resampled means that are < 0), items_below_zero (share of the items)
    and items. Raises ValueError where the two were not measured on the same items.
    """
    if not a or a.keys() != b.keys():
        raise ValueError(f"a paired comparison needs the same items on both sides, got {len(a)} and {len(b)}")
    difference = np.array([a[i] - b[i] for i in sorted(a)], dtype=np.float64)
    means = _resampled_sums(difference[:, None])[:, 0] / len(difference)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "below_zero": float((means < 0).mean()),
        "items_below_zero": float((difference < 0).mean()),
        "items": len(difference),
    }


def paired_permutation(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Two-sided p-value of "a and b have the same mean", from a permutation test on the same items.

    Under that hypothesis the two values of an item may be exchanged: the mean difference is compared with those of
    RESAMPLES random exchanges, of all of them where there are fewer (scipy.stats.permutation_test). Raises ValueError
    where the two were not measured on the same items, or on fewer than two.
    """
    from scipy import stats

    if len(a) < 2 or a.keys() != b.keys():
        raise ValueError(f"a paired comparison needs the same items on both sides, got {len(a)} and {len(b)}")
    sides = [np.array([x[i] for i in sorted(a)], dtype=np.float64) for x in (a, b)]
    test = stats.permutation_test(
        sides,
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(SEED),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of the p-values of one table, in their order (Holm 1979, Scand. J. Statist. 6)."""
    n, largest = len(p_values), 0.0
    corrected = [0.0] * n
    for rank, i in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (n - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def anova(groups: Sequence[Iterable[float]]) -> dict[str, Any] | None:
    """One-way analysis of variance: f and p of "all groups have one mean", and their number (scipy.stats.f_oneway).

    None with fewer than two groups, with a group of fewer than two values, or where no value varies.
    """
    from scipy import stats

    values = [np.array(list(g), dtype=np.float64) for g in groups]
    if len(values) < 2 or min(map(len, values)) < 2 or not any(np.ptp(v) > 0 for v in values):
        return None
    test = stats.f_oneway(*values)
    return {"f": float(test.statistic), "p": float(test.pvalue), "groups": len(values)}


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of "the mean difference is 0" by a paired t test (scipy.stats.ttest_1samp).

    None with fewer than two differences or where they do not vary.
    """
    from scipy import stats

    values = np.array(differences, dtype=np.float64)
    return float(stats.ttest_1samp(values, 0.0).pvalue) if len(values) > 1 and np.ptp(values) > 0 else None


def spearman(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Spearman's rank correlation rho and its two-sided p of no monotone relation (scipy.stats.spearmanr).

    None with fewer than three pairs or where a side does not vary. With few pairs p is rough (a t approximation).
    """
    from scipy import stats

    if len(x) != len(y):
        raise ValueError(f"a rank correlation needs pairs, got {len(x)} and {len(y)} values")
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    test = stats.spearmanr(x, y)
    return {"rho": float(test.statistic), "p": float(test.pvalue), "pairs": len(x)}


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _interval(values: Iterable[float], weights: Iterable[float] | None = None) -> dict[str, Any] | None:
    """sum(values) / sum(weights) (weights 1 where not given) with its 95 % percentile bootstrap interval."""
    top = np.array(list(values), dtype=np.float64)
    if not len(top):
        return None
    bottom = np.ones_like(top) if weights is None else np.array(list(weights), dtype=np.float64)
    sums = _resampled_sums(np.stack([top, bottom], axis=1))
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return {"mean": float(top.sum() / bottom.sum()), "low": float(low), "high": float(high), "items": len(top)}


def _resampled_sums(columns: np.ndarray) -> np.ndarray:
    """Sums of the columns [n, k] over RESAMPLES draws of n rows with replacement: [RESAMPLES, k]."""
    n = len(columns)
    random = np.random.default_rng(SEED)
    sums = [columns[random.integers(n, size=(500, n))].sum(axis=1) for _ in range(RESAMPLES // 500)]
    return np.concatenate(sums)
