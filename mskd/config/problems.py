"""What is wrong with something the user gave, in one line: what was given, what is allowed, what to do.

raise ConfigError(f"seed is {shown(seed)}; allowed: 0 or more{nearest(key, known)}")
path = local_path("~/rows.jsonl", "data.source")      # ConfigError where the system cannot take it as a path
tree = read_toml(text, "run.toml")                    # ConfigError where it is none
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

MOST_SHOWN = 30  # problems of one configuration; a list of a thousand wrong entries is one slip
WIDTH = 100  # characters of a value that are shown


class ConfigError(ValueError):
    """Something the user gave cannot work. The message is one line: what was given, what is allowed, what to do."""


def shown(value: Any) -> str:
    """A value as Python writes it, cut in the middle where it is long; true and false as TOML has them."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list that holds itself
        text = f"<{type(value).__name__}>"
    half = WIDTH // 2 - 2
    return text if len(text) <= WIDTH else f"{text[:half]}...{text[-half:]}"


def nearest(given: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" with the known name that is most alike, or nothing where none is."""
    match = difflib.get_close_matches(given[:WIDTH], list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def local_path(given: str | Path, key: str) -> Path:
    """A path that the user gave, `~` expanded: one that the system can look for, whether or not something is there.

    Raises ConfigError for one that it cannot (too long, a NUL, an unknown user's home, no permission, a loop of links),
    for an empty one, and for a file's name that ends with a slash, as only a folder's may.
    """
    if not str(given):
        raise ConfigError(f"{key} is empty; give a path, '.' for this folder")
    try:
        path = Path(given).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e).rstrip(".")
        raise ConfigError(f"{key} {shown(str(given))} is no path that can be used here: {why}; give another") from None
    if str(given).endswith(os.sep) and not path.is_dir():
        raise ConfigError(f"{key} {shown(str(given))} ends with {os.sep!r}, but is a file; leave that out")
    return path


def read_toml(text: str, name: str) -> dict[str, Any]:
    """The tree of a TOML document. Raises ConfigError where it is none, with the line."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{name} is no valid TOML: it is nested too deep") from None
    except ValueError as e:  # tomllib's own, and Python's for an integer of thousands of digits
        raise ConfigError(f"{name} is no valid TOML: {e}") from None


# -- pydantic's errors ----------------------------------------------------------------------------


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """All problems of a pydantic error in one line, numbered where there are several.

    Keys that do not exist come first: they are the likeliest cause of the others. Keys that are missing come last, in
    one problem.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    unknown, wrong, missing = [], [], []
    for problem in problems:
        loc = problem["loc"][:-1] if problem["loc"][-1:] == ("[key]",) else problem["loc"]  # of a table's own name
        model, found, key = _place(loc, root)
        if problem["type"] == "extra_forbidden":
            unknown.append(f"unknown key {shown(key)}{_hint(str(loc[-1]), model, root, str(loc[0]))}")
        elif problem["type"] == "missing":
            missing.append(repr(key))
        elif problem["type"] != "too_short" or not any(p["loc"][: len(loc)] == loc != p["loc"] for p in problems):
            wrong.append(
                _wrong(problem, key, _tags(found))
            )  # a list is too short where what is wrong with its entries is said
    if missing:
        *others, last = missing
        missing = [f"{', '.join(others)} and {last} are missing" if others else f"{last} is missing"]
    return listed([*unknown, *wrong, *missing])


def listed(problems: Sequence[str]) -> str:
    """Problems in one line: the only one as it is, several of them numbered."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"({i}) {problem}" for i, problem in enumerate(problems[:MOST_SHOWN], 1)]
    more = len(problems) - MOST_SHOWN
    return " ".join([f"{len(problems)} problems:", *lines, *([f"and {more} more like these"] if more > 0 else [])])


def _hint(name: str, model: type[BaseModel], root: type[BaseModel], table: str) -> str:
    """What to do about a key that a model has not: the table where it belongs, or the nearest one, or all there are."""
    homes = []
    for other, field in root.model_fields.items():
        if other != table and any(name in _keys(m) for m in _below(field.annotation)):
            homes.append(f"[[{other}]]" if other == "phases" else f"[{other}]")
    if homes and not _tags(model):  # what one objective has not, another has
        return f"; it is a key of {' and '.join(homes)}"
    return nearest(name, _keys(model)) or f"; allowed: {', '.join(sorted(_keys(model)))}"


def _wrong(problem: Mapping[str, Any], key: str, tags: Sequence[str]) -> str:
    """A value that is not allowed. tags: of the models that there are to choose from."""
    kind, given, message = problem["type"], problem["input"], problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind == "union_tag_not_found":
        return f"{key} needs an objective; allowed: {', '.join(tags)}"
    if kind == "union_tag_invalid":
        tag = given.get("objective") if isinstance(given, Mapping) else given
        return f"{key}.objective is {shown(tag)}; allowed: {', '.join(tags)}{nearest(str(tag), tags)}"
    if kind == "int_parsing_size":
        message = "a whole number here has at most 64 bits"
    message = (message[0].lower() + message[1:]).replace("valid tuple", "list").replace("tuple", "list")
    return f"{key or 'it'} is {shown(given)}: {message.removesuffix(' after validation, not 0')}"


def _place(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[type[BaseModel], Any, str]:
    """The innermost model around the end of a pydantic location, the type there, and the place as the user writes it.

    Where pydantic chose one of several models it names the choice, which is no key of the user's.
    """
    at: Any = root
    model, parts = root, []
    for part in loc:
        choice = _models(at)
        if len(choice) > 1:
            at = next((m for m in choice if part in _tags(m)), None)
            continue
        parts.append(str(part) if re.fullmatch(r"[\w.>-]{1,80}", str(part)) else shown(str(part)))
        if choice:
            model = choice[0]
            at = next((f.annotation for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        else:  # an entry of a list or of a table: what all entries are
            at = get_args(at)[1 if get_origin(at) is dict else 0] if get_args(at) else None
    return model, at, ".".join(parts)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may be."""
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [model for option in get_args(annotation) for model in _models(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _below(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type, or an entry of it, may be."""
    return _models(annotation) or [model for part in get_args(annotation) for model in _below(part)]


def _keys(model: type[BaseModel]) -> list[str]:
    return [f.alias or name for name, f in model.model_fields.items()]


def _tags(annotation: Any) -> list[str]:
    """The objectives that choose between the models of a type."""
    return [
        tag for m in _models(annotation) if (f := m.model_fields.get("objective")) for tag in get_args(f.annotation)
    ]
