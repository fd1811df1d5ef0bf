"""Proposes chains from a teacher to a student, with what each costs, before anything is trained or fetched.

    question = from_sizes("openai-community/gpt2-xl", target="124M")
    config = parse(question.tree("data.jsonl"))          # to_toml(config): what `mskd distill` takes
    print("\\n".join(proposals_table(question.proposals(), question.models, config)))

Rules: the geometric midpoint of the two sizes (the seed paper's first guess); the law of the capacity gap, each hop
about 2.5 times (ACL 2025); the direct hop, to compare with. `--measure` (trials.py) chooses by trial hops instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mskd.config import Config, ConfigError
from mskd.config.problems import shown
from mskd.plan import sizes
from mskd.plan.budget import shapes_of, source_shape
from mskd.plan.sizes import Shape, short

GAP = 2.5  # of the law of the capacity gap: a teacher's size over its student's
MOST = 1e15  # parameters
UNITS = {"": 1.0, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Proposal:
    """One chain: the rules that propose it, its models by name from teacher to student, and the sizes asked for."""

    rules: tuple[str, ...]
    path: tuple[str, ...]
    wanted: tuple[float, ...]


@dataclass(frozen=True)
class Question:
    """What a chain is sought for: `models` by name from the teacher, through all that could assist, to the student."""

    models: dict[str, Shape]
    layers: bool  # whether all are cut from the teacher

    def proposals(self) -> list[Proposal]:
        """The rules' chains, those that agree taken together; the direct hop comes last."""
        (top, teacher), *_, (end, student) = self.models.items()
        found: dict[tuple[str, ...], Proposal] = {}
        rules = {
            "midpoint": [midpoint(teacher.parameters, student.parameters)],
            "law": law(teacher.parameters, student.parameters),
            "direct": [],
        }
        for rule, wanted in rules.items():
            path = (top, *self._assistants(wanted), end)
            before = found.get(path)
            given = before.rules if before else ()
            found[path] = Proposal((*given, rule), path, before.wanted if before else tuple(wanted))
        return list(found.values())

    def _assistants(self, wanted: Sequence[float]) -> list[str]:
        """The models nearest to the sizes asked for, big to small, none twice, none of the two ends."""
        between = list(self.models)[1:-1]
        chosen = [
            min(between, key=lambda name: abs(math.log(self.models[name].parameters / size)))
            for size in wanted
            if between
        ]
        return sorted(set(chosen), key=between.index)

    def tree(self, data: str) -> dict[str, Any]:
        """The chains of all proposals as plain values of a configuration, with the phases of `mskd distill`'s flags."""
        proposals = self.proposals()
        used = {name for p in proposals for name in p.path}
        top = next(iter(self.models))
        models: dict[str, Any] = {}
        for name, shape in self.models.items():
            if name in used:
                cut = self.layers and name != top
                models[name] = {"from": top, "layers": shape.layers} if cut else {"source": shape.hub}
        phases: list[dict[str, Any]] = [{"objective": "minillm"}]
        if self.layers:
            phases.insert(0, {"objective": "kd", "epochs": 3, "lr": 3e-4, "warmup_steps": 10, "schedule": "cosine"})
        return {
            "name": "plan",
            "models": models,
            "chain": {"paths": [list(p.path) for p in proposals]},
            "data": {"source": data},
            "phases": phases,
        }


def midpoint(teacher: float, student: float) -> float:
    """The geometric midpoint of two sizes: sqrt(teacher x student)."""
    return math.sqrt(teacher * student)


def law(teacher: float, student: float) -> list[float]:
    """Sizes of assistants, each GAP times smaller than the one above, while the rest of the way is more than GAP."""
    found = []
    while teacher / student > GAP:
        teacher /= GAP
        if teacher <= student:
            break
        found.append(teacher)
    return found


# -- questions ------------------------------------------------------------------------------------


def from_flags(
    teacher: str | None, target: str | None, family: str | None, layers: int | None, remove: int | None
) -> Question:
    """From the flags of `mskd plan`: --teacher and one of --target, --layers, --remove. Raises ConfigError."""
    ends = [value for value in (target, layers, remove) if value is not None]
    if teacher is None or len(ends) != 1:
        raise ConfigError("give a recipe or file, or --teacher and one of --target, --layers and --remove")
    if target is not None:
        return from_sizes(teacher, target, family)
    if family is not None:
        raise ConfigError("--family goes with --target; with --layers and --remove all models are cut from the teacher")
    return from_layers(teacher, layers if layers is not None else _teacher(teacher).layers - int(remove or 0))


