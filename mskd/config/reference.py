"""docs/configuration.md: every key of a run's TOML file, read from the schema that checks it.

python -m mskd.config.reference > docs/configuration.md     # tests hold the page and the schema together
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mskd.config.phases import OBJECTIVES, PRESETS, PhaseBase
from mskd.config.schema import (
    EVAL_PRESETS,
    ChainConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from mskd.config.toml import toml_value

INTRODUCTION = """\
# Every key of a run's file

A run is a TOML file; `mskd distill run.toml --set phases.minillm.lr=1e-5` changes one key of it. A key that does not
exist is an error that names the nearest one that does. The run's folder keeps all of them, resolved, in `config.toml`.

This page is made from the schema that checks the file: `python -m mskd.config.reference > docs/configuration.md`."""

TABLES: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("[models]", "`[models] NAME = { ... }`: a model by its name. One of `source` and `from` is needed.", ModelConfig),
    ("[chain]", "Which models teach which.", ChainConfig),
    ("[data]", "What is trained on, and the items held out.", DataConfig),
    ("[evaluation]", "How finished models are measured. The defaults are those of the protocol `quick`.", EvalConfig),
    ("[train]", "How every hop is trained; part of what a model's hash covers.", TrainConfig),
    ("[run]", "Where and how the run is carried out; no part of any hash.", RunConfig),
)


def page() -> str:
    """The whole page as Markdown."""
    parts = [
        INTRODUCTION,
        "## The top of the file",
        _table(Config, leave_out={*(title.strip("[]") for title, *_ in TABLES), "phases"}),
    ]
    for title, text, model in TABLES:
        parts += [f"## {title}", text, _table(model)]
    parts += ["## Protocols of evaluation", _presets(EVAL_PRESETS, "protocol")]
    parts += ["## [[phases]]", "A list, in the order of training. These keys every phase has:", _table(PhaseBase)]
    common = set(PhaseBase.model_fields)
    for model in dict.fromkeys(OBJECTIVES.values()):
        summary = " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())
        own = {name for name in common if model.model_fields[name].default == PhaseBase.model_fields[name].default}
        names = " and ".join(f"`{name}`" for name, other in OBJECTIVES.items() if other is model)
        parts += [f"### objective = {names}", summary]
        if len(rows := _table(model, leave_out=own | {"objective"}).splitlines()) > 2:
            parts += ["\n".join(rows)]
    parts += ["### What the presets set", _presets(PRESETS, "objective")]
    return "\n\n".join(parts) + "\n"


def _table(model: type[BaseModel], leave_out: Collection[str] = ()) -> str:
    """A row for each key of one table of the file; tables within it come behind their key."""
    properties = model.model_json_schema()
    preset = {key for values in (*PRESETS.values(), *EVAL_PRESETS.values()) for key in values}
    rows = ["| key | default | allowed | what it is |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        key = field.alias or name
        if key in leave_out or field.exclude:
            continue
        shown = properties["properties"][key]
        default = (
            _value(shown) if field.default is not PydanticUndefined else "preset's" if name in preset else "needed"
        )
        allowed = _allowed(shown, properties.get("$defs", {}))
        rows.append(f"| `{key}` | {default} | {allowed} | {field.description or ''} |".replace(" |  |", " | |"))
    return "\n".join(rows)


def _value(shown: Mapping[str, Any]) -> str:
    value = shown.get("default")
    return "" if value in (None, [], {}) or isinstance(value, dict) else f"`{toml_value(value)}`"


def _allowed(shown: Mapping[str, Any], tables: Mapping[str, Any]) -> str:
    """The values that a key may have, in words."""
    if "$ref" in shown:
        table = tables[shown["$ref"].rpartition("/")[2]]["properties"]
        return "table: " + ", ".join(f"`{key}` ({_value(inner)[1:-1] or 'none'})" for key, inner in table.items())
    if "anyOf" in shown:
        kinds = [_allowed(kind, tables) for kind in shown["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in shown or "const" in shown:
        return ", ".join(f"`{toml_value(value)}`" for value in shown.get("enum", [shown.get("const")]))
    kind = shown.get("type")
    if kind == "array":
        inner = shown.get("items") or (shown.get("prefixItems") or [{}])[0]
        return f"list of: {_allowed(inner, tables) or 'values'}"
    if kind in ("integer", "number"):
        return _range(shown, "whole number" if kind == "integer" else "number")
    return {"boolean": "`true`, `false`", "string": "text", "object": "table"}.get(kind or "", "")


def _range(shown: Mapping[str, Any], kind: str) -> str:
    """A number with its bounds, those left out that only keep slips of the hand away."""
    bounds = []
    for word, keys in (("from", ("ge", "minimum")), ("above", ("gt", "exclusiveMinimum"))):
        bounds += [f"{word} {value:g}" for key in keys if (value := shown.get(key)) is not None][-1:]
    for word, keys in (("to", ("le", "maximum")), ("below", ("lt", "exclusiveMaximum"))):
        values = [value for key in keys if (value := shown.get(key)) is not None and value < 1e6]
        bounds += [f"{word} {value:g}" for value in values][-1:]
    return " ".join([kind, *bounds])


def _presets(presets: Mapping[str, Mapping[str, Any]], key: str) -> str:
    names = list(presets)
    fields = list(dict.fromkeys(field for values in presets.values() for field in values))
    rows = [f"| `{key} =` | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    for field in fields:
        cells = [f"`{toml_value(presets[n][field])}`" if field in presets[n] else "" for n in names]
        rows.append(f"| `{field}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(page(), end="")
