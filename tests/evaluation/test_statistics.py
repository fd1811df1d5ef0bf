"""statistics: means and intervals against numbers by hand and scipy's bootstrap."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from mskd.config import ConfigError
from mskd.evaluation.statistics import (
    anova,
    holm,
    item_values,
    paired_bootstrap,
    paired_permutation,
    read_lines,
    spearman,
    summarize,
)
from mskd.store.reading import sealed_lines


def line(item, seed=1, *, nll=None, tokens=0, rouge=None, answer_tokens=3, kl=0.5, agree=None):
    values = {"nll": nll, "tokens": tokens, "rouge_l": rouge, "answer_tokens": answer_tokens, "answer": "a"}
    return {"item": item, "seed": seed, **values, "reverse_kl": {"t": kl}, "agreement": {"t": agree}}


def test_means_by_hand():
    lines = [
        line(0, 1, nll=2.0, tokens=4, rouge=10.0, kl=0.2, agree=0.5),
        line(1, 1, nll=9.0, tokens=6, rouge=30.0, kl=0.4, agree=1.0),
        line(2, 1, kl=0.9, answer_tokens=9),  # no reference
        line(0, 2, nll=2.0, tokens=4, rouge=20.0, kl=0.6, agree=0.5),
        line(1, 2, nll=9.0, tokens=6, rouge=50.0, kl=0.4, agree=1.0),
        line(2, 2, kl=0.9, answer_tokens=9),
    ]
    s = summarize(lines)
    assert (s["items"], s["seeds"]) == (3, 2)
    assert s["rouge_l"]["mean"] == pytest.approx((15 + 40) / 2)
    assert s["perplexity"]["mean"] == pytest.approx(math.exp(11 / 10))  # tokens count, not items
    assert s["reverse_kl"]["t"]["mean"] == pytest.approx((0.4 + 0.4 + 0.9) / 3)
    assert s["agreement"]["t"]["mean"] == pytest.approx((0.5 * 4 + 6) / 10)
    assert s["answer_tokens"]["mean"] == pytest.approx(5)
    assert [s[k]["items"] for k in ("rouge_l", "perplexity", "answer_tokens")] == [2, 2, 3]
    assert item_values(lines, "reverse_kl", "t") == pytest.approx({0: 0.4, 1: 0.4, 2: 0.9})


def test_two_items_have_the_interval_of_their_four_resamples():
    """Of two items the resampled mean is a, (a + b) / 2 or b with probability 1/4, 1/2, 1/4."""
    s = summarize([line(0, rouge=10.0, nll=1.0, tokens=1), line(1, rouge=20.0, nll=6.0, tokens=2)])
    assert s["rouge_l"] == {"mean": 15.0, "low": 10.0, "high": 20.0, "items": 2}
    perplexity = s["perplexity"]
    assert (perplexity["low"], perplexity["high"]) == pytest.approx((math.e, math.exp(3)))
    assert perplexity["mean"] == pytest.approx(math.exp(7 / 3))


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(3)
    nll, tokens = rng.gamma(3, 10, 80), rng.integers(3, 40, 80)
    s = summarize([line(i, nll=a, tokens=int(b), rouge=a) for i, (a, b) in enumerate(zip(nll, tokens, strict=True))])
    options = dict(method="percentile", n_resamples=20_000, rng=np.random.default_rng(1), vectorized=True)
    mean = stats.bootstrap((nll,), np.mean, **options).confidence_interval
    ratio = stats.bootstrap(
        (nll, tokens), lambda a, b, axis=-1: np.exp(a.sum(axis) / b.sum(axis)), paired=True, **options
    ).confidence_interval
    for mine, theirs in ((s["rouge_l"], mean), (s["perplexity"], ratio)):
        width = theirs.high - theirs.low
        assert mine["low"] == pytest.approx(theirs.low, abs=0.03 * width)
        assert mine["high"] == pytest.approx(theirs.high, abs=0.03 * width)


def test_paired_bootstrap_is_of_the_difference():
    rng = np.random.default_rng(0)
    before = dict(enumerate(rng.normal(5, 3, 50)))
    after = {i: v - 0.2 + 0.1 * rng.normal() for i, v in before.items()}
    test = paired_bootstrap(after, before)
    difference = np.array([after[i] - before[i] for i in range(50)])
    theirs = stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert test["mean"] == pytest.approx(difference.mean())
    assert (test["low"], test["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert test["high"] < 0 and test["below_zero"] == 1  # unpaired, the spread of 3 would hide the shift of 0.2
    assert test["items_below_zero"] == (difference < 0).mean() and test["items"] == 50
    turned = paired_bootstrap(before, after)
    assert turned["mean"] == pytest.approx(-test["mean"]) and turned["below_zero"] == 0
    assert paired_bootstrap(after, before) == test
    same = paired_bootstrap(before, before)
    assert (same["mean"], same["low"], same["high"], same["below_zero"]) == (0, 0, 0, 0)


def test_a_paired_comparison_needs_the_same_items():
    for a, b in (({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0}), ({}, {})):
        with pytest.raises(ValueError, match="same items"):
            paired_bootstrap(a, b)


def test_a_hopeless_perplexity_is_infinite_and_not_an_error():
    assert summarize([line(0, nll=1e6, tokens=1)])["perplexity"]["mean"] == math.inf


@pytest.mark.parametrize("text", ["", '{"item": 0', "[1]\n", '{"item": 0, "seed": 1}\n'])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.jsonl"):
        read_lines(path)
    path.write_text(json.dumps(line(0)) + "\n")
    assert summarize(path) == summarize([line(0)])


def cut(*numbers):
    return lambda lines: [line for number, line in enumerate(lines) if number not in numbers]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut(3), "its lines are not those that were written|3 lines are not one for every item and seed"),
        (cut(0), "3 lines are not one for every item and seed"),  # with the seal
        (cut(2, 3), "its lines are not those that were written"),  # a whole item
        (lambda lines: [*lines, lines[1]], "its lines are not those that were written"),
        (lambda lines: [*lines[:3], lines[3].replace('"nll": 3.5', '"nll": 3.6')], "its lines are not those"),
        (lambda lines: [*lines[:3], lines[3].replace('"nll": 3.5', '"nll": "3.5"')], "line 4, field nll is '3.5'"),
        (lambda lines: [*lines[:3], lines[3].replace('"nll": 3.5', '"nll": 1e999')], "line 4, field nll is inf"),
        (lambda lines: [*lines[:3], "[" * 5000], "line 4 is nested too deep|line 4 is no JSON"),
        (lambda lines: [*lines[:3], lines[3].replace('"tokens": 2', '"tokens": 0')], "line 4, it is .* 0 tokens"),
    ],
)
def test_a_changed_evaluation_is_one_line_that_says_where(tmp_path, harm, says):
    path = tmp_path / "x.jsonl"
    lines = [line(item, seed, nll=3.5, tokens=2, rouge=10.0, agree=0.5) for item in range(2) for seed in (1, 2)]
    path.write_text(sealed_lines(lines))
    assert read_lines(path) == lines and [json.loads(x)["item"] for x in path.read_text().splitlines()] == [0, 0, 1, 1]
    path.write_text("".join(f"{text}\n" for text in harm(path.read_text().splitlines())))
    with pytest.raises(ConfigError, match=f"^damaged: {path}: ({says}).*; delete it and run the same command$"):
        read_lines(path)


def test_an_evaluation_without_a_digest_is_read_as_it_is(tmp_path):
    path, lines = tmp_path / "x.jsonl", [line(0), line(1)]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert read_lines(path) == lines


def test_permutation_of_few_items_is_exact():
    """Three items: 8 exchanges of signs, of which +++ and --- are as extreme as what was seen."""
    a, b = {0: 3.0, 1: 5.0, 2: 9.0}, {0: 1.0, 1: 2.0, 2: 4.0}
    assert paired_permutation(a, b) == pytest.approx(2 / 8)
    assert paired_permutation(b, a) == pytest.approx(2 / 8)
    assert paired_permutation({0: 1.0, 1: 5.0}, {0: 5.0, 1: 1.0}) == 1.0


def test_permutation_agrees_with_the_t_test_on_normal_differences():
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.15, 0.4):
        x, y = rng.normal(size=150), rng.normal(size=150) + shift
        ours = paired_permutation(dict(enumerate(x)), dict(enumerate(y)))
        assert ours == pytest.approx(stats.ttest_rel(x, y).pvalue, abs=0.015)
        assert ours == paired_permutation(dict(enumerate(x)), dict(enumerate(y)))  # the same numbers, the same p


def test_permutation_needs_the_same_items():
    with pytest.raises(ValueError, match="the same items"):
        paired_permutation({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0})


def test_holm_agrees_with_statsmodels():
    from statsmodels.stats.multitest import multipletests

    for p in ([0.01, 0.04, 0.03, 0.005], [0.5, 0.5], [0.9], [0.02, 0.02, 0.02, 0.6, 1.0], list(np.linspace(0, 1, 9))):
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([]) == []


def test_anova_and_spearman_by_hand():
    """Groups 1 2 3, 2 3 4 and 6 7 8: between 42 (2 degrees of freedom), within 6 (6): F = 21."""
    found = anova([[1, 2, 3], [2, 3, 4], [6, 7, 8]])
    assert found is not None and found["f"] == pytest.approx(21.0) and found["groups"] == 3
    assert found["p"] == pytest.approx(stats.f.sf(21.0, 2, 6))
    assert anova([[1, 2]]) is None and anova([[1], [2]]) is None and anova([[1, 1], [1, 1]]) is None
    ranked = spearman([1, 2, 3, 4, 5], [10, 30, 20, 40, 90])  # one swap of neighbours: 1 - 6 * 2 / (5 * 24)
    assert ranked is not None and ranked["rho"] == pytest.approx(0.9) and ranked["pairs"] == 5
    assert spearman([1, 2], [1, 2]) is None and spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="pairs"):
        spearman([1, 2, 3], [1, 2])
