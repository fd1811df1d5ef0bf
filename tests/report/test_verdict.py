"""The verdict on chains: which direct hop a chain is judged against, and how much it takes to say "better"."""

import json
from dataclasses import replace

import pytest
from scipy import stats
from stored_run import ALL_PATHS, CHAIN, DIRECT, make_run, make_sweep
from test_trends import per_seed

from mskd.evaluation.statistics import paired_t
from mskd.report.report import write_report
from mskd.report.results import Stored, comparisons
from mskd.report.verdict import judge, sentence, table

PATHS = [">".join(path) for path in ALL_PATHS]
ONE_HOP, THREE_HOPS = PATHS[0], PATHS[3]


def judged_of(run):
    stored = Stored(run)
    return judge(stored, comparisons(stored))


def test_three_seeds_and_items_that_agree_make_a_verdict(tmp_path):
    run = make_sweep(tmp_path)
    found = {(j.chain, j.direct, j.field): j for j in judged_of(run)}
    assert {chain for chain, *_ in found} == set(PATHS[1:]) and {direct for _, direct, _ in found} == {ONE_HOP}
    j = found[THREE_HOPS, ONE_HOP, "reverse_kl"]
    a, b = per_seed(run, THREE_HOPS), per_seed(run, ONE_HOP)
    assert j.p_seeds == pytest.approx(stats.ttest_rel(a, b).pvalue) and j.seeds == 3
    assert j.difference == pytest.approx(sum(a) / 3 - sum(b) / 3) and j.tokens == 3  # hops of 2000 tokens each
    assert j.difference < 0 and j.verdict == "better"
    assert replace(j, difference=-j.difference).verdict == "worse"
    for unclear in ({"p_items": 0.05}, {"p_seeds": 0.05}, {"p_seeds": None}):
        assert replace(j, **unclear).verdict == "no difference is shown"
    assert replace(j, seeds=2).verdict == "inconclusive"
    assert "is **better** than `teacher > student` in Reverse KL" in sentence(list(found.values()))
    assert "No difference" in sentence([replace(j, p_items=1.0)])


def test_one_seed_is_inconclusive_however_clear_the_items_are(tmp_path):
    run = make_run(tmp_path)
    (chain,) = [j for j in judged_of(run) if j.field == "perplexity"]
    assert (chain.chain, chain.direct) == (CHAIN, DIRECT) and chain.p_items < 0.05
    assert chain.verdict == "inconclusive" and chain.p_seeds is None
    report = write_report(run).read_text()
    assert "## Does a chain beat the direct hop?" in report and "**Inconclusive**: one seed" in report
    assert table([chain]).rows[0][-2:] == ["–", "inconclusive"]


def test_a_chain_is_also_judged_against_the_direct_hop_of_as_much_training(tmp_path):
    """student-2x has as many tokens as the chain of two hops; student-sft too, but by another objective."""
    paths = [["teacher", n] for n in ("student", "student-sft", "student-2x", "student-3x")]
    chain = ["teacher", "big", "student"]
    sizes = {"teacher": 9, "big": 6} | {path[1]: 5 for path in paths}
    run = make_sweep(tmp_path, seeds=(0,), paths=[*paths, chain], sizes=sizes)
    out = run.parent.parent
    index = json.loads((run / "index.json").read_text())
    index["nodes"]["teacher>student-sft"]["phases"] = ["sft"]
    (run / "index.json").write_text(json.dumps(index))
    for name, tokens in (("student-sft", 4000), ("student-2x", 3900), ("student-3x", 6000)):
        done = next(out.glob(f"hops/teacher-{name}-*/done.json"))
        done.write_text(json.dumps(json.loads(done.read_text()) | {"tokens": tokens}))
    found = {j.direct: j.tokens for j in judged_of(run)}
    assert found == {"teacher>student": 2.0, "teacher>student-2x": pytest.approx(4000 / 3900)}


def test_no_chain_no_verdict(tmp_path):
    run = make_sweep(tmp_path, paths=[["teacher", "student"]])
    assert judged_of(run) == [] and "Does a chain beat" not in write_report(run).read_text()


def test_paired_t_is_scipys_and_needs_values_that_vary():
    assert paired_t([0.1, 0.2, 0.25]) == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.25], 0).pvalue)
    assert paired_t([0.1]) is paired_t([0.1, 0.1]) is None
