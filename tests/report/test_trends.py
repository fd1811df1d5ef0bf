"""trends, cost, graph and the tables of a sweep, on one made by hand: four paths, three seeds."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scipy import stats
from stored_run import ALL_PATHS, change_index, make_run, make_sweep

from mskd.config import ConfigError
from mskd.evaluation.statistics import item_values, paired_permutation, read_lines, summarize
from mskd.report import path_graph as graph
from mskd.report import tables, trends
from mskd.report.cost import cost
from mskd.report.cost import table as cost_table
from mskd.report.report import write_report
from mskd.report.results import Stored, comparisons, settings

PATHS = [">".join(path) for path in ALL_PATHS]
DIRECT, TWO = PATHS[0], PATHS[3]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("sweep"))


def per_seed(run, key, field="reverse_kl"):
    """A model's figure in every cell, read from its file."""
    cells = json.loads((run / "index.json").read_text())["cells"]
    files = [next(e["file"] for e in cell["evals"] if e["node"] == key) for cell in cells]
    figures = [summarize(run.parent.parent / file)[field] for file in files]
    return [(f["teacher"] if field == "reverse_kl" else f)["mean"] for f in figures]


def test_the_cells_of_a_setting_are_read_together(sweep):
    stored = Stored(sweep)
    assert stored.seeds == [0, 1, 2] and len(stored.final(DIRECT)) == 3
    figure = stored.figures(stored.final(DIRECT), "x")["reverse_kl"]["teacher"]
    assert figure["mean"] == pytest.approx(np.mean(per_seed(sweep, DIRECT))) and figure["items"] == 12
    test = next(t for t in comparisons(stored) if (t["a"], t["b"], t["field"]) == (DIRECT, TWO, "reverse_kl"))
    sides = [
        item_values([x for f in stored.final(p) for x in read_lines(stored.out / f)], "reverse_kl", "teacher")
        for p in (DIRECT, TWO)
    ]
    assert test["mean"] == pytest.approx(np.mean(per_seed(sweep, DIRECT)) - np.mean(per_seed(sweep, TWO)))
    assert test["p"] == paired_permutation(*sides)


def test_spread_is_mean_and_deviation_over_seeds(sweep):
    table = trends.spread(settings(sweep))
    assert [row[0] for row in table.rows] == [f"`{p.replace('>', ' > ')}`" for p in PATHS]
    values = per_seed(sweep, TWO)
    assert table.rows[3][1] == "3"
    assert table.rows[3][table.head.index("Reverse KL")] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def test_variance_is_scipys_one_way_anova_over_the_paths(sweep):
    rows = trends.variance(settings(sweep)).rows
    expected = stats.f_oneway(*(per_seed(sweep, path) for path in PATHS))
    row = next(r for r in rows if r[1] == "Reverse KL")
    assert row == ["`student`", "Reverse KL", "4", "12", f"{expected.statistic:.2f}", tables.p_value(expected.pvalue)]
    assert expected.pvalue < 0.001


def test_correlations_are_scipys_spearman_of_students_with_their_teachers(sweep):
    rows = {(row[1], row[2]): row[3:] for row in trends.correlations(settings(sweep)).rows}
    students, quality, sizes = [], [], []
    for path in PATHS:
        above = path.rpartition(">")[0]
        students += per_seed(sweep, path)
        quality += per_seed(sweep, above, "perplexity")
        sizes += [Stored(sweep).nodes[above]["parameters"]] * 3
    for against, x in (("its teacher's perplexity", quality), ("its teacher's parameters", sizes)):
        test = stats.spearmanr(students, x)
        assert rows["Reverse KL", against] == ["12", f"{test.statistic:+.2f}", tables.p_value(test.pvalue)]


def test_statistics_are_left_out_where_there_are_too_few_students(tmp_path):
    for run in (make_run(tmp_path), make_sweep(tmp_path, seeds=(0,), paths=ALL_PATHS[:3])):
        assert [f(settings(run)) for f in (trends.spread, trends.variance, trends.correlations)] == [None] * 3
    assert "## Over the students" not in write_report(run).read_text()


