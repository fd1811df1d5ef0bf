"""The configuration of a run: frozen pydantic models read from TOML, checked once, saved with the run.

    config = load("demo")                                   # a recipe by name, or a path to a TOML file
    config = load("run.toml", overrides=["phases.minillm.lr=1e-5"])

A key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mskd.config.phases import OBJECTIVES, PRESETS, Frozen, Phase

RECIPES = Path(__file__).parent / "recipes"
MAX_ASSISTANTS = 10  # of paths = "all"

Precision = Literal["int8", "llm_int8", "fp16", "bf16", "fp32"]
Batching = Literal["bucket", "pack"]


class ConfigError(ValueError):
    """Something the user gave cannot work. The message is one line: what was given, what is allowed, what to do."""


# -- models, data, evaluation ---------------------------------------------------------------------


class ModelConfig(Frozen):
    """One named model: `source` (hub id, folder, GGUF file, known name), or `from` another one with fewer `layers`."""

    source: str | None = None
    from_: str | None = Field(None, alias="from")
    layers: int | None = Field(None, ge=1, description="transformer layers kept, those of greatest block influence")
    precision: Precision = Field("int8", description="of the weights while this model is a frozen teacher")
    revision: str | None = None
    trust_remote_code: bool = False
    prepare: tuple[Phase, ...] = Field((), description="phases that this model goes through once, before any hop")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.source is None) == (self.from_ is None):
            raise ValueError("a model needs either source or from, not both and not neither")
        if self.from_ is not None and self.layers is None:
            raise ValueError("a model with from needs layers, the number of layers to keep")
        for phase in self.prepare:
            if phase.objective != "sft":
                raise ValueError(f"prepare takes phases without a teacher (sft), not {phase.objective}")
        return self


class ChainConfig(Frozen):
    """The paths, each from teacher to student: a list, or "all" for every path over the models from `teacher` to
    `student` in [models], by default the first and the last one named there; name them from big to small."""

    paths: tuple[tuple[str, ...], ...] = Field(min_length=1, description="a list of paths, or 'all'")
    teacher: str | None = Field(None, description="with paths = 'all': where every path begins")
    student: str | None = Field(None, description="with paths = 'all': where every path ends")

    @field_validator("paths", mode="before")
    @classmethod
    def _all_or_a_list(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise ValueError(f"{given!r} is no list of paths; give 'all' or a list like [['teacher', 'student']]")
        return given

    @model_validator(mode="after")
    def _ends_of_all(self) -> ChainConfig:
        if self.teacher is not None or self.student is not None:
            raise ValueError("teacher and student go with paths = 'all'; a list of paths names its own")
        return self


def all_paths(chain: Mapping[str, Any], models: Iterable[str]) -> list[list[str]]:
    """Every path over the models named from the teacher to the student, 2^n for n assistants; short ones come first.

    Raises ValueError where the ends are no such models, or where there are no assistants or too many.
    """
    names = list(models)
    teacher, student = chain.get("teacher", names[0]), chain.get("student", names[-1])
    for key, name in (("teacher", teacher), ("student", student)):
        if name not in names:
            raise ValueError(f"chain.{key} is {name!r}, which is no model{_nearest(str(name), names)}")
    first, last = names.index(teacher), names.index(student)
    if first >= last:
        raise ValueError(f"[models] must name the teacher {teacher!r} before the student {student!r}, not after")
    between = names[first + 1 : last]
    if not 1 <= len(between) <= MAX_ASSISTANTS:
        raise ValueError(
            f"paths = 'all' needs 1 to {MAX_ASSISTANTS} assistants named between {teacher!r} and {student!r} in "
            f"[models], not {len(between)}; n of them make 2^n paths"
        )
    chosen = [c for n in range(len(between) + 1) for c in itertools.combinations(between, n)]
    return [[teacher, *c, student] for c in chosen]


class DataConfig(Frozen):
    """Instruction data. Columns left out are found by their usual names."""

    source: str = Field("demo", description="demo, a hub id, or a .json .jsonl .csv .parquet file")
    split: str = "train"
    seed: int | None = Field(None, ge=0, description="of the draw of test and validation items; default: the run's")
    revision: str | None = None
    instruction: str | None = None
    context: str | None = None
    response: str | None = None
    messages: str | None = None
    template: Literal["alpaca", "chat"] = "alpaca"
    test: str | int | None = Field(
        None, description="items held out for the test, or a file or hub id of their own; default: a tenth, at most 500"
    )
    validation: int = Field(0, ge=0, description="items held out for keep = 'best'")
    limit: int | None = Field(None, ge=1, description="rows used at most, counted before the split")
    max_prompt_tokens: int = Field(256, ge=1, description="rows with a longer prompt are dropped")
    max_tokens: int = Field(512, ge=2, description="prompt and response are cut here")
    text: str | None = Field(
        None, description="plain-text file for lm_weight: one document a line, or .jsonl with `text`"
    )


EVAL_PRESETS: dict[str, dict[str, Any]] = {
    "released": dict(seeds=(10, 20, 30, 40, 50), max_new_tokens=256, sample=True, no_repeat_ngram_size=6),
    "quick": dict(seeds=(10,), max_new_tokens=48, sample=True, no_repeat_ngram_size=0),
    "greedy": dict(seeds=(10,), max_new_tokens=256, sample=False, no_repeat_ngram_size=0),
}


class EvalConfig(Frozen):
    """How models are evaluated; a protocol is a set of values, each of which may be changed."""

    protocol: Literal["released", "quick", "greedy"] = "quick"
    seeds: tuple[int, ...] = Field(min_length=1)
    max_new_tokens: int = Field(ge=1)
    sample: bool
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    no_repeat_ngram_size: int = Field(ge=0)
    batch_size: int = Field(16, ge=1)
    limit: int | None = Field(None, ge=1, description="test items used at most")
    data: tuple[str, ...] = Field((), description="further data sets, files or hub ids, for every finished model")

    @model_validator(mode="before")
    @classmethod
    def _apply_protocol(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {**EVAL_PRESETS.get(given.get("protocol", "quick"), {}), **given}
        return given


class TrainConfig(Frozen):
    """How students are trained; part of a node's hash."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the arithmetic, not the weights")
    batching: Batching = Field(
        "bucket", description="how padding stays under 5 %: sequences of like length in a forward, or several in a row"
    )
    gradient_checkpointing: bool = False
    loss_chunk_mb: int = Field(256, ge=1, description="memory budget of the fused loss's logits, in MiB")


