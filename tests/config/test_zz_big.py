"""Every key of the configuration with values of every type: a checked configuration or one clear line, at once.

The keys are read from the schema, so a field that is added later is tested here too.
"""

import copy
import math
from collections.abc import Iterator
from datetime import date, time
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mskd.config import Config, ConfigError, EvaluateConfig, parse, to_toml
from mskd.config.phases import OBJECTIVES, resolve_steps
from mskd.config.problems import read_toml
from mskd.plan.estimate import budget_table
from mskd.run.sweep import num_cells, num_hops
from mskd.training.optim import learning_rate

HOP = "teacher>ta"
Place = tuple[str | int, ...]


def base(objective: str) -> dict[str, Any]:
    """A configuration that is right, of one phase."""
    return {
        "models": {
            "teacher": {"source": "smollm2-135m"},
            "ta": {"from": "teacher", "layers": 22, "prepare": [{"objective": "sft", "steps": 1}]},
            "student": {"from": "teacher", "layers": 16},
        },
        "chain": {"paths": [["teacher", "ta", "student"], ["teacher", "student"]]},
        "data": {"validation": 3},
        "phases": [{"objective": objective, "steps": 6, "eval_every": 2}],
    }


def types(annotation: Any) -> Iterator[Any]:
    """The types that a value, or an entry of a list of them, may have."""
    if get_origin(annotation) in (Annotated, tuple):
        yield from types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from types(option)
    else:
        yield annotation


