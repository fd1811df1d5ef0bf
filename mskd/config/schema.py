"""The configuration of a run: frozen pydantic models read from TOML, checked once, saved with the run.

    config = load("demo")                                   # a recipe by name, or a path to a TOML file
    config = load("run.toml", overrides=["phases.minillm.lr=1e-5"])

A key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mskd.config.phases import MOST, PRESETS, Count, Frozen, Phase, Real, Temperature, Tokens, TopP, Whole
from mskd.config.problems import ConfigError, describe, listed, local_path, nearest, read_toml, shown
from mskd.config.toml import override, plain, put

RECIPES = Path(__file__).parent / "recipes"
MAX_ASSISTANTS = 10  # of paths = "all"
MAX_NAME = 200  # characters of a run's name, which is its folder's
MAX_MODEL_NAME = 100  # of a model's: a hop's folder has the names of two


def _name(most: int) -> AfterValidator:
    def check(given: str) -> str:
        if re.fullmatch(rf"[A-Za-z0-9._-]{{1,{most}}}", given) and given.strip("."):
            return given
        raise PydanticCustomError("name", f"a name has 1 to {most} letters, digits, '.', '_' and '-', not dots alone")

    return AfterValidator(check)


Name = Annotated[str, _name(MAX_NAME)]
ModelName = Annotated[str, _name(MAX_MODEL_NAME)]
Source = Annotated[str, Field(min_length=1)]  # a file, a folder or a hub id
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
MiB = Annotated[Whole, Field(ge=0, le=2**24)]

Precision = Literal["int8", "llm_int8", "fp16", "bf16", "fp32"]
Batching = Literal["bucket", "pack"]


# -- models, data, evaluation ---------------------------------------------------------------------


class ModelConfig(Frozen):
    """One named model: `source` (hub id, folder, GGUF file, known name), or `from` another one with fewer `layers`."""

    source: Source | None = Field(None, description="hub id, folder, GGUF file or known name")
    from_: str | None = Field(None, alias="from", description="the named model that this one is cut from")
    layers: Annotated[Whole, Field(ge=1, le=10_000)] | None = Field(
        None, description="transformer layers kept, those of greatest block influence"
    )
    precision: Precision = Field("int8", description="of the weights while this model is a frozen teacher")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(
        False, exclude=True, description="old files name it; only false, since nothing runs a folder's code"
    )
    prepare: tuple[Phase, ...] = Field((), description="phases that this model goes through once, before any hop")

    @field_validator("trust_remote_code")
    @classmethod
    def _no_code(cls, given: bool) -> bool:
        if given:
            raise ValueError("mskd runs no code of a model's folder, only transformers' own classes; take the line out")
        return given

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
        if isinstance(given, ValueError):
            raise given
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
            raise ValueError(f"chain.{key} is {name!r}, which is no model{nearest(str(name), names)}")
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


def _test_items(given: Any) -> str | int | None:
    """A union would answer with one problem for each of its types."""
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MOST:
        return given
    if given is None or (isinstance(given, str) and given):
        return given
    raise PydanticCustomError("items", f"give a number of rows from 0 to {MOST}, a file or a hub id")


TestItems = Annotated[str | int | None, PlainValidator(_test_items)]

# What a chat template is given by its renderer.
TEMPLATE_ARGUMENTS = ("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
                      "continue_final_message", "return_assistant_tokens_mask")  # fmt: skip


class DataConfig(Frozen):
    """Instruction data. Columns left out are found by their usual names."""

    source: Source = Field("demo", description="demo, a hub id, or a .json .jsonl .csv .parquet file")
    split: str = Field("train", description="of a data set on the hub")
    seed: Seed | None = Field(None, description="of the draw of test and validation items; default: the run's")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    instruction: str | None = Field(None, description="column of the question; default: found by its usual names")
    context: str | None = Field(None, description="column of text that goes with the question")
    response: str | None = Field(None, description="column of the answer, or of several")
    messages: str | None = Field(None, description="column of whole conversations")
    template: Literal["alpaca", "chat"] = Field(
        "alpaca", description="how a prompt is written; chat: the tokenizer's own"
    )
    template_kwargs: dict[str, Any] = Field(
        {}, description="variables that a chat template asks for, e.g. { enable_thinking = false }"
    )
    date: str | None = Field(
        None,
        description="what a template's strftime_now tells, YYYY-MM-DD; default: the day of the run's first start",
    )
    turns: Literal["last", "all"] = Field("last", description="assistant turns of a conversation that are trained on")
    test: TestItems = Field(
        None, description="items held out for the test, or a file or hub id of their own; default: a tenth, at most 500"
    )
    validation: Whole = Field(0, ge=0, le=MOST, description="items held out for keep = 'best'")
    limit: Count | None = Field(None, description="rows used at most, counted before the split")
    max_prompt_tokens: Tokens = Field(256, description="rows with a longer prompt are dropped")
    max_tokens: Tokens = Field(512, ge=2, description="prompt and response are cut here")
    text: str | None = Field(
        None, description="plain-text file for lm_weight: one document a line, or .jsonl with `text`; '': none"
    )

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, given: Any) -> Any:
        if given is None:
            return None
        try:
            return f"{date.fromisoformat(str(given))}"  # TOML has dates of its own
        except ValueError:
            raise ValueError(f"{given!r} is no day; write it like 2026-11-25") from None

    @field_validator("template_kwargs")
    @classmethod
    def _of_the_template(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in TEMPLATE_ARGUMENTS:
                raise ValueError(f"{name!r} is not set here; the data and the run give it to the template")
        try:
            json.dumps(given, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise ValueError(f"a template takes text, numbers, true and false, lists and tables only: {e}") from None
        return given

    @model_validator(mode="after")
    def _chat_only(self) -> DataConfig:
        for key, default in (("turns", "last"), ("template_kwargs", {})):
            if self.template != "chat" and getattr(self, key) != default:
                raise ValueError(f"{key} is for conversations; set template = 'chat' too")
        return self


EVAL_PRESETS: dict[str, dict[str, Any]] = {
    "released": dict(seeds=(10, 20, 30, 40, 50), max_new_tokens=256, sample=True, no_repeat_ngram_size=6),
    "quick": dict(seeds=(10,), max_new_tokens=48, sample=True, no_repeat_ngram_size=0),
    "greedy": dict(seeds=(10,), max_new_tokens=256, sample=False, no_repeat_ngram_size=0),
}


class EvalConfig(Frozen):
    """How models are evaluated; a protocol is a set of values, each of which may be changed."""

    protocol: Literal["released", "quick", "greedy"] = Field("quick", description="sets the values in the table below")
    seeds: tuple[Annotated[Whole, Field(ge=-(2**63), lt=2**63)], ...] = Field(
        min_length=1, description="an answer to each item is sampled with each"
    )
    max_new_tokens: Tokens = Field(description="of an answer")
    sample: bool = Field(description="sample the answers, or take the most likely token each time")
    temperature: Temperature = Field(1.0, description="of the sampling")
    top_p: TopP = Field(1.0, description="sample from the likeliest tokens that have this probability together")
    no_repeat_ngram_size: Whole = Field(ge=0, le=MOST, description="no so many tokens twice in an answer; 0: off")
    batch_size: Count = Field(16, description="items answered together")
    limit: Count | None = Field(None, description="test items used at most")
    data: tuple[Source, ...] = Field((), description="further data sets, files or hub ids, for every finished model")

    @model_validator(mode="before")
    @classmethod
    def _apply_protocol(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {**EVAL_PRESETS.get(str(given.get("protocol", "quick")), {}), **given}
        return given


class TrainConfig(Frozen):
    """How students are trained; part of a node's hash."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the arithmetic, not the weights")
    batching: Batching = Field(
        "bucket", description="how padding stays under 5 %: sequences of like length in a forward, or several in a row"
    )
    gradient_checkpointing: bool = Field(False, description="make activations again in the backward pass")
    save_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of a finished student's weights on disk; default: that of the checkpoint it began as"
    )
    loss_chunk_mb: MiB = Field(256, ge=1, description="memory budget of the fused loss's logits, in MiB")


