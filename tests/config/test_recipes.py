"""The recipes: each parses, its paths and values are what it promises, its comparisons are fair. Nothing is fetched."""

import itertools
import socket
import sys

import pytest
from chain_setup import write_rows

from mskd.cli import main
from mskd.config import RECIPES, load, parse, recipes
from mskd.config.hardware import detect
from mskd.run.chain import distill
from mskd.run.nodes import Graph
from mskd.run.sweep import cells, check_size, num_hops

PAPER = {
    "paper-gpt2": ("gpt2", ("1.5B", "760M", "340M", "120M")),
    "paper-opt": ("opt", ("13B", "6.7B", "2.7B", "1.3B")),
}
DOLLY = ("dolly-smollm2", "dolly-smollm2-cpu")


def test_the_recipes_are_these():
    assert set(recipes()) == {"demo", "two-stage", *DOLLY, *PAPER}


@pytest.mark.parametrize("name", recipes())
def test_every_cell_of_a_recipe_is_checked_and_may_run_without_being_asked(name):
    config = load(name)
    check_size(config, yes=False)
    assert config.name == name and all(cell.config.chain == config.chain for cell in cells(config))


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_says_what_it_is_for_and_is_documented(name):
    first = (RECIPES / f"{name}.toml").read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 40
    assert f"## {name}\n" in (RECIPES.parents[2] / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_paths_are_all_of_its_table(name):
    """Table of the paper: every path from the biggest model down to each smaller one, seven in all."""
    family, sizes = PAPER[name]
    config = load(name)
    models = [f"{family}-{size}" for size in sizes]
    assert list(config.models) == models
    expected = {
        (models[0], *between, models[end])
        for end in (1, 2, 3)
        for n in range(end)
        for between in itertools.combinations(models[1:end], n)
    }
    assert set(config.chain.paths) == expected and len(config.chain.paths) == len(expected) == 7
    assert num_hops(config) == 7


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyperparameters(name):
    config = load(name)
    family, sizes = PAPER[name]
    (phase,) = config.hop_phases(config.chain.paths[0][0], config.chain.paths[0][1])
    assert phase.objective == "lmops" and (phase.steps, phase.lr, phase.kd_ratio) == (5000, 5e-6, 0.5)
    assert (phase.temperature, phase.top_p, phase.top_k, phase.mix_alpha) == (1.0, 1.0, 0, 0.2)
    assert (phase.rollouts, phase.ppo_epochs, phase.batch_size, phase.warmup_steps) == (256, 4, 64, 100)
    assert (phase.betas, phase.eps, phase.weight_decay, phase.grad_clip) == ((0.9, 0.95), 1e-8, 1e-6, 1.0)
    assert phase == parse({**tiny(), "phases": [{"objective": "lmops"}]}).phases[0]  # nothing but the preset's defaults
    for teacher in (f"{family}-{size}" for size in sizes[:3]):
        last = config.hop_phases(teacher, f"{family}-{sizes[3]}")[0]
        assert last.batch_size == (256 if family == "gpt2" else 64)
    learning_rates = [model.prepare[0].lr for model in config.models.values()]
    assert learning_rates == ([5e-5, 1e-4, 1e-4, 5e-4] if family == "gpt2" else [1e-5, 1e-5, 5e-5, 5e-5])
    for model in config.models.values():
        (sft,) = model.prepare
        assert (sft.objective, sft.schedule, sft.keep) == ("sft", "cosine", "best") and sft.epochs in (10, 20)
    assert (config.data.test, config.data.max_prompt_tokens, config.data.max_tokens) == (500, 256, 512)
    assert config.evaluation.protocol == "released" and config.evaluation.seeds == (10, 20, 30, 40, 50)


def tiny():
    return {"models": {"a": {"source": "x"}, "b": {"source": "y"}}, "chain": {"paths": [["a", "b"]]}}


@pytest.mark.parametrize("name", DOLLY)
def test_the_chains_of_dolly_and_their_baselines_start_alike_and_train_as_long(name):
    config = load(name)
    layers = [tuple(config.models[m].layers or 30 for m in path) for path in config.chain.paths]
    assert layers[:3] == [(30, 16), (30, 22, 16), (30, 24, 20, 16)] and set(layers[3:]) == {(30, 16)}
    start = config.models["student"]
    assert all(config.models[path[-1]] == start for path in config.chain.paths)

    def trained(path):
        """Steps of a path by objective, and everything else of its phases, which must not differ."""
        phases = [p for a, b in itertools.pairwise(path) for p in config.hop_phases(a, b)]
        steps = {o: sum(p.steps for p in phases if p.objective == o) for o in {p.objective for p in phases}}
        return steps, {p.objective: p.model_copy(update={"steps": 1}) for p in phases}

    direct, two, three, sft, kd, double, triple = (trained(path) for path in config.chain.paths)
    assert double == two and triple == three
    assert two[0] == {k: 2 * v for k, v in direct[0].items()} and three[0] == {k: 3 * v for k, v in direct[0].items()}
    for other, objective in ((sft, "sft"), (kd, "kd")):
        assert other[0] == {objective: sum(direct[0].values())}
    assert kd[1]["kd"] == direct[1]["kd"]
    assert list(config.hop_phases("teacher", "student-2x"))[0].objective == "kd"


def test_two_stages_and_each_stage_alone_train_as_many_steps_from_the_same_student():
    config = load("two-stage")
    both, synthetic, human = (config.hop_phases(*path) for path in config.chain.paths)
    assert [p.objective for p in both] == ["seqkd", "sft"]
    assert [p.objective for p in (*synthetic, *human)] == ["seqkd", "sft"]
    assert sum(p.steps for p in both) == synthetic[0].steps == human[0].steps
    assert all(config.models[path[-1]] == config.models["student"] for path in config.chain.paths)


@pytest.mark.parametrize("name", recipes())
def test_a_dry_run_lists_every_hop_and_asks_no_network(name, monkeypatch, capsys):
    def refused(*args, **kwargs):
        raise AssertionError("a dry run went to the network")

    for call in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, call, refused)
    monkeypatch.setattr(sys, "argv", ["mskd", "distill", name, "--dry-run"])
    with pytest.raises(SystemExit) as exited:
        main()
    table, config = capsys.readouterr().out, load(name)
    assert exited.value.code == 0
    hops = {path[:n] for path in config.chain.paths for n in range(2, len(path) + 1)}
    assert all(f"| {' > '.join(hop)} |" in table for hop in hops) and len(hops) == num_hops(config)


