"""Damage of every kind to a file that a run left: what a disk, a tool or a hand may do to it.

    for damage in damages(file, random.Random(0)):
        damage.apply(file)                    # in a copy of the run

Of a file of any kind bytes are flipped, it is cut, emptied, removed, or something that is no file is put in its place;
of JSON every field of every line gets values of every type, of TOML every value another one.
"""

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = 3 * 2**30  # bytes of a sparse file
RECORDS = ("index.json", "done.json", "evaluations.json", "layers.json")  # what is read field by field


@dataclass(frozen=True)
class Damage:
    """One damage: what it is in words, and how it is done to a path."""

    name: str
    apply: Callable[[Path], Any]


def damages(file: Path, generator: random.Random) -> Iterator[Damage]:
    """Every damage to a file or folder."""
    yield from _places()
    if file.is_dir():
        yield Damage("a file", _instead(lambda path: path.write_text("text")))
        return
    yield from _bytes(file.read_bytes(), generator)
    if file.suffix == ".json" and file.name in RECORDS:
        yield from _json([json.loads(file.read_text())], lambda trees: json.dumps(trees[0], indent=2) + "\n")
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        yield from _json(lines, lambda trees: "".join(json.dumps(tree) + "\n" for tree in trees))
        yield from _lines(file.read_text())
    if file.suffix == ".toml":
        yield from _lines(file.read_text())
        yield from _toml(file.read_text())


# -- something else in its place ------------------------------------------------------------------


def _instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        _remove(path)
        make(path)

    return apply


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sparse(path: Path) -> None:
    with open(path, "wb") as f:
        f.truncate(HUGE)


def _places() -> Iterator[Damage]:
    yield Damage("missing", _remove)
    yield Damage("folder", _instead(Path.mkdir))
    yield Damage("link to itself", _instead(lambda path: path.symlink_to(path.name)))
    yield Damage("link to nothing", _instead(lambda path: path.symlink_to("nowhere")))
    yield Damage("link to /dev/zero", _instead(lambda path: path.symlink_to("/dev/zero")))
    yield Damage("pipe", _instead(os.mkfifo))
    yield Damage("3 GiB of zeros", _instead(_sparse))


# -- bytes ----------------------------------------------------------------------------------------


def _writing(content: bytes | str) -> Callable[[Path], Any]:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def _bytes(data: bytes, generator: random.Random) -> Iterator[Damage]:
    yield Damage("emptied", _writing(b""))
    yield Damage("zeros", _writing(bytes(len(data))))
    yield Damage("half", _writing(data[: len(data) // 2]))
    yield Damage("last byte cut", _writing(data[:-1]))
    yield Damage("first byte cut", _writing(data[1:]))
    yield Damage("garbage behind", _writing(data + b"\x00\xff{"))
    yield Damage("twice", _writing(data + data))
    for _ in range(4):
        place = generator.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << generator.randrange(8)
        yield Damage(f"bit of byte {place} flipped", _writing(bytes(flipped)))
    digits = [m.start() for m in re.finditer(rb"[0-9]", data)]
    for place in generator.sample(digits, min(4, len(digits))):
        digit = str((int(data[place : place + 1]) + 1) % 10).encode()
        yield Damage(f"digit at byte {place} changed", _writing(data[:place] + digit + data[place + 1 :]))


# -- fields ---------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "null": None, "true": True, "-1": -1, "0": 0, "0.5": 0.5, "1e308": 1e308, "Infinity": float("inf"),
    "NaN": float("nan"), "400 digits": 10**400, "''": "", "text": "a > b\n| c", "../..": "../../..",
    "3,000 letters": "x" * 3000, "[]": [], "[null]": [None], "{}": {}, "{'': 1}": {"": 1},
    "5,000 lists": "@5000@", "5,000 digits": "@digits@",
}  # fmt: skip


MISSING = object()


def _json(trees: list[Any], text: Callable[[list[Any]], str]) -> Iterator[Damage]:
    """Every field of every record missing and with every other value."""
    for number, tree in enumerate(trees):
        for place, old in _fields(tree):
            where = ".".join(map(str, [number, *place] if len(trees) > 1 else place))
            number_ = isinstance(old, int | float) and not isinstance(old, bool)
            values = VALUES | {"missing": MISSING} | ({"one more": old + 1} if number_ else {})
            for name, value in values.items():
                yield Damage(f"{where} = {name}", _changing(trees, [number, *place], value, text))


def _changing(
    trees: list[Any], place: list[Any], value: Any, text: Callable[[list[Any]], str]
) -> Callable[[Path], Any]:
    def apply(path: Path) -> None:
        changed = copy.deepcopy(trees)
        parent: Any = changed
        for key in place[:-1]:
            parent = parent[key]
        if value is MISSING:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        _writing(_mad(text(changed)))(path)

    return apply


def _mad(text: str) -> str:
    return text.replace('"@5000@"', "[" * 5000 + "]" * 5000).replace('"@digits@"', "9" * 5000)


def _fields(tree: Any) -> Iterator[tuple[list[Any], Any]]:
    """Every place of a tree, and what is there."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield [key], value
        yield from (([key, *below], old) for below, old in _fields(value))


def _lines(text: str) -> Iterator[Damage]:
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        yield Damage(f"line {i + 1} missing", _writing("".join(lines[:i] + lines[i + 1 :])))
        yield Damage(f"line {i + 1} twice", _writing("".join([*lines[: i + 1], line, *lines[i + 1 :]])))


def _toml(text: str) -> Iterator[Damage]:
    for match in re.finditer(r"(?<== )[^\n]+", text):
        for value in ("-1", "1e308", "nan", '"text"', "[]", "{}", "true", "[" * 5000 + "]" * 5000, "9" * 5000):
            yield Damage(
                f"{match[0][:20]} = {value[:6]}", _writing(text[: match.start()] + value + text[match.end() :])
            )


# -- a copy to harm -------------------------------------------------------------------------------


def restore(whole: Path, harmed: Path) -> None:
    """Make a folder what another one is, files that differ in content only; what is there already stays."""
    for path in sorted(harmed.rglob("*"), reverse=True):
        twin = whole / path.relative_to(harmed)
        kept = path.is_dir() if twin.is_dir() else path.is_file() and twin.is_file()
        if path.is_symlink() or not kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for twin in sorted(whole.rglob("*")):
        path = harmed / twin.relative_to(whole)
        if twin.is_dir():
            path.mkdir(exist_ok=True)
        elif not path.exists() or path.stat().st_size != twin.stat().st_size or path.read_bytes() != twin.read_bytes():
            shutil.copyfile(twin, path)
