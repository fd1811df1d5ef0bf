"""The configuration: presets, overrides, round trip, and one clear line for every mistake."""

import tomllib

import pytest

from mskd.config import ConfigError, EvalConfig, load, parse, recipes, to_toml
from mskd.config.phases import OBJECTIVES, KdPhase, MinillmPhase
from mskd.store.hashes import digest

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