def test_students_of_a_grid_are_shown_setting_by_setting(tmp_path):
    run = make_sweep(tmp_path, seeds=(0, 1), grid=({"phases.kd.lr": 0.1}, {"phases.kd.lr": 0.2}), paths=ALL_PATHS[:2])
    assert [(s.grid, s.seeds) for s in settings(run)] == [({"phases.kd.lr": v}, [0, 1]) for v in (0.1, 0.2)]
    report = write_report(run).read_text()
    assert report.count("### `phases.kd.lr = 0.2`\n\n| Teacher |") == 1
    assert report.count("### `phases.kd.lr = 0.2`\n\n| a | b |") == 1
    assert [row[0] for row in trends.spread(settings(run)).rows] == [
        f"`phases.kd.lr = {v}`" for v in (0.1, 0.1, 0.2, 0.2)
    ]
    assert trends.variance(settings(run)).rows[0][2] == "4"  # two paths at two settings


def test_a_sweep_that_has_not_ended_shows_what_there_is(sweep, tmp_path):
    run = make_sweep(tmp_path)

    def cut(index):
        cell = index["cells"][2]
        del cell["nodes"][TWO]
        cell["evals"] = [e for e in cell["evals"] if e["node"] != TWO]

    change_index(run, cut)
    assert trends.values(Stored(run), TWO, "reverse_kl") == per_seed(sweep, TWO)[:2]
    assert "the evaluation of teacher \\> big \\> small \\> student" in write_report(run).read_text()


# -- significance ---------------------------------------------------------------------------------


def test_marks_say_what_differs_from_the_direct_hop_and_nothing_else(sweep):
    stored = Stored(sweep)
    tests = comparisons(stored)
    marks = tables.significance(stored, tests)
    significant = {
        (t["a"] if t["b"] == DIRECT else t["b"], t["field"])
        for t in tests
        if DIRECT in (t["a"], t["b"]) and t["p_holm"] < 0.05
    }
    assert set(marks) == significant and (TWO, "reverse_kl") in marks
    assert set(marks.values()) == {tables.BETTER}  # each hop more is better in this sweep
    cells = tables.results(stored, tests)
    row = next(r for r in cells.rows if r[1] == "`big` > `small`")
    assert re.fullmatch(r"\*\*\d\.\d{3}\*\* ▲ \[\d\.\d{3}, \d\.\d{3}\]", row[cells.head.index("Reverse KL")])
    turned = [{**t, "mean": -t["mean"]} for t in tests]
    assert set(tables.significance(stored, turned).values()) == {tables.WORSE}
    assert tables.significance(stored, [{**t, "p_holm": 0.05} for t in tests]) == {}


def test_students_cut_alike_under_other_names_are_rivals(tmp_path):
    """A baseline is a student of its own name and phases: what counts is the model that it starts from."""
    paths = [["teacher", "student-sft"], ["teacher", "student"], ["teacher", "big", "student"]]
    run = make_sweep(tmp_path, seeds=(0,), paths=paths, sizes={"teacher": 9, "big": 6, "student": 5, "student-sft": 5})
    change_index(run, lambda index: index["nodes"]["big"].update(hash="another"))
    stored = Stored(run)
    names = [">".join(p) for p in paths]
    assert stored.rivals(names[2]) == names
    assert [stored.direct(n) for n in names] == [names[0], names[0], names[1]]  # a chain: the hop to its own student
    assert "The direct hop: `teacher > student-sft`, `teacher > student`." in tables.legend(stored)
    change_index(run, lambda index: index["nodes"]["student-sft"].update(hash="another start"))
    assert Stored(run).rivals(names[2]) == names[1:] and len(comparisons(Stored(run))) == 3


# -- cost -----------------------------------------------------------------------------------------


def test_a_path_costs_all_its_hops(sweep):
    found = cost(Stored(sweep), TWO)
    assert (found.seconds, found.tokens, found.hours) == (1800, 6000, 1.0)  # three hops on two GPUs
    assert found.device == "GPU" and found.hardware == ("GPU X",)
    table = cost_table(Stored(sweep))
    assert table.head[:4] == ["Path", "Training time", "GPU hours", "Tokens"]
    assert table.rows[0][1:4] == ["10.0 min", "0.333", "2.0 k"] and table.rows[3][1:4] == ["30.0 min", "1", "6.0 k"]


