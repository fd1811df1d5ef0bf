"""Sweeps: every path, several seeds, grids. Shared hops are trained once, kills are survived, mistakes are one line."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from chain_setup import environment, tree, weights, write_rows

from mskd.cli import main
from mskd.config import ConfigError, load, parse, recipes, to_toml
from mskd.run.chain import distill
from mskd.run.sweep import MAX_HOPS, cells, check_size, num_cells, num_hops
from mskd.training import hop

MODELS = {
    "teacher": {"source": "somewhere"},
    "big": {"from": "teacher", "layers": 3},
    "mid": {"from": "teacher", "layers": 2},
    "student": {"from": "teacher", "layers": 1},
}
PHASES = [{"objective": "kd", "steps": 3}, {"objective": "lmops"}]
TREE = {"models": MODELS, "chain": {"paths": "all"}, "phases": PHASES}


# -- all paths ------------------------------------------------------------------------------------


def test_all_paths_over_two_assistants_short_ones_first():
    paths = parse(TREE).chain.paths
    assert [" ".join(p) for p in paths] == [
        "teacher student", "teacher big student", "teacher mid student", "teacher big mid student",
    ]  # fmt: skip
    assert num_hops(parse(TREE)) == 7  # t>s, t>b, t>b>s, t>m, t>m>s, t>b>m, t>b>m>s


@pytest.mark.parametrize("assistants", [1, 3, 10])
def test_n_assistants_make_two_to_the_n_different_paths_downwards(assistants):
    names = ["top", *(f"m{i}" for i in range(assistants)), "low"]
    paths = parse({**TREE, "models": {n: {"source": n} for n in names}}).chain.paths
    assert len(set(paths)) == 2**assistants
    for path in paths:
        assert (path[0], path[-1]) == ("top", "low")
        assert [names.index(n) for n in path] == sorted(names.index(n) for n in path)
    assert [len(p) for p in paths] == sorted(len(p) for p in paths)


def test_the_ends_may_be_named_and_models_outside_take_no_part():
    chain = {"paths": "all", "teacher": "big", "student": "student"}
    assert parse({**TREE, "chain": chain}).chain.paths == (("big", "student"), ("big", "mid", "student"))


# -- cells ----------------------------------------------------------------------------------------


def test_no_sweep_is_one_cell_the_configuration_itself():
    config = parse(TREE)
    (cell,) = cells(config)
    assert cell.config is config and cell.seed == 0 and cell.grid == {}


def test_cells_are_the_product_the_first_seed_first():
    grid = {"phases.lmops.mix_alpha": [0.1, 0.4], "phases.kd.lr": [1e-3]}
    config = parse({**TREE, "seed": 7, "seeds": [2, 1], "grid": grid})
    made = list(cells(config))
    assert len(made) == num_cells(config) == 4
    assert [(c.seed, c.config.phases[1].mix_alpha) for c in made] == [(2, 0.1), (2, 0.4), (1, 0.1), (1, 0.4)]
    assert {c.config.phases[0].lr for c in made} == {1e-3}
    assert [c.config.seed for c in made] == [2, 2, 1, 1] and {c.config.data.seed for c in made} == {7}
    assert made[1].label == "seed 2, phases.lmops.mix_alpha = 0.4, phases.kd.lr = 0.001"
    assert all(not c.config.seeds and not c.config.grid for c in made)


def test_a_preset_in_the_grid_brings_its_values_and_keeps_what_was_changed():
    phases = [{"objective": "lmops", "whiten": False, "lr": 1e-3}]
    grid = {"phases.lmops.objective": ["lmops", "minillm"], "phases.lmops.clip": [0.1]}
    kept, other = (c.config.phases[0] for c in cells(parse({**TREE, "phases": phases, "grid": grid})))
    assert (kept.objective, kept.gamma, kept.include_current) == ("lmops", 0.95, True)
    assert (other.objective, other.gamma, other.include_current) == ("minillm", 1.0, False)
    assert all((p.whiten, p.lr, p.clip) == (False, 1e-3, 0.1) for p in (kept, other))


def test_a_sweep_read_back_from_its_file_has_the_same_cells():
    config = parse({**TREE, "seeds": [0, 1], "grid": {"models.big.layers": [3, 4], "phases.1.objective": ["minillm"]}})
    again = parse(tomllib.loads(to_toml(config)))
    assert again == config
    assert [c.config for c in cells(again)] == [c.config for c in cells(config)]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_without_changes_stays_what_it_is(name):
    config = load(name).model_copy(update={"seeds": (), "grid": {}})
    assert config.with_values({}) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chain": {"paths": "al"}}, "give 'all' or a list"),
        ({"chain": {"paths": "all", "teacher": "x"}}, "chain.teacher is 'x', which is no model"),
        ({"chain": {"paths": "all", "teacher": "mid"}}, "needs 1 to 10 assistants named between 'mid' and 'student'"),
        ({"chain": {"paths": "all", "teacher": "student", "student": "mid"}}, "name the teacher 'student' before"),
        ({"chain": {"paths": "all", "techer": "mid"}}, "unknown key 'chain.techer'; did you mean 'teacher'?"),
        ({"chain": {"paths": [["teacher", "mid"]], "student": "mid"}}, "go with paths = 'all'"),
        ({"models": {"teacher": {"source": "x"}, "student": {"source": "y"}}}, "needs 1 to 10 assistants"),
        ({"models": {f"m{i}": {"source": "x"} for i in range(30)}}, "not 28; n of them make 2^n paths"),
        ({"models": {}}, "models"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": [-1]}, "seeds.0 is -1: input should be greater than or equal to 0"),
        ({"seeds": 3}, "seeds is 3: input should be a list"),
        ({"grid": {"phases.kd.lr": []}}, "grid.'phases.kd.lr' is empty"),
        ({"grid": {"phases.kd.lr": 1}}, "input should be a list"),
        ({"grid": {"phases.kd.lr": [1, 1]}}, "names a value twice"),
        ({"grid": {"phases.kd.lrr": [1]}}, "unknown key 'phases.0.lrr'; did you mean 'lr'?"),
        ({"grid": {"phases.sft.lr": [1]}}, "no single entry 'sft'"),
        ({"grid": {"phases.kd.lr": [1e-3, "x"]}}, "phases.0.lr is 'x'"),
        ({"grid": {"modles.big.layers": [1]}}, "unknown key 'modles'; did you mean 'models'?"),
        ({"grid": {"models.big.layers": [3, 0]}}, "models.big.layers is 0"),
        ({"grid": {"seed": [1, 2]}}, "a seed goes into seeds"),
        ({"grid": {"run.device": ["cpu"]}}, "cannot be varied"),
    ],
)  # fmt: skip
def test_each_mistake_of_a_sweep_is_one_clear_line(change, says):
    with pytest.raises(ConfigError) as caught:
        parse({**TREE, **change})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and "validation error" not in str(caught.value)


def test_a_sweep_that_explodes_says_how_much_it_is_and_asks():
    config = parse({**TREE, "name": "big", "seeds": [0, 1, 2], "grid": {"phases.kd.lr": [1e-4, 1e-3, 1e-2]}})
    with pytest.raises(ConfigError, match=f"big is 9 runs with 63 hops.*more than {MAX_HOPS}; go ahead with --yes"):
        check_size(config, yes=False)
    check_size(config, yes=True)
    check_size(parse({**TREE, "seeds": [0, 1]}), yes=False)


def test_the_command_asks_with_exit_code_2_before_it_looks_at_any_model(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    file.write_text(to_toml(parse({**TREE, "seeds": list(range(1000))})))
    for more, says in (((), "1000 runs with 7000 hops"), (("--yes", "--set", "seeds=[0]"), "somewhere")):
        monkeypatch.setattr(sys, "argv", ["mskd", "distill", str(file), "--out", str(out), *more])
        with pytest.raises(SystemExit) as exited:
            main()
        err = capsys.readouterr().err.strip()
        assert exited.value.code == 2 and says in err and "\n" not in err
        assert out.exists() == bool(more)


# -- runs -----------------------------------------------------------------------------------------


def small(model: Path, rows: Path, **changes):
    """Four paths over two assistants, one short phase a hop."""
    base = tree(model, rows, name="sweep")
    base["models"] = {**MODELS, "teacher": {"source": str(model)}}
    base["chain"] = {"paths": "all"}
    base["phases"] = [{**base["phases"][0], "steps": 3, "eval_every": None, "keep": "last"}]
    base["phases"][0].pop("eval_every")
    base["evaluation"]["max_new_tokens"] = 4
    base["run"]["save_every_s"] = 0.0
    return {**base, **changes}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def trained(monkeypatch):
    """The names of the nodes that are trained, in order."""
    names: list[str] = []
    real = hop.train

    def counted(job):
        names.append(job.name)
        return real(job)

    monkeypatch.setattr(hop, "train", counted)
    return names


def read_index(out: Path) -> dict:
    return json.loads((out / "runs" / "sweep" / "index.json").read_text())


def test_all_paths_train_each_shared_hop_once_and_the_direct_one_first(tiny_llama_folder, rows, tmp_path, trained):
    said: list[str] = []
    run = distill(parse(small(tiny_llama_folder, rows)), tmp_path, echo=said.append)
    assert len(run.students) == 4
    assert trained == [
        "teacher>student", "teacher>big", "teacher>big>student", "teacher>mid", "teacher>mid>student",
        "teacher>big>mid", "teacher>big>mid>student",
    ]  # fmt: skip
    direct = said.index("teacher>student: evaluating final")
    assert direct < next(i for i, line in enumerate(said) if line.startswith("teacher>big: kd"))
    assert "cells" not in read_index(tmp_path)


def test_seeds_share_what_is_not_trained_and_hold_out_the_same_items(tiny_llama_folder, rows, tmp_path, trained):
    base = small(tiny_llama_folder, rows, seeds=[4, 3])
    base["chain"] = {"paths": [["teacher", "mid", "student"], ["teacher", "student"]]}
    run = distill(parse(base), tmp_path, echo=lambda line: None)
    assert len(trained) == 6 and len(set(weights(tmp_path).values())) == 6 + 2  # and two models that are cut
    assert len(list((tmp_path / "models").iterdir())) == 3
    index = read_index(tmp_path)
    assert [c["seed"] for c in index["cells"]] == [4, 3] and index["nodes"] == index["cells"][0]["nodes"]
    one, two = ({e["label"]: e["file"] for e in c["evals"]} for c in index["cells"])
    assert one.keys() == two.keys() and one["student initial"] == two["student initial"]
    last = "teacher>mid>student final"
    items = [[json.loads(line)["item"] for line in open(tmp_path / e[last])] for e in (one, two)]
    prompts = [json.loads(open(tmp_path / e[last]).readline())["prompt"] for e in (one, two)]
    assert one[last] != two[last] and items[0] == items[1] and prompts[0] == prompts[1]
    assert set(run.students) == {
        f"{p} (seed {s})" for p in ("teacher > mid > student", "teacher > student") for s in (4, 3)
    }
    # the seed of the run itself is that of the sweep's cell: the node is the same
    alone = small(tiny_llama_folder, rows, name="alone", seed=4)
    alone["chain"], alone["data"] = base["chain"], {**base["data"], "seed": 3}
    distill(parse(alone), tmp_path, echo=lambda line: None)
    assert len(trained) == 6


def test_a_grid_shares_the_hops_that_it_does_not_change(tiny_llama_folder, rows, tmp_path, trained):
    base = small(tiny_llama_folder, rows, grid={'hop."mid>student".lr': [1e-3, 2e-3, 3e-3]})
    base["chain"] = {"paths": [["teacher", "mid", "student"]]}
    run = distill(parse(base), tmp_path, echo=lambda line: None)
    assert sorted(trained) == ["teacher>mid"] + 3 * ["teacher>mid>student"]
    index = read_index(tmp_path)
    assert [c["grid"] for c in index["cells"]] == [{'hop."mid>student".lr': lr} for lr in (1e-3, 2e-3, 3e-3)]
    assert len({c["nodes"]["teacher>mid"]["hash"] for c in index["cells"]}) == 1
    assert len({c["nodes"]["teacher>mid>student"]["hash"] for c in index["cells"]}) == 3
    assert all(c["nodes"]["teacher>mid"]["tokens"] > 0 for c in index["cells"])
    assert len(set(run.students.values())) == 3


def test_a_cell_that_cannot_run_is_found_before_anything_is_trained(tiny_llama_folder, rows, tmp_path, trained):
    base = small(tiny_llama_folder, rows, grid={"models.big.layers": [3, 9]})
    with pytest.raises(ConfigError, match="wants 9 layers, but teacher has 4; give at most 4"):
        distill(parse(base), tmp_path, echo=lambda line: None)
    base = small(tiny_llama_folder, rows)
    base["models"] = {k: base["models"][k] for k in ("teacher", "mid", "big", "student")}
    with pytest.raises(ConfigError, match="'big'.*bigger than its teacher 'mid'.*from big to small"):
        distill(parse(base), tmp_path, echo=lambda line: None)
    assert not trained and not list(tmp_path.rglob("*.safetensors"))


def test_models_cut_alike_are_one_initial_student_under_several_names(tiny_llama_folder, rows, tmp_path):
    base = small(tiny_llama_folder, rows)
    base["models"] = {**base["models"], "baseline": {"from": "teacher", "layers": 1}}
    base["chain"] = {"paths": [["teacher", "student"], ["teacher", "baseline"]]}
    base["hop"] = {"teacher>baseline": {"phases": [{"objective": "sft", "steps": 1}]}}
    run = distill(parse(base), tmp_path, echo=lambda line: None)
    nodes = read_index(tmp_path)["nodes"]
    assert nodes["student"]["hash"] == nodes["baseline"]["hash"]
    cut = [tmp_path / nodes[name]["dir"] / "done.json" for name in ("student", "baseline")]
    assert len({json.loads(path.read_text())["weights"] for path in cut}) == 1
    assert nodes["teacher>student"]["hash"] != nodes["teacher>baseline"]["hash"] and len(run.students) == 2


@pytest.mark.slow
def test_killed_in_its_middle_a_sweep_ends_with_the_same_bits_and_trains_nothing_twice(
    tiny_llama_folder, rows, tmp_path
):
    """The first process kills itself at its ninth optimizer step; over both, every step of every node is done once."""
    base = small(tiny_llama_folder, rows, seeds=[0, 1])
    base["models"].pop("big")
    config = parse(base)
    file = tmp_path / "sweep.toml"
    file.write_text(to_toml(config))
    code = (
        "import os, signal, sys\n"
        "import mskd; from mskd.training import hop\n"
        "real, left = hop.backward, [int(sys.argv[3])]\n"
        "def dying(*args, **kwargs):\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    print('step', file=sys.stderr)\n"
        "    return real(*args, **kwargs)\n"
        "hop.backward = dying\n"
        "mskd.distill(mskd.load(sys.argv[1]), sys.argv[2])\n"
    )
    codes, steps = [], []
    for out, allowed in (("out", 8), ("out", 1000), ("whole", 1000)):
        command = [sys.executable, "-c", code, str(file), str(tmp_path / out), str(allowed)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
        codes.append(result.returncode)
        steps.append(result.stderr.splitlines().count("step"))
    assert codes == [-signal.SIGKILL, 0, 0]
    assert steps[0] + steps[1] == steps[2] == 6 * 3  # 3 hops for each of 2 seeds, 3 steps each: none done twice
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "out")) == 6 + 2
    assert os.path.exists(tmp_path / "out" / "runs" / "sweep" / "report.md")