class RunConfig(Frozen):
    """Where and how to run; never part of a node's hash."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "triton", "torch"] = Field("auto", description="of the fused losses")
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    teacher_cache_mb: int = Field(
        2048, ge=0, description="MiB of GPU memory for the teacher's hidden states of a round; more go to pinned memory"
    )
    teacher_offload: bool = Field(False, description="the teacher waits in host memory while a GPU does not need it")
    save_every_s: float = Field(120.0, ge=0, description="seconds between resumable states")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    trackers: tuple[str, ...] = Field((), description="accelerate's trackers by name: tensorboard, wandb, trackio, ...")


class Config(Frozen):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
    seeds: tuple[int, ...] = Field((), description="a sweep: all is done once for each; `seed` draws the test items")
    models: dict[str, ModelConfig] = Field(min_length=1)
    chain: ChainConfig
    data: DataConfig = DataConfig()
    phases: tuple[Phase, ...] = Field(min_length=1)
    hop: dict[str, dict[str, Any]] = Field({}, description="overrides for one hop, keyed 'teacher>student'")
    grid: dict[str, tuple[Any, ...]] = Field({}, description="a sweep: values for keys of this file, as --set has them")
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig.model_validate({})
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _all_paths(cls, given: Any) -> Any:
        chain, models = (given.get(k) if isinstance(given, Mapping) else None for k in ("chain", "models"))
        if isinstance(chain, Mapping) and chain.get("paths") == "all" and isinstance(models, Mapping) and models:
            other = {k: v for k, v in chain.items() if k not in ("paths", "teacher", "student")}
            return {**given, "chain": {"paths": all_paths(chain, models), **other}}
        return given

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in models:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise ValueError(f"the model name {name!r} may hold letters, digits, '.', '_' and '-' only")
        return models

    @model_validator(mode="after")
    def _names_resolve(self) -> Config:
        hops = set()
        for path in self.chain.paths:
            shown = " > ".join(path)
            if len(path) < 2:
                raise ValueError(f"the path {shown!r} needs at least a teacher and a student")
            for name in path:
                if name not in self.models:
                    raise ValueError(
                        f"the path {shown!r} names {name!r}, which is no model{_nearest(name, self.models)}"
                    )
            if len(set(path)) != len(path):
                raise ValueError(f"the path {shown!r} names a model twice")
            hops |= set(zip(path, path[1:], strict=False))
        for name, model in self.models.items():
            seen = [name]
            while model.from_ is not None:
                if model.from_ not in self.models:
                    raise ValueError(
                        f"model {name!r} is cut from {model.from_!r}, which is no model"
                        f"{_nearest(model.from_, self.models)}"
                    )
                if model.from_ in seen:
                    raise ValueError(f"model {name!r} is cut from itself: {' from '.join([*seen, model.from_])}")
                seen.append(model.from_)
                model = self.models[model.from_]
        names = {f"{a}>{b}" for a, b in hops}
        for key in self.hop:
            if key not in names:
                raise ValueError(f"hop.{key!r} overrides a hop that is on no path{_nearest(key, names)}")
            a, b = key.split(">")
            self.hop_phases(a, b)  # checks the overrides
        every = [p for a, b in hops for p in self.hop_phases(a, b)]
        every += [p for model in self.models.values() for p in model.prepare]
        if any(p.eval_every for p in every) and not self.data.validation:
            raise ValueError("eval_every needs validation items; set data.validation to their number")
        return self

    @model_validator(mode="after")
    def _sweep_resolves(self) -> Config:
        if len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must be different numbers of at least 0, not {list(self.seeds)}")
        for key, values in self.grid.items():
            top = key.strip().split(".")[0]
            if top in ("name", "seed", "seeds", "grid", "run"):
                raise ValueError(f"grid.{key!r} cannot be varied; a seed goes into seeds, a runtime setting into [run]")
            if not values:
                raise ValueError(f"grid.{key!r} is empty; give at least one value, or take the key out")
            if len({repr(v) for v in values}) != len(values):
                raise ValueError(f"grid.{key!r} names a value twice: {list(values)}")
            for value in values:
                self.with_values({key: value})
        return self

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """This configuration with other values at some keys, written as in `--set`, without seeds and grid.

        A preset's values follow the preset where they were its own. Raises ConfigError.
        """
        tree = _given(self)
        tree.pop("seeds", None)
        tree.pop("grid", None)
        for key in sorted(values, key=lambda key: key.endswith(".objective")):  # others may name a phase by it
            _put(tree, key, values[key], f"key {key!r}")
        shown = ", ".join(f"{k} = {v!r}" for k, v in values.items())
        changed: Config = parse(tree, where=f"with {shown}")
        return changed

    def hop_phases(self, teacher: str, student: str) -> tuple[Phase, ...]:
        """The phases of one hop: the common ones, `[hop."teacher>student"]` applied to each that has the key."""
        overrides = dict(self.hop.get(f"{teacher}>{student}", {}))
        phases = [p.model_dump() for p in self.phases]
        if "phases" in overrides:
            phases = list(overrides.pop("phases"))
        parsed = _Phases.model_validate({"phases": phases}).phases
        for key in overrides:
            if not any(key in type(p).model_fields for p in parsed):
                fields = {f for p in parsed for f in type(p).model_fields}
                raise ValueError(f"hop.'{teacher}>{student}' has an unknown key {key!r}{_nearest(key, fields)}")
        merged = [p.model_dump() | {k: v for k, v in overrides.items() if k in type(p).model_fields} for p in parsed]
        return _Phases.model_validate({"phases": merged}).phases


class EvaluateConfig(Frozen):
    """What `mskd evaluate` takes besides the model."""

    seed: int = Field(0, ge=0)
    precision: Precision = Field("int8", description="of the teacher's weights")
    data: DataConfig = DataConfig()
    evaluation: EvalConfig = EvalConfig.model_validate({})
    run: RunConfig = RunConfig()


class _Phases(Frozen):
    phases: tuple[Phase, ...] = Field(min_length=1)


# -- reading --------------------------------------------------------------------------------------


def recipes() -> list[str]:
    """Names of the recipes that come with mskd."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe by name or a TOML file, apply `key=value` overrides, check.

    Raises ConfigError with one line that says what is wrong and what is allowed.
    """
    path = RECIPES / f"{source}.toml"
    if not path.is_file():
        path = Path(source)
    if not path.is_file():
        known = recipes()
        raise ConfigError(
            f"no recipe or file {str(source)!r}{_nearest(str(source), known)}; recipes: {', '.join(known)}"
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is no valid TOML: {e}") from None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None
    tree.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem))
    return parse(tree, overrides, where=path.name)


def parse(
    tree: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "configuration", kind: type[Any] = Config
) -> Any:
    """A checked Config (or another `kind`) from plain values and `key=value` overrides. Raises ConfigError."""
    merged = _copy(tree)
    for item in overrides:
        _override(merged, item)
    try:
        return kind.model_validate(merged)
    except ValidationError as e:
        raise ConfigError(f"{where}: {_one_line(e)}") from None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(v) for v in value]
    return value


def _given(value: Any) -> Any:
    """The plain values that parse to this configuration, without those that are defaults or a preset's own."""
    if isinstance(value, Mapping):
        return {k: _given(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_given(v) for v in value]
    if not isinstance(value, BaseModel):
        return value
    preset = {**PRESETS, **EVAL_PRESETS}.get(getattr(value, "objective", getattr(value, "protocol", "")), {})
    tree = {}
    for name, field in type(value).model_fields.items():
        own = getattr(value, name)
        if name == "objective" or own != preset.get(name, field.default):
            tree[field.alias or name] = _given(own)
    return tree


def _override(tree: dict[str, Any], item: str) -> None:
    """Apply one `a.b.c=value`; the value is TOML, or a plain string."""
    key, sep, text = item.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set {item!r} must look like key=value, for example --set phases.minillm.lr=1e-5")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    _put(tree, key, value, f"--set {item!r}")


def _put(tree: dict[str, Any], key: str, value: Any, shown: str) -> None:
    """Set the value at a dotted key. An entry of a list is named by number or objective."""
    parts = [a or b for a, b in re.findall(r'"([^"]+)"|([^."]+)', key.strip())]
    node: Any = tree
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            index = _phase_index(node, part, shown)
            if last:
                node[index] = value
            else:
                node = node[index]
        elif not isinstance(node, dict):
            raise ConfigError(f"{shown}: {'.'.join(parts[:i])!r} is a value and has no {part!r}")
        elif last:
            node[part] = value
        else:
            node = node.setdefault(part, {})


def _phase_index(phases: list[Any], part: str, shown: str) -> int:
    names = [p.get("objective") if isinstance(p, dict) else None for p in phases]
    if part.isdigit() and int(part) < len(phases):
        return int(part)
    if names.count(part) == 1:
        return names.index(part)
    allowed = ", ".join([str(i) for i in range(len(phases))] + [n for n in names if n])
    raise ConfigError(f"{shown}: no single entry {part!r} in that list; allowed: {allowed}")


def _nearest(given: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _one_line(error: ValidationError) -> str:
    """The first problem of a pydantic error, as one line with the key, what was given and what is allowed."""
    problem = error.errors(include_url=False)[0]
    loc = [p for p in problem["loc"] if p not in OBJECTIVES]
    key = ".".join(str(p) for p in loc)
    more = "" if error.error_count() == 1 else f" (and {error.error_count() - 1} more)"
    kind = problem["type"]
    if kind == "extra_forbidden":
        fields = _fields_at(list(problem["loc"][:-1]))
        hint = _nearest(str(loc[-1]), fields) or f"; allowed: {', '.join(sorted(fields))}"
        return f"unknown key {key!r}{hint}{more}"
    if kind == "missing":
        return f"{key!r} is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}{more}" if key else f"{message}{more}"
    if kind == "union_tag_invalid":
        given = problem["input"].get("objective") if isinstance(problem["input"], Mapping) else problem["input"]
        return f"{key}.objective is {given!r}; allowed: {', '.join(OBJECTIVES)}{_nearest(str(given), OBJECTIVES)}{more}"
    if kind == "union_tag_not_found":
        return f"{key} needs an objective; allowed: {', '.join(OBJECTIVES)}{more}"
    message = message[0].lower() + message[1:].replace("valid tuple", "list")
    return f"{key} is {problem['input']!r}: {message}{more}"


def _fields_at(loc: list[Any]) -> set[str]:
    """The keys that are valid at a place in the configuration tree."""
    model: type[BaseModel] = Config
    for part in loc:
        if part in OBJECTIVES:
            model = OBJECTIVES[part]
        elif part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return {f.alias or name for name, f in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model that an annotation holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def to_toml(config: Config, header: str = "") -> str:
    """The resolved configuration as TOML that `load` reads back to an equal Config. `header`: comment lines."""
    tree = config.model_dump(by_alias=True, exclude_none=True)
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines += [f"{k} = {_toml(tree.pop(k))}" for k in ("name", "seed", "seeds") if k in tree and tree[k] != ()]
    tree.pop("seeds", None)
    for table in ("grid", "models", "hop"):
        entries = tree.pop(table)
        if entries:
            lines += ["", f"[{table}]"] + [f"{_toml_key(k)} = {_toml(v)}" for k, v in entries.items()]
    phases = tree.pop("phases")
    for table, entries in tree.items():
        lines += ["", f"[{table}]"] + [f"{_toml_key(k)} = {_toml(v)}" for k, v in entries.items()]
    for phase in phases:
        lines += ["", "[[phases]]"] + [f"{k} = {_toml(v)}" for k, v in phase.items()]
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
