"""The configuration: presets, overrides, round trip, and one clear line for every mistake."""

import tomllib
from pathlib import Path

import pytest

from mskd.config import ConfigError, EvalConfig, EvaluateConfig, load, parse, recipes, to_toml
from mskd.config.phases import OBJECTIVES, KdPhase, MinillmPhase
from mskd.store.hashes import digest

ROOT = Path(__file__).parents[2]
# Of the demo's phases, before seqkd, gkd and distillm came: its finished nodes stay valid.
DEMO_PHASES = "2e5951ec7bfae647795b7f18068f0bb41ccfac9da17888b018a19a0b1d1e5035"
TREE = {
    "models": {
        "teacher": {"source": "somewhere"},
        "ta": {"from": "teacher", "layers": 3},
        "student": {"from": "teacher", "layers": 2},
    },
    "chain": {"paths": [["teacher", "ta", "student"], ["teacher", "student"]]},
    "phases": [{"objective": "kd", "steps": 3}, {"objective": "lmops"}],
}


def test_presets_are_sets_of_values_and_each_value_can_be_changed():
    paper = MinillmPhase.model_validate({"objective": "minillm"})
    released = MinillmPhase.model_validate({"objective": "lmops"})
    assert (paper.gamma, paper.include_current, paper.whiten, paper.weight_single_step) == (1.0, False, False, True)
    assert (released.gamma, released.include_current, released.whiten) == (0.95, True, True)
    assert released.reward_scaling == 0.5
    assert (released.kd_ratio, released.reward_clip, released.clip_weighted_ratio) == (0.5, 100.0, True)
    changed = MinillmPhase.model_validate({"objective": "lmops", "whiten": False})
    assert changed == released.model_copy(update={"whiten": False})
    assert EvalConfig.model_validate({"protocol": "released"}).seeds == (10, 20, 30, 40, 50)
    assert EvalConfig.model_validate({"protocol": "quick", "max_new_tokens": 7}).max_new_tokens == 7


def test_round_trip_through_toml():
    config = parse({**TREE, "hop": {"ta>student": {"lr": 1e-5}}, "data": {"source": 'odd "name"\\\t'}})
    text = to_toml(config, "two\nlines")
    assert text.startswith("# two\n# lines\n")
    assert parse(tomllib.loads(text)) == config


@pytest.mark.parametrize(("given", "steps", "epochs"), [({"epochs": 0}, 5000, None), ({"steps": 0}, None, 10)])
def test_a_limit_that_is_lifted_stays_lifted_through_toml(given, steps, epochs):
    config = parse({**TREE, "phases": [{"objective": "minillm", **given}]})
    assert (config.phases[0].steps, config.phases[0].epochs) == (steps, epochs)
    assert parse(tomllib.loads(to_toml(config))) == config
    assert MinillmPhase(**{k: None for k in given}).steps == steps  # from Python None says the same
    with pytest.raises(ConfigError, match="needs steps or epochs"):
        parse({**TREE, "phases": [{"objective": "kd", "steps": 0}]})


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_round_trips(name):
    config = load(name)
    assert parse(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "results").glob("*/config.toml")), ids=lambda f: f.parent.name)
def test_the_configurations_of_older_runs_load(file):
    config = load(file)
    assert config.name != "config" and parse(tomllib.loads(to_toml(config))) == config


def test_a_models_own_code_is_never_run_and_old_configurations_that_say_so_load():
    named = {**TREE["models"], "teacher": {"source": "somewhere", "trust_remote_code": False}}
    assert parse({**TREE, "models": named}) == parse(TREE) and "trust_remote_code" not in to_toml(parse(TREE))
    with pytest.raises(ConfigError, match="trust_remote_code: mskd runs no code of a model's folder, .* the line out"):
        parse(TREE, ["models.teacher.trust_remote_code=true"])


def test_overrides_reach_every_place():
    config = parse(
        TREE,
        ["phases.lmops.lr=1e-6", "phases.0.steps=9", "data.source=a b.jsonl", "models.ta={from='teacher', layers=4}",
         'hop."ta>student".lr=0.5', "run.trackers=['tensorboard']", "seed=7"],
    )  # fmt: skip
    assert config.phases[1].lr == 1e-6 and config.phases[0].steps == 9
    assert config.data.source == "a b.jsonl" and config.models["ta"].layers == 4
    assert config.run.trackers == ("tensorboard",) and config.seed == 7
    assert [p.lr for p in config.hop_phases("ta", "student")] == [0.5, 0.5]
    assert [p.lr for p in config.hop_phases("teacher", "ta")] == [1e-4, 1e-6]