def keys(model: type[BaseModel], at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every key below a model with its type. Phases are at (..., "phases", objective, ...), models at "student"."""
    for name, field in model.model_fields.items():
        place = (*at, field.alias or name)
        yield place, field.annotation
        below = [t for t in types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if name == "models":
            yield from keys(get_args(field.annotation)[1], (*place, "student"))
        for kind in below if len(below) == 1 else ():
            yield from keys(kind, place)
        for objective in OBJECTIVES if len(below) > 1 and "student" not in at else ():
            yield from keys(OBJECTIVES[objective], (*place, objective))


KEYS = list(keys(Config))
# Fields that phases have in common, once; by the first parts of their places.
ONCE = {(place[-1], str(annotation)): place for place, annotation in reversed(KEYS) if len(place) > 2} | {
    place: place for place, _ in KEYS if len(place) <= 2
}
TABLES: dict[Place, list[Place]] = {}
for place in ONCE.values():
    TABLES.setdefault(place[:1] if place[0] != "phases" else place[:2], []).append(place)
NUMBERS = [place for place, annotation in KEYS if {int, float} & set(types(annotation))]
LITERALS = sorted({word for _, a in KEYS for t in types(a) if get_origin(t) is Literal for word in get_args(t)})


def put(place: Place, value: Any, into: str = "phases") -> dict[str, Any]:
    """A right configuration but for one value. into = "hop": a phase's value goes into the overrides of a hop."""
    objective = str(place[1]) if place[0] == "phases" and len(place) > 1 else "kd"
    tree = base(objective)
    path = list(place)
    if path[0] == "phases" and len(path) > 1:
        path[:2] = ["hop", HOP] if into == "hop" else ["phases", 0]
    node: Any = tree
    for part in path[:-1]:
        node = node[part] if isinstance(node, list) else node.setdefault(part, {})
    node[path[-1]] = value
    return tree


def outcome(tree: Any, overrides: tuple[str, ...] = (), kind: type = Config) -> Config | str:
    """What comes of a configuration: itself, used as the beginning of every command uses it, or the one line."""
    try:
        config = parse(tree, overrides, where="run.toml", kind=kind)
        if kind is Config:
            use(config)
        return config
    except ConfigError as e:
        line = str(e)
        assert line.strip() and "\n" not in line and len(line) < 8000, line
        assert "validation error" not in line and "pydantic" not in line, line
        return line


def use(config: Config) -> None:
    assert parse(read_toml(to_toml(config), "it")) == config
    assert num_cells(config) * num_hops(config) >= 1
    for path in config.chain.paths:
        for phase in config.hop_phases(path[0], path[1]):
            total = resolve_steps(phase, 15_000)
            assert 1 <= total < 2**63
            for step in (0, total // 2, total - 1):
                assert math.isfinite(learning_rate(phase, step, total))
    assert all("inf" not in line and "nan" not in line for line in budget_table(config))


WILD = [
    True, False, None, 0, -1, 1, 2, 3.5, -0.0, 1e-320, 1e23, 1e308, -1e308, math.inf, -math.inf, math.nan,
    10**9, 10**18, 2**63, -(2**63) - 1, 10**400, 16**5000, "", "x", " ", "5", "1e400", "nan", "true", "²", "\0",
    "\ud800", "~nosuchuser/x", "x" * 3000, "a/" * 2000, "..", "/dev/zero", "é\n\u2028", b"x", date(1979, 5, 27),
    time(7, 32),
    [], [[]], [True], [math.nan], [1, 2], ["x"], ["x"] * 999, {}, {"x": 1}, {"objective": "x"}, {"objective": []},
    [{}], [{"objective": "sft"}], {"": {"": {}}}, {1: 2}, {"\ud800": 1}, object(),
]  # fmt: skip


def deep(levels: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(levels):
        tree = [tree]
    return tree


@pytest.mark.parametrize("table", TABLES, ids=lambda table: ".".join(map(str, table)))
def test_a_wild_value_at_any_key_is_one_line_or_right(table):
    for place in TABLES[table]:
        for value in [*WILD, deep(200), "kd", "all"]:
            outcome(put(place, copy.copy(value)))
            if place[0] == "phases":
                outcome(put(place, copy.copy(value), into="hop"))
            if place[0] in ("data", "evaluation", "run", "seed"):
                outcome({place[0]: put(place, value)[place[0]]}, kind=EvaluateConfig)


def test_every_number_is_finite_and_has_bounds():
    assert len(NUMBERS) > 100
    for place in NUMBERS:
        key = ".".join(str(part) for part in place if part not in OBJECTIVES).replace("phases.", "phases.0.")
        for value in (math.nan, math.inf, -math.inf, 1e308, -1e308, 2**63, -(2**63) - 1, True, False):
            line = outcome(put(place, value))
            assert isinstance(line, str) and key in line, f"{key} = {value} is accepted or not named: {line}"


TEXT = st.text(st.characters(), max_size=12)  # halves of surrogate pairs too
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.floats(1e-4, 2) | st.integers(0, 40) | TEXT
    | st.sampled_from(LITERALS) | st.sampled_from(["teacher", "ta", "student", HOP, "all", "demo"]) | st.dates()
)  # fmt: skip
NAMES = TEXT | st.sampled_from([str(part) for place, _ in KEYS for part in place])
VALUE = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3))


@settings(max_examples=6000, deadline=None)
@given(st.data())
def test_any_values_at_any_keys(data):
    place, more = data.draw(st.sampled_from(KEYS)), data.draw(st.lists(st.sampled_from(KEYS), max_size=2))
    tree = put(place[0], data.draw(VALUE), data.draw(st.sampled_from(["phases", "hop"])))
    for other, _ in more:
        if other[0] != "phases" and isinstance(tree.get(other[0], {}), dict):
            tree[other[0]] = put(other, data.draw(VALUE))[other[0]]
    outcome(tree)


@settings(max_examples=6000, deadline=None)
@given(
    st.sampled_from([".".join(map(str, place)) for place, _ in KEYS]) | TEXT,
    st.sampled_from(["=", "", " = ", "=="]),
    TEXT | VALUE.map(repr) | st.sampled_from(["[" * 1000, "{a=" * 1000, "9" * 5000, "0x" + "f" * 5000, "1\nname = 2"]),
)
def test_any_text_as_an_override(key, sign, value):
    outcome(base("kd"), (key + sign + value,))


@settings(max_examples=6000, deadline=None)
@given(st.sampled_from([".".join(map(str, place)) for place, _ in KEYS]), st.lists(VALUE, min_size=1, max_size=3))
def test_any_values_in_a_grid(key, values):
    outcome({**base("kd"), "grid": {key.replace("phases.", "phases.0."): values}})
