"""Atomic writes: nothing is ever half there.

A file or folder is written beside its place under a temporary name, flushed to the disk, then renamed. What a kill
leaves behind is a temporary name: nobody reads it, the lock's next owner or the file's next writer removes it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.config.problems import local_path

TMP = ".tmp-"


def output_folder(given: str | Path) -> Path:
    """The output folder, `~` expanded; it is made. Raises ConfigError where it cannot be written."""
    out = local_path(given, "the output folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
        return out
    except OSError as e:
        raise ConfigError(f"cannot write to the output folder {out}: {e.strerror}; choose another with --out") from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.parent / f"{TMP}{path.name}-{os.getpid()}"
    try:
        with open(tmp, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    _remove_unfinished(path)
    sync_folder(path.parent)


def _remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of the same file: some folders, such as evals/, have no lock to do it under."""
    for tmp in path.parent.glob(f"{TMP}{glob.escape(path.name)}-*"):
        try:
            os.kill(int(tmp.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            tmp.unlink(missing_ok=True)
        except (ValueError, OSError):
            pass  # not ours, or of a process that lives


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` whole or not at all. What stood there before is replaced at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.parent / f"{TMP}{path.name}-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.rename(tmp, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left under temporary names. Call it under the folder's lock only."""
    for item in [*folder.glob(f"{TMP}*"), *folder.glob(f"*/{TMP}*")]:
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """OSError for what the writers of safetensors and tokenizers raise: errors with the errno in their text only."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        number = re.search(r"\bos error (\d+)\b|\bcode: (\d+)\b", str(e))
        if number is None:
            raise
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code), str(folder)) from None