def test_a_hop_may_have_phases_of_its_own():
    config = parse({**TREE, "hop": {"teacher>student": {"phases": [{"objective": "sft", "steps": 2}], "lr": 0.1}}})
    (phase,) = config.hop_phases("teacher", "student")
    assert (phase.objective, phase.steps, phase.lr) == ("sft", 2, 0.1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.sorce=x", "unknown key 'data.sorce'; did you mean 'source'?"),
        ("modles.x=1", "unknown key 'modles'; did you mean 'models'?"),
        ("phases.lmops.rollout=3", "did you mean 'rollouts'?"),
        ("models.ta.layer=3", "did you mean 'layers'?"),
        ("phases.0.steps=many", "phases.0.steps is 'many'"),
        ("phases.0.objective=ppo", "allowed: sft, kd, seqkd, gkd, distillm, minillm, lmops"),
        (
            "phases.0={objective='gkd', steps=1, beta=1.5}",
            "beta is 1.5: input should be less than or equal to 1",
        ),
        (
            "phases.0={objective='gkd', steps=1, student_share=2}",
            "student_share is 2: input should be less",
        ),
        ("phases.0={objective='gkd', steps=1, betta=0}", "unknown key 'phases.0.betta'; did you mean 'beta'?"),
        ("phases.0={objective='gkd', steps=1, rollouts=9}", "rollouts (9) must be a multiple of batch_size (8)"),
        ("phases.0={objective='distillm', steps=1, skew=1}", "skew is 1: input should be less than 1"),
        (
            "phases.0={objective='distillm', steps=1, adaptive_share={}}",
            "adaptive_share needs eval_every, the number of steps between validations",
        ),
        (
            "phases.0={objective='distillm', steps=1, adaptive_share={}, eval_every=3, rollouts=16}",
            "changes between rounds of 2 steps (rollouts / batch_size); eval_every (3) must be a multiple of that",
        ),
        (
            "phases.0={objective='distillm', steps=1, replay={capacity=4}}",
            "replay.capacity (4) must be at least the 8 sequences of a round",
        ),
        ("phases.0={objective='gkd', steps=1, replay={fresh='never'}}", "'decreasing', 'constant' or 'increasing'"),
        ("phases.0={objective='gkd', steps=1, adaptive_share={stepp=1}}", "did you mean 'step'?"),
        ("phases.0={objective='distillm', steps=1, divergence='jsd'}", "'skew_kl' or 'skew_reverse_kl'"),
        ("phases.0={objective='seqkd', steps=1, teacher_responses={topp=1}}", "did you mean 'top_p'?"),
        ("phases.0.teacher_responses={temperature=0}", "teacher_responses.temperature is 0: input should be greater"),
        ("phases.0.teacher_responses={data_share=1}", "data_share is 1: input should be less than 1"),
        ("models.teacher.prepare=[{objective='seqkd', steps=1}]", "without a teacher (sft), not seqkd"),
        ("phases.sft.lr=1", "allowed: 0, 1, kd, lmops"),
        ("phases.0.lr=-1", "greater than 0"),
        ("phases.0.keep=best", "needs eval_every"),
        ("phases.0.eval_every=2", "eval_every needs validation items"),
        ("phases.lmops.rollouts=65", "rollouts (65) must be a multiple of batch_size (64)"),
        ("run.device=tpu", "'auto', 'cpu' or 'cuda'"),
        ("chain.paths=[['teacher','tb']]", "names 'tb', which is no model; did you mean 'ta'?"),
        ("chain.paths=[['teacher']]", "at least a teacher and a student"),
        ("chain.paths=[['teacher','ta','teacher']]", "names a model twice"),
        ("models.ta={from='student', layers=1}", None),
        ("models.ta={from='taa', layers=1}", "cut from 'taa', which is no model; did you mean 'ta'?"),
        ("models.ta={from='ta', layers=1}", "cut from itself"),
        ("models.ta={source='x', from='teacher'}", "either source or from"),
        ("models.ta={from='teacher'}", "needs layers"),
        ("models.teacher.precision=int4", "'int8', 'llm_int8', 'fp16', 'bf16' or 'fp32'"),
        ('hop."teacher>x".lr=1', "is on no path"),
        ('hop."ta>student".lrr=1', "unknown key 'lrr'; did you mean 'lr'?"),
        ("name=a/b", "name is 'a/b'"),
        ("seed", "must look like key=value"),
        ("seed.x.y=1", "seed is {'x'"),
        ("data.source.x=1", "data.source is {'x'"),
    ],
)
def test_each_mistake_is_one_clear_line(override, says):
    try:
        parse(TREE, [override])
    except ConfigError as e:
        assert says is not None and says in str(e)
        assert "\n" not in str(e) and "validation error" not in str(e)
    else:
        assert says is None


