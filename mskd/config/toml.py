"""A configuration as plain values: keys set by their dotted names, all of it written as TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from mskd.config.problems import ConfigError, read_toml, shown

MAX_DEPTH = 50  # of lists and tables in each other


def plain(value: Any, where: str, key: tuple[str, ...] = ()) -> Any:
    """A copy of plain values. Raises ConfigError for what no TOML file can hold, and so no run could write down."""
    at = f"{where}: {shown('.'.join(key))}"
    if len(key) > MAX_DEPTH:
        raise ConfigError(f"{where}: {'.'.join(key[:3])}... has more than {MAX_DEPTH} tables and lists in each other")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{at} has the key {shown(name)}; a key is text")
            plain(name, where, key)
        return {k: plain(v, where, (*key, k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, where, (*key, str(i))) for i, v in enumerate(value)]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{at} is {shown(value)}; a whole number here has at most 64 bits")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{at} holds {shown(value)}, which is no valid UTF-8 text") from None
    return value


def override(tree: dict[str, Any], item: str) -> None:
    """Apply one `a.b.c=value`; the value is TOML, or a plain string."""
    key, sep, text = item.partition("=")
    if not sep:
        raise ConfigError(f"--set {shown(item)} must look like key=value, for example --set phases.minillm.lr=1e-5")
    try:
        values = read_toml(f"v = {text.strip()}", "the value")
    except ConfigError:
        values = {}
    put(tree, key, values["v"] if set(values) == {"v"} else text.strip(), f"--set {shown(item)}")


def put(tree: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set the value at a dotted key. An entry of a list is named by number or objective. `said`: the user's words."""
    part = r'(?:"[^"]+"|[^."]+)'
    if not re.fullmatch(rf"{part}(?:\.{part})*", key.strip()):
        raise ConfigError(f'{said}: {shown(key)} is no key; a key looks like data.seed or hop."teacher>student".lr')
    parts = [found.strip('"') for found in re.findall(part, key.strip())]
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"{said}: a key has at most {MAX_DEPTH} parts, this has {len(parts)}")
    node: Any = tree
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            index = _phase_index(node, part, said)
            if last:
                node[index] = value
            else:
                node = node[index]
        elif not isinstance(node, dict):
            raise ConfigError(f"{said}: {shown('.'.join(parts[:i]))} is a value and has no {shown(part)}")
        elif last:
            node[part] = value
        else:
            node = node.setdefault(part, {})


def _phase_index(phases: list[Any], part: str, said: str) -> int:
    numbers = [str(i) for i in range(len(phases))]
    names = [p.get("objective") if isinstance(p, dict) else None for p in phases]
    if part in numbers:
        return numbers.index(part)
    if names.count(part) == 1:
        return names.index(part)
    allowed = ", ".join([*numbers[:20], *(n for n in names if isinstance(n, str))])
    raise ConfigError(f"{said}: no single entry {shown(part)} in that list; allowed: {allowed}")


def to_toml(config: BaseModel, header: str = "") -> str:
    """The resolved configuration as TOML that `load` reads back to an equal Config. `header`: comment lines."""
    tree = config.model_dump(by_alias=True, exclude_none=True)
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines += [f"{k} = {toml_value(tree.pop(k))}" for k in ("name", "seed", "seeds") if k in tree and tree[k] != ()]
    tree.pop("seeds", None)
    for table in ("grid", "models", "hop"):
        entries = tree.pop(table)
        if entries:
            lines += ["", f"[{table}]"] + [f"{_toml_key(k)} = {toml_value(v)}" for k, v in entries.items()]
    phases = tree.pop("phases")
    for table, entries in tree.items():
        lines += ["", f"[{table}]"] + [f"{_toml_key(k)} = {toml_value(v)}" for k, v in entries.items()]
    for phase in phases:
        lines += ["", "[[phases]]"] + [f"{k} = {toml_value(v)}" for k, v in phase.items()]
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    """A plain value as TOML writes it, in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(str(k))} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)
