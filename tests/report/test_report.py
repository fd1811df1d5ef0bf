"""report and results on a run folder made by hand: figures, winner, checks, curves, what is absent, escaping."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from stored_run import CHAIN, DIRECT, NASTY, change_index, evaluation, file_of, make_run

from mskd.config import ConfigError
from mskd.evaluation.statistics import holm, item_values, paired_bootstrap, paired_permutation, read_lines, summarize
from mskd.report.document import Table, escaped, fenced, table
from mskd.report.report import summary, write_report
from mskd.report.results import Stored, comparisons


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path)


def rows(report, title, names=1):
    """The cells of the first table after a heading, by the first cell; by the first `names` of them, a path."""
    table = report.split(title)[1].split("\n\n|")[1].split("\n\n")[0]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip("|"))] for line in table.splitlines()]
    return {" > ".join(c for c in row[:names] if c != "–"): row[names:] for row in cells}


def results(report):
    """The rows of the table of models: ROUGE-L is the second cell of each."""
    return rows(report, "## Result", names=3)


# -- summary --------------------------------------------------------------------------------------


def test_summary_holds_the_figures_of_every_path(run):
    document = summary(run)
    json.dumps(document, allow_nan=False)
    assert document["absent"] == [] and list(document["paths"]) == [CHAIN, DIRECT]
    path = document["paths"][CHAIN]
    final, before = (summarize(file_of(run, CHAIN, stage)) for stage in ("final", "after kd"))
    initial = summarize(file_of(run, "student", "initial"))
    assert path["seconds"] == 660 and path["parameters"] == 84_900_000
    assert path["rouge_l"] == final["rouge_l"] and path["agreement"] == final["agreement"]["teacher"]
    perplexity = path["perplexity"]
    assert perplexity["initial"] == initial["perplexity"]["mean"] == pytest.approx(np.exp(6.7))
    assert perplexity["initial_over_final"] == pytest.approx(np.exp(6.7 - 4.0))
    assert perplexity["final_over_before"] == pytest.approx(np.exp(0.1))
    assert path["answer_tokens"]["final_over_before"] == pytest.approx(40 / 44)
    sides = [item_values(read_lines(file_of(run, CHAIN, s)), "reverse_kl", "ta") for s in ("final", "after kd")]
    test = paired_bootstrap(*sides)
    kl = path["reverse_kl"]
    assert (kl["teacher"], kl["difference"], kl["low"], kl["high"]) == ("ta", test["mean"], test["low"], test["high"])
    assert kl["before"] == before["reverse_kl"]["ta"]["mean"] and kl["after"] == final["reverse_kl"]["ta"]["mean"]
    assert path["reverse_kl_top"]["teacher"] == "teacher" and path["reverse_kl_top"]["difference"] < 0
    assert document["paths"][DIRECT]["reverse_kl"]["teacher"] == "teacher"


def test_every_check_can_pass_and_fail(run):
    checks = summary(run)["paths"]
    assert all(checks[CHAIN]["checks"].values())
    assert checks[DIRECT]["checks"] == {
        "perplexity_5x_below_untrained": True,
        "reverse_kl_lower": True,
        "perplexity_rise_at_most_20_percent": True,
        "answer_length_drop_at_most_25_percent": False,  # 44 to 30
    }
    assert summary(run)["all_checks_passed"] is False
    evaluation(file_of(run, DIRECT, "final"), kl={"teacher": 1.3}, nll=5.2, rouge=23, length=44)
    assert list(summary(run)["paths"][DIRECT]["checks"].values()) == [False, False, False, True]
    evaluation(file_of(run, DIRECT, "final"), kl={"teacher": 1.1}, nll=4.1, rouge=23, length=44)
    assert summary(run)["all_checks_passed"] is True


def test_missing_evaluations_make_figures_and_checks_null_not_false(run):
    file_of(run, CHAIN, "after kd").unlink()
    document = summary(run)
    path = document["paths"][CHAIN]
    assert path["perplexity"]["before_on_policy"] is None and path["perplexity"]["initial_over_final"] > 5
    assert path["checks"]["reverse_kl_lower"] is None and path["checks"]["perplexity_5x_below_untrained"] is True
    assert document["all_checks_passed"] is None
    assert len(document["absent"]) == 1 and "teacher > ta > student after kd" in document["absent"][0]


def test_a_hop_of_other_phases_is_read_by_its_stages(run):
    """minillm alone starts from the initial model; sft after minillm does not count as on-policy."""

    def change(index):
        index["nodes"][DIRECT]["phases"] = ["minillm", "sft"]
        for entry in index["evals"]:
            if (entry["node"], entry["stage"]) == (DIRECT, "after kd"):
                entry["stage"] = "after minillm"

    change_index(run, change)
    kl = summary(run)["paths"][DIRECT]["reverse_kl"]
    assert kl["before"] == pytest.approx(5, abs=0.3) and kl["after"] == pytest.approx(1.3, abs=0.3)
    change_index(run, lambda index: index["nodes"][DIRECT].update(phases=["kd"]))
    path = summary(run)["paths"][DIRECT]
    assert path["reverse_kl"]["difference"] is None and path["perplexity"]["initial_over_final"] > 5
    assert "This hop has no on-policy phase." in write_report(run).read_text()


# -- the report -----------------------------------------------------------------------------------


def test_the_table_shows_chain_and_direct_and_the_winner_in_bold(run):
    report = write_report(run).read_text(encoding="utf-8")
    table = results(report)
    head = table.pop("Teacher > Assistants > Student")
    assert head == [
        "Parameters", "ROUGE-L", "Perplexity", "Agreement, %", "Reverse KL", "Answer, tokens", "Training time",
    ]  # fmt: skip
    del table["--- > --- > ---"]
    assert list(table) == ["`teacher`", "`teacher` > `ta`", "`teacher` > `ta` > `student`", "`teacher` > `student`"]
    chain, direct = table["`teacher` > `ta` > `student`"], table["`teacher` > `student`"]
    final = summarize(file_of(run, DIRECT, "final"))["rouge_l"]
    assert direct[1] == f"**{final['mean']:.1f}** [{final['low']:.1f}, {final['high']:.1f}]"
    assert [c.startswith("**") for c in chain] == [False, False, True, True, True, False, False]
    assert [c.startswith("**") for c in direct] == [False, True, False, False, False, False, False]
    assert not any("**" in c for c in table["`teacher`"] + table["`teacher` > `ta`"])  # only students compete
    assert (chain[0], chain[-1], direct[-1], table["`teacher`"][-1]) == ("84.9 M", "11.0 min", "5.5 min", "–")
    compared = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| `teacher > ")]
    cells = next(c for c in compared if c[2] == "Reverse KL")
    assert cells[:2] == ["`teacher > ta > student`", "`teacher > student`"]
    assert re.fullmatch(r"-0\.\d+ \[-0\.\d+, -0\.\d+\]", cells[3])
    assert cells[6] == "**a is better**"


def test_paths_are_compared_by_permutation_and_corrected_together(run):
    kl, rouge = (
        paired_permutation(
            *(item_values(read_lines(file_of(run, path, "final")), field, t) for path in (CHAIN, DIRECT))
        )
        for field, t in (("reverse_kl", "teacher"), ("rouge_l", None))
    )
    tests = {test["field"]: test for test in comparisons(Stored(run))}
    assert {f: tests[f]["p"] for f in ("reverse_kl", "rouge_l")} == {"reverse_kl": kl, "rouge_l": rouge}
    chain, direct = (summarize(file_of(run, path, "final"))["perplexity"]["mean"] for path in (CHAIN, DIRECT))
    assert list(tests) == ["rouge_l", "perplexity", "reverse_kl"]
    assert tests["perplexity"]["mean"] == pytest.approx(np.log(chain / direct))  # -0.05 on each of the 12 items:
    assert tests["perplexity"]["p"] == 2 / 2**12
    assert [t["p_holm"] for t in tests.values()] == holm([t["p"] for t in tests.values()])
    assert all((t["a"], t["b"]) == (CHAIN, DIRECT) for t in tests.values())


def test_equal_students_are_both_bold_and_a_lone_one_is_not(run):
    for stage in ("after kd", "final"):
        file_of(run, DIRECT, stage).write_bytes(file_of(run, CHAIN, stage).read_bytes())
    report = write_report(run).read_text(encoding="utf-8")
    table = results(report)
    assert all(table[p][1].startswith("**") for p in ("`teacher` > `ta` > `student`", "`teacher` > `student`"))
    assert "no difference is shown" in report
    change_index(run, lambda index: index["paths"].pop())
    assert "**" not in "".join(results(write_report(run).read_text(encoding="utf-8"))["`teacher` > `ta` > `student`"])


def test_every_hop_has_its_stages(run):
    report = write_report(run).read_text(encoding="utf-8")
    chain = rows(report, "### teacher > ta > student")
    assert chain["Stage"] == ["Perplexity", "Reverse KL to ta", "Reverse KL to teacher", "Answer, tokens", "ROUGE-L"]
    assert list(chain)[2:] == ["initial", "after kd", "final"]
    assert chain["initial"][1] == "–" and chain["initial"][2].startswith("5.")  # never compared with ta
    assert rows(report, "### teacher > student")["Stage"][1] == "Reverse KL to teacher"
    assert "From *after kd* to *final*, the on-policy training changed reverse KL to ta by -0.3" in report
    assert "perplexity by +10.5 %; answer length by -9.1 %." in report


def test_the_report_says_what_was_run(run):
    report = write_report(run).read_text(encoding="utf-8")
    assert "quick: one seed, 48 tokens, sampled at temperature 1, top-p 1" in report
    assert "exp of the mean negative log-likelihood per response token (EOS included, prompt excluded)" in report
    assert "KL(model || top teacher)" in report
    for text in (
        "some\\_model\\|x, int8 as a teacher", "kd (steps 24, batch_size 8, lr 0.0003)", "include_current false",
        "demo (250 train items, 50 test items)", "torch 2.13.0", "CPU, 2 threads, 24 GiB, device cpu\n", "2025-01-02",
        "(config.toml)",
    ):  # fmt: skip
        assert text in report, text
    assert "long" not in report and "## Absent" not in report


def test_curves_are_pictures_of_some_size(run):
    import matplotlib.image

    report = write_report(run).read_text()
    for name in ("loss.png", "reverse_kl.png"):
        assert f"]({name})" in report
        picture = matplotlib.image.imread(run / name)
        assert picture.shape[0] > 400 and picture.shape[1] > 700 and picture[..., :3].std() > 0.05
    assert not list(run.glob(".tmp-*"))


def test_three_prompts_are_answered_by_every_model(run):
    report = write_report(run).read_text(encoding="utf-8")
    answers = report.split("## Sample answers")[1].split("## What was run")[0]
    assert re.findall(r"### Prompt \d \(item (\d+)\)", answers) == ["0", "6", "11"]
    assert "Shared preamble" not in answers and "Task 6" in answers and "ref 11" in answers
    for key in ("teacher", "teacher > ta", "teacher > ta > student", "teacher > student"):
        assert answers.count(f"`{key}`:") == 3
    assert NASTY.rstrip("\x07") in answers and "\x07" not in answers


def test_fences_and_cells_hold_anyescaped():
    for text in (NASTY, "````", "no ticks", "`" * 9 + "\nx"):
        lines = fenced(text).split("\n")
        fence = lines[-1]
        assert set(fence) == {"`"} and len(fence) >= 3 and lines[0] == fence + "text"
        assert not any(line.strip().startswith(fence) for line in lines[1:-1])
    assert "(empty)" in fenced("")
    assert table(Table(["a", "b"], [["x|y", "p\nq"]])) == "| a | b |\n|---|---:|\n| x\\|y | p q |"
    assert escaped("a_b *c* [d](e)\n`f`|<g>") == r"a\_b \*c\* \[d\](e) \`f\`\|\<g\>"


# -- what is absent -------------------------------------------------------------------------------


def test_a_report_without_anything_but_the_index_says_what_is_absent(run):
    import shutil

    for folder in ("evals", "hops"):
        shutil.rmtree(run.parent.parent / folder)
    (run / "config.toml").unlink()
    (run / "loss.png").write_text("of an earlier report")
    report = write_report(run).read_text(encoding="utf-8")
    absent = report.split("## Absent")[1]
    for what in (
        "the evaluation of teacher \\> ta: the file is not there",
        "metrics of teacher \\> student",
        "config.toml",
    ):
        assert what in absent
    assert "No metrics are stored." in report and "No evaluation is stored." in report
    assert not (run / "loss.png").exists() and not (run / "reverse_kl.png").exists()
    assert set(results(report)["`teacher` > `student`"][1:6]) == {"–"}
    document = summary(run)
    assert document["all_checks_passed"] is None
    assert set(document["paths"][CHAIN]["checks"].values()) == {None}


def test_a_run_that_has_not_ended_has_a_report(run):
    def change(index):
        del index["nodes"][CHAIN], index["nodes"][DIRECT]
        index["evals"] = [e for e in index["evals"] if e["node"] not in (CHAIN, DIRECT)]

    change_index(run, change)
    report = write_report(run).read_text(encoding="utf-8")
    assert results(report)["`teacher` > `ta`"][1] != "–"
    assert results(report)["`teacher` > `student`"][-1] == "–"
    assert "the evaluation of teacher \\> student" in report.split("## Absent")[1]
    assert report.count("This hop has not ended.") == 2
    assert summary(run)["paths"][CHAIN]["seconds"] is None


def test_a_damaged_evaluation_is_one_clear_line_and_nothing_is_written(run):
    file = file_of(run, CHAIN, "final")
    file.write_text('{"item": 0, "tor')
    with pytest.raises(ConfigError, match=f"^damaged: {file}: line 1 is no JSON .*; delete it and run the same"):
        write_report(run)
    assert not list(run.glob("*.png")) and not (run / "report.md").exists()


def test_different_items_are_not_compared(run):
    evaluation(file_of(run, DIRECT, "final"), kl={"teacher": 1.1}, nll=4.05, rouge=23, length=30, items=7)
    assert summary(run)["paths"][DIRECT]["reverse_kl"]["difference"] is None
    assert "Item by item" not in write_report(run).read_text()


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("of somebody")
    places = ((tmp_path, "has no index.json"), (tmp_path / "nowhere", "no folder"), (tmp_path / "file", "no folder"))
    for folder, why in places:
        with pytest.raises(ConfigError, match=f"is no run: it (is )?{why}.*; give a folder like OUT/runs/NAME"):
            write_report(folder)
    for text in ("{", "[]", "{}"):
        (run / "index.json").write_text(text)
        with pytest.raises(ConfigError, match="damaged: .*index.json: .*; run the same mskd distill again"):
            summary(run)


def test_the_same_files_give_the_same_report(run):
    first = write_report(run).read_bytes()
    pictures = [(run / n).read_bytes() for n in ("loss.png", "reverse_kl.png")]
    assert write_report(run).read_bytes() == first
    assert [(run / n).read_bytes() for n in ("loss.png", "reverse_kl.png")] == pictures


def test_a_relative_path_works(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    final = Stored(Path("demo")).final("teacher")
    assert final and final == Stored(run).final("teacher")
    assert (
        write_report(Path("demo")) == Path("demo/report.md") and "## Absent" not in Path("demo/report.md").read_text()
    )