def test_all_problems_are_listed_and_keys_that_do_not_exist_come_first():
    def line(tree):
        with pytest.raises(ConfigError) as error:
            parse(tree, where="run.toml")
        return str(error.value)

    assert line({"nmae": "x"}) == (
        "run.toml: 2 problems: (1) unknown key 'nmae'; did you mean 'name'? "
        "(2) 'models', 'chain' and 'phases' are missing"
    )
    phases = [{"objective": "kd", "steps": 0.5, "lrr": 1}, {"objective": "ppo"}]
    assert line({**TREE, "phases": phases, "sed": 1, "seed": -1}) == (
        "run.toml: 5 problems: (1) unknown key 'sed'; did you mean 'seed'? "
        "(2) unknown key 'phases.0.lrr'; did you mean 'lr'? "
        "(3) seed is -1: input should be greater than or equal to 0 "
        "(4) phases.1.objective is 'ppo'; allowed: sft, kd, seqkd, gkd, distillm, minillm, lmops "
        "(5) phases.0.steps is 0.5: input should be a valid integer, got a number with a fractional part"
    )
    assert line({**TREE, "chain": {"paths": [["ta", "x"], ["teacher"]]}, "hop": {}}) == (
        "run.toml: 2 problems: (1) the path 'ta > x' names 'x', which is no model "
        "(2) the path 'teacher' needs at least a teacher and a student"
    )
    assert "sed" in line({**TREE, "chain": {"paths": "all", "teacher": "x"}, "sed": 1})
    assert "(30)" in (many := line({**TREE, "seeds": ["x"] * 500})) and many.endswith("and 470 more like these")
    models = {"kd": {"source": "x", "sorce": 1}, "b": {"source": "y"}}  # a model that is called as an objective
    assert "unknown key 'models.kd.sorce'; did you mean 'source'?" in line({**TREE, "models": models})
    assert line({**TREE, "steps": 3}) == "run.toml: unknown key 'steps'; it is a key of [[phases]]"
    assert "'data.max_new_tokens'; it is a key of [[phases]] and [evaluation]" in line(
        {**TREE, "data": {"max_new_tokens": 1}}
    )
    sft = {"objective": "sft", "steps": 1, "temperature": 2}  # which other objectives have
    assert "unknown key 'phases.0.temperature'; allowed: batch_size, betas, " in line({**TREE, "phases": [sft]})
    assert line({**TREE, "phases": [{"steps": 1}]}).endswith(
        "phases.0 needs an objective; allowed: " + ", ".join(OBJECTIVES)
    )
    assert line({**TREE, "phases": []}) == "run.toml: phases is []: list should have at least 1 item"
    assert "models.'a\\nb' is 'a\\nb': a name has" in line(
        {**TREE, "models": {**TREE["models"], "a\nb": {"source": "x"}}}
    )