def test_gain_is_from_the_untrained_student_to_the_trained_one(tmp_path):
    stored = Stored(make_run(tmp_path))
    table = cost_table(stored)
    values = dict(zip(table.head, table.rows[0], strict=True))
    assert values["Perplexity: untrained → trained"] == "812.4 → 54.60"  # exp of 6.7 and 4.0
    assert (values["CPU hours"], values["Tokens"]) == ("0.367", "28.0 k")  # 660 s, two processes; 1,000 a letter


def test_a_lost_record_of_a_hop_is_named_and_its_tokens_are_not_guessed(tmp_path):
    run = make_run(tmp_path)
    (run.parent.parent / "hops" / "ta-1" / "done.json").unlink()
    assert (
        cost(Stored(run), "teacher>ta>student").tokens is None and cost(Stored(run), "teacher>student").tokens == 15000
    )
    assert "done.json of hops/ta-1" in write_report(run).read_text().split("## Absent")[1]


def test_a_report_of_a_sweep_lacks_nothing(sweep):
    report = write_report(sweep).read_text()
    assert "Curves and answers are those of seed 0." in report
    absent = report.split("## Absent")[1].strip().splitlines()
    assert len(absent) == 7 and all("the metrics of" in line for line in absent)  # make_sweep writes none


# -- the graph ------------------------------------------------------------------------------------


def test_the_graph_has_a_node_for_every_model_of_every_path(sweep):
    stored = Stored(sweep)
    spots = {s.key: s for s in graph.layout(stored)}
    assert set(spots) == {">".join(path[:n]) for path in ALL_PATHS for n in range(1, len(path) + 1)}
    assert [spots[k].kind for k in ("teacher", "teacher>big", TWO)] == ["teacher", "assistant", "student"]
    for key, spot in spots.items():
        assert key == "teacher" or spots[spot.above].x + graph.WIDTH < spot.x
    assert len({spots[path].x for path in PATHS}) == 1  # students stand in one column
    boxes = [(s.x, s.y) for s in spots.values()]
    for i, (x, y) in enumerate(boxes):
        assert not any(abs(x - a) < graph.WIDTH and abs(y - b) < graph.HEIGHT for a, b in boxes[:i])
    for spot in (s for s in spots.values() if s.above):  # no node stands where an edge runs along its child's row
        start = spots[spot.above].x + graph.WIDTH
        assert not any(start < x < spot.x and abs(y - spot.y) < graph.HEIGHT / 2 for x, y in boxes)


def test_the_drawing_holds_the_figures_and_an_edge_for_every_hop(sweep):
    stored = Stored(sweep)
    root = ElementTree.fromstring(graph.svg(graph.layout(stored)))
    assert len(root.findall("path")) == 7 and len(root.findall("g")) == 8
    texts = {g.find("title").text: [t.text for t in g.findall("text")] for g in root.findall("g")}
    assert f"{np.mean(per_seed(sweep, TWO)):.3f}" in texts["teacher > big > small > student"]
    best = {g.find("title").text for g in root.findall("g") if g.findall("text[@class='best']")}
    assert best == {"teacher > big > small > student"}


def test_a_name_is_text_in_the_drawing(tmp_path):
    paths, sizes = [["teacher", 'a"<b&']], {"teacher": 2, 'a"<b&': 1}
    run = make_sweep(tmp_path, seeds=(0,), paths=paths, sizes=sizes)
    root = ElementTree.fromstring(graph.svg(graph.layout(Stored(run))))
    assert 'a"<b&, 1' in [t.text for t in root.iter("text")]


def test_a_damaged_cell_is_one_clear_line(tmp_path):
    run = make_sweep(tmp_path)
    change_index(run, lambda index: index["cells"][1]["evals"][0].pop("file"))
    with pytest.raises(ConfigError, match="damaged: .*index.json: field cells.1.evals.0.file is missing; run"):
        write_report(run)