def on_the_tiny_model(name, model, rows):
    """A recipe with the tests' tiny model for each of its models, and small data."""
    config = load(name)
    values = {f'models."{m}".source': str(model) for m, c in config.models.items() if c.source}
    values |= {f'models."{m}".layers': max(1, c.layers // 8) for m, c in config.models.items() if c.layers}
    data = {"source": str(rows), "test": 4, "validation": 3 if name in PAPER else 0, "template": "alpaca"}
    values |= {f"data.{k}": v for k, v in data.items()} | {"run": {"device": "cpu"}}
    return next(cells(config)).config.with_values(values)


@pytest.mark.parametrize(("name", "models", "hops"), [("demo", 3, 3), ("two-stage", 4, 3), ("paper-gpt2", 4, 7),
                                                      ("paper-opt", 4, 7), ("dolly-smollm2", 9, 10)])  # fmt: skip
def test_a_recipe_shares_its_hops_and_passes_every_check_before_training(
    name, models, hops, tiny_llama_folder, tmp_path
):
    rows = write_rows(tmp_path / "rows.jsonl")
    config = on_the_tiny_model(name, tiny_llama_folder, rows)
    graph = Graph(config, tmp_path, detect("cpu"), lambda line: None)
    kinds = [node.kind for node in graph.nodes.values()]
    assert (kinds.count("model"), kinds.count("hop")) == (models, hops)
    if name in PAPER:
        assert all(node.phases for node in graph.nodes.values())  # every model is fine-tuned first
    if name in DOLLY:
        assert len({graph.nodes[path[-1]].hash for path in config.chain.paths}) == 1  # one initial student


@pytest.mark.slow
def test_two_stage_runs_to_its_end_on_the_tiny_model(tiny_llama_folder, tmp_path):
    config = on_the_tiny_model("two-stage", tiny_llama_folder, write_rows(tmp_path / "rows.jsonl"))
    short = {f"phases.{i}.steps": 2 for i in (0, 1)} | {"phases.0.teacher_responses.max_new_tokens": 8}
    for name in ("synthetic", "human"):
        short[f'hop."teacher>student-{name}".phases.0.steps'] = 2
    run = distill(config.with_values(short), tmp_path / "out", echo=lambda line: None)
    assert len(run.students) == 3 and all((folder / "model.safetensors").exists() for folder in run.students.values())