def test_a_key_of_evaluate_is_looked_for_among_its_own():
    with pytest.raises(ConfigError) as error:
        parse({"phases": []}, where="flags", kind=EvaluateConfig)
    assert str(error.value) == "flags: unknown key 'phases'; allowed: data, evaluation, precision, run, seed"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.test=true", "data.test is true: give a number of rows from 0 to 1000000000, a file or a hub id"),
        ("data.test=''", "data.test is ''"),
        ("data.test=-1", "data.test is -1: give a number of rows from 0 to 1000000000, a file or a hub id"),
        ("data.source=''", "data.source is ''"),
        ("models.ta={source=''}", "models.ta.source is ''"),
        ("evaluation.data=['']", "evaluation.data.0 is ''"),
        ("seed=true", "seed is true: a number is needed"),
        ("seeds=[true]", "seeds.0 is true: a number is needed"),
        ("phases.0.steps=false", "phases.0.steps is false: a number is needed"),
        ("name=..", "not dots alone"),
        (f"name={'x' * 201}", "a name has 1 to 200 letters"),
        (f"models.{'x' * 101}={{source='x'}}", "a name has 1 to 100 letters"),
        ('models.".."={source="x"}', "is '..': a name has"),
        ("phases.0.betas=[0.9, 2]", "phases.0.betas.1 is 2: input should be less than 1"),
        ("phases.lmops.rollouts=999999999998", "rollouts is 999999999998: input should be less than or equal to 1048"),
        ("train.loss_chunk_mb=1e23", "train.loss_chunk_mb is 1e+23: a whole number here has at most 64 bits"),
        ("phases.².lr=1", "no single entry '²' in that list; allowed: 0, 1, kd, lmops"),
        ('hop."ta>student".phases=5', "hop.'ta>student': phases is 5: input should be a list"),
        ('hop."ta>student".phases=[{objective="sft", steps=1, lrr=1}]', "unknown key 'phases.0.lrr'; did you mean 'l"),
        ("seed=" + "[" * 1000, "seed is '[[["),
        ("seed=" + "9" * 5000, "seed is '999"),
        ("seed=0x" + "f" * 5000, "'seed' is <int>; a whole number here has at most 64 bits"),
        ("seed=1\nname=2", "seed is '1\\nname=2'"),
        (".=1", "'.' is no key"),
        ("data..test=1", "'data..test' is no key"),
        ('hop."ta>student.lr=1', "is no key"),
        ("a." * 5000 + "b=1", "a key has at most 50 parts, this has 5001"),
    ],
)
def test_what_only_looks_right_is_refused(override, says):
    with pytest.raises(ConfigError) as error:
        parse(TREE, [override])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_says_off_or_leaves_room_stays_right():
    config = parse(
        TREE, ["data.text=''", "data.test=0", "phases.0.lr=.5", "phases.0.steps=1e2", "seed=9223372036854775807"]
    )
    assert not config.data.text and config.data.test == 0
    assert (config.phases[0].lr, config.phases[0].steps, config.seed) == (0.5, 100, 2**63 - 1)


def test_paths_that_are_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.toml"
    file.write_text(to_toml(parse(TREE)))
    for given, says in [
        ("c.toml/", "'c.toml/' ends with '/', but is a file"),
        ("x" * 3000, "File name too long"),
        ("~nosuchuser/x", "Could not determine home directory"),
        ("a\0b", "null byte"),
        (".", "'.' is a folder; give a recipe or a TOML file"),
        ("/dev/null", "'/dev/null' is no file to read"),
        (str(tmp_path / "c"), "no recipe or file"),
    ]:
        with pytest.raises(ConfigError) as error:
            load(given)
        assert says in str(error.value) and "\n" not in str(error.value)
    assert load(file) == parse(TREE)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))  # as some editors write it
    assert load("c.toml") == parse(TREE)
    for text in ("a = " + "[" * 5000, "seed = " + "9" * 5000, "[" + "a." * 5000 + "b]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"no valid TOML|more than 50"):
            load(file)


def test_a_file_that_is_no_toml_or_not_there(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load("dmeo")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match="no valid TOML"):
        load(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no valid TOML"):
        load(bad)


def test_every_objective_has_a_phase_that_says_what_it_needs():
    assert list(OBJECTIVES) == ["sft", "kd", "seqkd", "gkd", "distillm", "minillm", "lmops"]
    made = {name: phase.model_validate({"objective": name, "steps": 1}) for name, phase in OBJECTIVES.items()}
    assert [name for name, phase in made.items() if phase.needs_responses] == ["sft", "kd", "gkd", "distillm"]
    for changed, needs in [
        ({"objective": "seqkd", "eval_every": 1}, True),
        ({"objective": "seqkd", "teacher_responses": {"data_share": 0.5}}, True),
        ({"objective": "kd", "teacher_responses": {}}, False),
        ({"objective": "gkd", "student_share": 1}, False),
        ({"objective": "gkd", "teacher_responses": {}}, False),
    ]:
        assert OBJECTIVES[changed["objective"]].model_validate({"steps": 1, **changed}).needs_responses == needs, (
            changed
        )


def test_what_a_hash_covers_of_a_phase_is_what_it_was_before_there_were_teacher_responses():
    old = KdPhase(steps=1).identity()
    assert "teacher_responses" not in old and len(old) == len(KdPhase.model_fields) - 1
    asked = KdPhase(steps=1, teacher_responses={}).identity()
    assert asked["teacher_responses"]["max_new_tokens"] == 256
    assert digest([p.identity() for p in load("demo").phases]) == DEMO_PHASES
