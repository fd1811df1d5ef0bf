"""Rows of a file or of the hub, as they are: dictionaries of columns. conversations.py knows what they mean.

The hub and Parquet are read with `datasets`. JSON and CSV are read with the standard library: type inference changes
values there (a column of dates becomes timestamps, "007" a 7, "NA" nothing), a CSV row with a cell too many shifts its
columns, and errors name no line.

rows = read_rows("train.jsonl", "data.source", config)
documents = read_documents("corpus.txt")
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mskd.config import RECIPES, ConfigError, DataConfig
from mskd.config.problems import local_path, nearest, shown

# 300 pairs written for this project, in the public domain (CC0 1.0); `split` says which 50 are its test.
DEMO = RECIPES / "instructions.jsonl"
FILES = (".json", ".jsonl", ".csv", ".parquet")


def read_rows(source: str, key: str, config: DataConfig) -> list[dict[str, Any]]:
    """All rows of the demo, of a local file, or of a split on the hub. Raises ConfigError."""
    if source == "demo":
        split = "train" if key == "data.source" else "test"
        return [row for row in _read_json(DEMO, key) if row["split"] == split]
    path = local_path(source, key)
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source) and path.suffix.lower() not in (*FILES, ".txt")
    if on_hub and not path.exists():
        return _read_hub(source, key, config)
    _check_file(path, key, FILES)
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    return readers[path.suffix.lower()](path, key)


def read_documents(path: str) -> list[str]:
    """The documents of a plain-text file that are not empty. Raises ConfigError."""
    file = local_path(path, "data.text")
    _check_file(file, "data.text", (".txt", ".jsonl"))
    if file.suffix.lower() == ".jsonl":
        rows = _read_json(file, "data.text")
        if rows and not any("text" in row for row in rows):
            raise missing("no column `text`", "data.text", path, list(rows[0]))
        documents = [clean(row.get("text"), f"{path}, row {i}, text") for i, row in enumerate(rows, 1)]
    else:
        documents = [clean(line, path) for line in _read_utf8(file, "data.text").split("\n")]
    documents = [document for document in documents if document]
    if not documents:
        raise ConfigError(f"data.text {path!r} holds no text")
    return documents


class NotText(ConfigError):
    """A cell of another type than text. kind: the type."""

    def __init__(self, where: str, value: Any) -> None:
        self.kind = type(value).__name__
        said = shown(value) if isinstance(value, bool | float) else f"a {self.kind}"
        super().__init__(f"{where} holds {said}, not text")


def plain(value: Any, where: str) -> str:
    """A cell as text: None and NaN are empty, numbers are spelled, line ends become \\n. Raises NotText."""
    if value is None or value != value:  # NaN: an empty cell of a column of numbers
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
        raise NotText(where, value)
    text = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be tokenised


def clean(value: Any, where: str) -> str:
    """A cell as `plain` gives it, without the spaces at both ends."""
    return plain(value, where).strip()


def missing(what: str, key: str, source: str, present: Sequence[str], hint: str = "") -> ConfigError:
    """The error of a column that is not there; lists those that are."""
    return ConfigError(f"{key} {source!r}: {what}{hint}; columns there: {', '.join(present) or 'none'}")


def first_line(error: BaseException) -> str:
    """What went wrong, in one line: the cause if the error wraps one."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _check_file(path: Path, key: str, suffixes: Sequence[str]) -> None:
    allowed = " ".join(suffixes)
    try:
        if path.is_dir():
            raise ConfigError(f"{key} {str(path)!r} is a folder; give a file of it ({allowed})")
        if not path.exists():
            near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise ConfigError(f"{key} {str(path)!r} does not exist{near or f'; give a file ({allowed})'}")
    except OSError as e:  # a folder on the way that may not be entered, a name too long
        raise ConfigError(f"{key} {str(path)!r} cannot be read: {e.strerror}") from None
    if not path.is_file():
        raise ConfigError(f"{key} {str(path)!r} is a device or a pipe, not a file; give a file ({allowed})")
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{key} {str(path)!r} is of no known kind; allowed: {allowed}")


def _read_utf8(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as e:
        raise ConfigError(f"{key} {str(path)!r} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except OSError as e:
        raise ConfigError(f"{key} {str(path)!r} cannot be read: {e.strerror}") from None


def _read_json(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of JSON lines, or of one JSON list."""
    text = _read_utf8(path, key)
    whole = text.lstrip().startswith("[")
    # Only "\n" ends a line: U+2028 and its like may stand inside a JSON string.
    pieces = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[Any] = []
    for number, piece in pieces:
        try:
            rows += json.loads(piece) if whole else [json.loads(piece)]
        except json.JSONDecodeError as e:
            line = number + e.lineno - 1
            raise ConfigError(f"{key} {str(path)!r}, line {line} is no valid JSON: {e.msg}") from None
        except (ValueError, RecursionError) as e:
            why = "nested too deeply" if isinstance(e, RecursionError) else "a number of too many digits"
            raise ConfigError(f"{key} {str(path)!r}, line {number} holds JSON that cannot be read: {why}") from None
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{key} {str(path)!r}, row {i} is no object with columns but {type(row).__name__}")
    return rows


def _read_csv(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of a CSV file with a header; every cell is text."""
    lines = csv.reader(io.StringIO(_read_utf8(path, key)), strict=True)
    rows = []
    try:
        header = next(lines, [])
        for cells in filter(None, lines):
            if len(cells) != len(header):
                raise csv.Error(f"{len(cells)} cells under a header of {len(header)}")
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as e:
        raise ConfigError(f"{key} {str(path)!r}, line {lines.line_num} is no valid CSV: {e}") from None
    return rows


def _read_parquet(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of a Parquet file; the cache of `datasets` lies in a folder that goes when they are read."""
    files = glob.escape(str(path))  # datasets takes a path for a pattern
    with tempfile.TemporaryDirectory() as cache:
        try:
            return _load_dataset("parquet", data_files=files, cache_dir=cache, keep_in_memory=True)
        except Exception as e:  # pyarrow and datasets each raise their own
            raise ConfigError(f"{key} {str(path)!r} cannot be read as Parquet: {first_line(e)}") from None


def _read_hub(source: str, key: str, config: DataConfig) -> list[dict[str, Any]]:
    """Rows of a data set on the hub; `id:subset` names one of its subsets."""
    name, _, subset = source.partition(":")
    split, revision = (config.split, config.revision) if key == "data.source" else ("test", None)
    try:
        return _load_dataset(name, subset or None, split=split, revision=revision)
    except Exception as e:  # no such id, split or subset, no network, no access: each has its own class
        why = first_line(e)
        raise ConfigError(f"{key} {source!r} is no local file, and its split {split!r} on the hub: {why}") from None


def _load_dataset(kind: str, *args: Any, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return [
            {name: _given(cell) for name, cell in row.items()}
            for row in datasets.load_dataset(kind, *args, split=split, **options).to_list()
        ]
    finally:
        if bars:
            datasets.enable_progress_bars()


def _given(cell: Any) -> Any:
    """A cell without the None that a table of records holds wherever one of them lacks a key that another has."""
    if isinstance(cell, dict):
        return {key: _given(value) for key, value in cell.items() if value is not None}
    return [_given(value) for value in cell] if isinstance(cell, list) else cell