def from_sizes(teacher: str, target: str, family: str | None = None) -> Question:
    """From a teacher and a target size ("124M", or a hub id) over the sizes of a family, by default the teacher's.

    Raises ConfigError: an unknown family or size, a target that is not smaller.
    """
    top = _teacher(teacher)
    names = sizes.family(family if family is not None else sizes.family_of(top))
    if family is not None and top.hub not in {s.hub for s in names}:
        allowed = ", ".join(s.hub for s in names)
        raise ConfigError(f"teacher {teacher!r} is not of family {family!r}; that has: {allowed}")
    size = _target(target)
    student = sizes.nearest(names, size)
    smaller = [s for s in names if s.parameters < top.parameters]
    if student.parameters >= top.parameters:
        allowed = ", ".join(f"{short(s.parameters)} ({s.hub})" for s in smaller) or "none: it is the smallest one"
        raise ConfigError(
            f"target {target} is not smaller than the teacher, {short(top.parameters)}; allowed: {allowed}"
        )
    inner = [s for s in reversed(smaller) if s.parameters > student.parameters]
    if not inner:
        raise ConfigError(
            f"there is no size between {top.hub} ({short(top.parameters)}) and {student.hub} "
            f"({short(student.parameters)}) for an assistant; distil directly, give a smaller target, or --layers"
        )
    models = {"teacher": top, **{s.hub.split("/")[-1]: s for s in inner}, "student": student}
    return Question(models, layers=False)


def from_layers(teacher: str, keep: int) -> Question:
    """From a teacher and the number of layers that its student keeps: every number between may assist.

    Raises ConfigError: a teacher whose size is not known, a number of layers that is not between.
    """
    top = _teacher(teacher)
    if not 1 <= keep < top.layers:
        raise ConfigError(f"a student of {keep} layers cannot be cut from {teacher}; allowed: 1 to {top.layers - 1}")
    if keep == top.layers - 1:
        raise ConfigError(
            f"there is no room for an assistant between {top.layers} and {keep} layers; distil directly, or keep fewer"
        )
    inner = {f"ta{n}": top.cut_to(n) for n in range(top.layers - 1, keep, -1)}
    return Question({"teacher": replace(top, hub=teacher), **inner, "student": top.cut_to(keep)}, layers=True)


def _teacher(teacher: str) -> Shape:
    shape = source_shape(teacher)
    if shape is None:
        raise ConfigError(f"the size of {teacher!r} is not known; give a model folder or one of: {_hubs()}")
    return shape


def from_config(config: Config) -> Question:
    """From a configuration: its first teacher, its smallest student, and the models on its paths of sizes between.

    Raises ConfigError where the size of one of them is not known without fetching it.
    """
    shapes = shapes_of(config)
    for name in dict.fromkeys(name for path in config.chain.paths for name in path):
        if name not in shapes:
            raise ConfigError(f"the size of model {name!r} ({config.models[name].source}) is not known; fetch it first")
    size = {name: shapes[name].parameters for path in config.chain.paths for name in path}
    top = config.chain.paths[0][0]
    end = min((path[-1] for path in config.chain.paths), key=lambda name: size[name])
    inner = sorted((n for n in size if size[end] < size[n] < size[top]), key=lambda n: -size[n])
    if not inner:
        raise ConfigError(f"{config.name} has no model between {top!r} and {end!r} in size; put assistants on a path")
    return Question({name: shapes[name] for name in (top, *inner, end)}, layers=False)


def with_paths(config: Config, paths: Sequence[Sequence[str]]) -> Config:
    """The configuration with other paths over its models; overrides of hops that are on none of them go."""
    pairs = {f"{a}>{b}" for path in paths for a, b in zip(path, path[1:], strict=False)}
    hop = {key: value for key, value in config.hop.items() if key in pairs}
    chain = type(config.chain)(paths=tuple(tuple(path) for path in paths))
    return config.model_copy(update={"chain": chain, "hop": hop})


def _hubs() -> str:
    return ", ".join(s.hub for names in sizes.FAMILIES.values() for s in names)


def _target(given: str) -> float:
    """Parameters from "124M", "1.5B", a plain number or a known model."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB]?)", given.strip(), re.IGNORECASE)
    if match and 1 <= (size := float(match[1]) * UNITS[match[2].upper()]) <= MOST:
        return size
    shape = sizes.shape_of(given)
    if shape is None:
        raise ConfigError(f"target {shown(given)} is no size; give a number like 124M or 1.5B, or one of: {_hubs()}")
    return shape.parameters
