"""mskd plan --measure: trials within their share of the steps, shared hops once, and the same command goes on."""

import json
from pathlib import Path

import pytest
from chain_setup import mskd
from plan_setup import plan_config

from bench.plan import compare, table
from mskd.config import ConfigError, load, parse, to_toml
from mskd.config.phases import DistillmPhase, KdPhase
from mskd.plan.trials import SHARE, Bench, eval_every, measure


def quiet(line: str) -> None:
    pass


def kd_only(folder: Path, steps: int, assistants: int):
    """The plan's configuration without its minillm phase, with one assistant or two."""
    config = plan_config(folder, kd_steps=steps)
    names = ["teacher", *["four", "three"][:assistants], "student"]
    tree = config.model_dump(by_alias=True, exclude_none=True)
    models = {name: tree["models"][name] for name in names}
    return parse(tree | {"models": models, "chain": {"paths": "all"}, "phases": tree["phases"][:1]})


def test_a_rung_never_takes_more_than_its_share(tmp_path):
    bench = Bench(plan_config(tmp_path), tmp_path / "out", quiet)
    paths = list(bench.config.chain.paths)
    assert len(paths) == 4
    assert bench.steps(paths, 1.0) == 7 * 36  # 7 different hops of 24 and 12 steps
    assert bench.steps(paths, 0.26) == 7 * (6 + 3)  # each phase is rounded down
    for budget in (20, 42, 50, 100, 1000):
        assert bench.steps(paths, bench.fraction(paths, budget)) <= budget
    assert bench.fraction(paths, 1000) == 1.0
    with pytest.raises(ConfigError, match="too few steps to share out: 13 for the hops of 4 paths"):
        bench.fraction(paths, 13.9)  # 7 hops of two phases are 14 steps at least


def test_only_a_share_that_follows_the_validation_is_validated_in_a_trial():
    assert eval_every(KdPhase(steps=9, eval_every=3), 0.5) is None
    assert eval_every(DistillmPhase(steps=9, eval_every=3), 0.5) is None
    phase = DistillmPhase(steps=90, batch_size=4, rollouts=8, eval_every=30, adaptive_share={})
    assert [eval_every(phase, fraction) for fraction in (1.0, 0.5, 0.01)] == [30, 14, 2]  # rounds of two steps


def test_trials_choose_train_shared_hops_once_and_go_on(tmp_path):
    file, out, chosen = tmp_path / "run.toml", tmp_path / "out", tmp_path / "chosen.toml"
    config = kd_only(tmp_path, 6, assistants=1)
    file.write_text(to_toml(config))
    shown = mskd("plan", file, "--measure", "--out", out, "--write", chosen, check=True).stdout.splitlines()
    assert shown[-2] == "6 steps of trials, 33% of the 18 of the full sweep"
    done = {p: p.stat().st_mtime_ns for p in out.glob("plan/hops/*/done.json")}
    assert len(done) == 3  # teacher > four, its student, and the direct hop
    trained = [json.loads(line)["step"] for p in done for line in (p.parent / "metrics.jsonl").open() if "step" in line]
    assert max(trained) == 2
    found = measure(load(file), out, quiet)
    assert {p: p.stat().st_mtime_ns for p in out.glob("plan/hops/*/done.json")} == done  # nothing was trained again
    assert [t.reverse_kl for t in found.ranking] == sorted(t.reverse_kl for t in found.ranking)
    assert load(chosen).chain.paths == (found.ranking[0].path,)
    assert load(chosen).phases == config.phases


def test_what_cannot_be_measured_is_one_line(tmp_path):
    config = kd_only(tmp_path, 6, assistants=1)
    with pytest.raises(ConfigError, match="takes one seed and no grid"):
        measure(config.model_copy(update={"seeds": (1, 2)}), tmp_path, quiet)
    with pytest.raises(ConfigError, match="set data.validation"):
        measure(config.model_copy(update={"data": config.data.model_copy(update={"validation": 0})}), tmp_path, quiet)
    with pytest.raises(ConfigError, match="too few steps to share out: 1 for the hops of 2 paths"):
        measure(kd_only(tmp_path, 1, assistants=1), tmp_path, quiet)


@pytest.mark.slow
def test_the_trials_beside_the_full_sweep(tmp_path):
    """Both rankings in full, in at most a third of the steps. Whether they agree is in docs/plan.md, not asked here."""
    found = compare(plan_config(tmp_path), tmp_path / "out")
    assert found["trial_steps"] <= found["sweep_steps"] * SHARE and found["sweep_steps"] == 252
    assert {tuple(e["path"]) for e in found["trials"]} == {tuple(e["path"]) for e in found["sweep"]}
    kls = [e["reverse_kl"] for e in found["sweep"]]
    assert kls == sorted(kls) and len(kls) == 4 and 1 <= found["place_of_the_pick"] <= 4
    assert [e["rung"] for e in found["trials"]] == [1, 1, 0, 0]
    print("\n".join(table([found])))