class RunConfig(Frozen):
    """Where and how to run; never part of a node's hash."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    backend: Literal["auto", "triton", "torch"] = Field("auto", description="of the fused losses")
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = Field(
        "auto", description="transformers' attention implementation"
    )
    teacher_cache_mb: MiB = Field(
        2048, description="MiB of GPU memory for the teacher's hidden states of a round; more go to pinned memory"
    )
    teacher_offload: bool = Field(False, description="the teacher waits in host memory while a GPU does not need it")
    save_every_s: Real = Field(120.0, ge=0, le=MOST, description="seconds between resumable states")
    log_every: Count = Field(1, description="steps between lines of metrics.jsonl")
    trackers: tuple[str, ...] = Field((), description="accelerate's trackers by name: tensorboard, wandb, trackio, ...")


class Config(Frozen):
    name: Name = Field("run", description="of the run's folder; default: the file's name")
    seed: Seed = Field(0, description="every random stream derives from it")
    seeds: tuple[Seed, ...] = Field((), description="a sweep: all is done once for each; `seed` draws the test items")
    models: dict[ModelName, ModelConfig] = Field(min_length=1, description="every model by its name")
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
            try:
                paths: Any = all_paths(chain, models)
            except ValueError as e:
                paths = e  # `chain` raises it, beside what else is wrong
            return {**given, "chain": {"paths": paths, **other}}
        return given

    @model_validator(mode="after")
    def _names_resolve(self) -> Config:
        if found := [*self._path_problems(), *self._origin_problems()]:
            raise ValueError(listed(found))
        if found := [*self._hop_problems()]:
            raise ValueError(listed(found))
        every = [p for a, b in self._hops() for p in self.hop_phases(a, b)]
        every += [p for model in self.models.values() for p in model.prepare]
        if any(p.eval_every for p in every) and not self.data.validation:
            raise ValueError("eval_every needs validation items; set data.validation to their number")
        return self

    def _hops(self) -> set[tuple[str, str]]:
        return {pair for path in self.chain.paths for pair in zip(path, path[1:], strict=False)}

    def _path_problems(self) -> Iterator[str]:
        for path in self.chain.paths:
            text = shown(" > ".join(path))
            if len(path) < 2:
                yield f"the path {text} needs at least a teacher and a student"
            for name in path:
                if name not in self.models:
                    yield f"the path {text} names {shown(name)}, which is no model{nearest(name, self.models)}"
            if len(set(path)) != len(path):
                yield f"the path {text} names a model twice"

    def _origin_problems(self) -> Iterator[str]:
        for name, model in self.models.items():
            seen = [name]
            while (above := model.from_) is not None:
                if above not in self.models:
                    hint = nearest(above, self.models)
                    yield f"model {shown(seen[-1])} is cut from {shown(above)}, which is no model{hint}"
                    break
                if above in seen:
                    yield f"model {shown(name)} is cut from itself: {' from '.join([*seen, above])}"
                    break
                seen.append(above)
                model = self.models[above]

    def _hop_problems(self) -> Iterator[str]:
        names = [f"{a}>{b}" for a, b in sorted(self._hops())]
        for key in self.hop:
            if key not in names:
                yield f"hop.{shown(key)} overrides a hop that is on no path{nearest(key, names)}"
                continue
            try:
                self.hop_phases(*key.split(">"))
            except ValueError as e:
                yield str(e)

    @model_validator(mode="after")
    def _sweep_resolves(self) -> Config:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different numbers, not {shown(list(self.seeds))}")
        for key, values in self.grid.items():
            top = key.strip().split(".")[0]
            name = f"grid.{shown(key)}"
            if top in ("name", "seed", "seeds", "grid", "run"):
                raise ValueError(f"{name} cannot be varied; a seed goes into seeds, a runtime setting into [run]")
            if not values:
                raise ValueError(f"{name} is empty; give at least one value, or take the key out")
            if len({repr(v) for v in values}) != len(values):
                raise ValueError(f"{name} names a value twice: {shown(list(values))}")
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
            put(tree, key, values[key], f"key {key!r}")
        changed: Config = parse(tree, where="with " + ", ".join(f"{k} = {shown(v)}" for k, v in values.items()))
        return changed

    def hop_phases(self, teacher: str, student: str) -> tuple[Phase, ...]:
        """The phases of one hop: the common ones, `[hop."teacher>student"]` applied to each that has the key."""
        hop = f"{teacher}>{student}"
        overrides = dict(self.hop.get(hop, {}))
        phases = _phases(overrides.pop("phases", [p.model_dump() for p in self.phases]), hop)
        for key in overrides:
            if not any(key in type(p).model_fields for p in phases):
                fields = {f for p in phases for f in type(p).model_fields}
                raise ValueError(f"hop.{hop!r} has an unknown key {shown(key)}{nearest(key, fields)}")
        own = [{k: v for k, v in overrides.items() if k in type(p).model_fields} for p in phases]
        # Checked again without overrides too: that makes a default 10 the 10.0 which nodes' hashes have always covered.
        return _phases([p.model_dump() | o for p, o in zip(phases, own, strict=True)], hop)


class EvaluateConfig(Frozen):
    """What `mskd evaluate` takes besides the model."""

    seed: Seed = 0
    precision: Precision = Field("int8", description="of the teacher's weights")
    data: DataConfig = DataConfig()
    evaluation: EvalConfig = EvalConfig.model_validate({})
    run: RunConfig = RunConfig()


class DataSettings(Frozen):
    """What `mskd data` takes besides the model."""

    seed: int = Field(0, ge=0, description="the run's, which draws the test and validation items")
    data: DataConfig = DataConfig()


class _Phases(Frozen):
    phases: tuple[Phase, ...] = Field(min_length=1)


def _phases(given: Any, hop: str) -> tuple[Phase, ...]:
    """Phases from plain values. Raises ValueError that names the hop."""
    try:
        return _Phases.model_validate({"phases": given}).phases
    except ValidationError as e:
        raise ValueError(f"hop.{hop!r}: {describe(e, _Phases)}") from None


# -- reading --------------------------------------------------------------------------------------


def recipes() -> list[str]:
    """Names of the recipes that come with mskd."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe by name or a TOML file, apply `key=value` overrides, check.

    Raises ConfigError with one line that says what is wrong and what is allowed.
    """
    known = recipes()
    path = RECIPES / f"{source}.toml" if str(source) in known else local_path(source, "the configuration")
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "is no file to read" if path.exists() else ""
        raise ConfigError(
            f"{shown(str(source))} {why}; give a recipe or a TOML file; recipes: {', '.join(known)}"
            if why
            else f"no recipe or file {shown(str(source))}{nearest(str(source), known)}; recipes: {', '.join(known)}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is no valid TOML: it is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None
    tree = read_toml(text, str(path))
    tree.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:MAX_NAME])
    return parse(tree, overrides, where=path.name)


def parse(
    tree: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "configuration", kind: type[Any] = Config
) -> Any:
    """A checked Config (or another `kind`) from plain values and `key=value` overrides. Raises ConfigError.

    The message names `where` and lists all that is wrong, keys that do not exist first.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: {shown(tree)} is no table of keys and values")
    merged = plain(tree, where)
    for item in overrides:
        override(merged, item)
    try:
        return kind.model_validate(plain(merged, where))
    except ValidationError as e:
        raise ConfigError(f"{where}: {describe(e, kind)}") from None


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
