"""Reading what lies on disk, which may be damaged: regular files only, JSON that may be anything, seals.

    tree = unsealed(path, read_json(path))        # Damaged: a ConfigError, in one line

A seal is the digest of all the rest of a record, kept in the record itself. A file without one, as earlier versions
wrote them, vouches for nothing and is taken as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.store.hashes import NotRegular, digest, open_regular

SEAL = "digest"  # the key of a record's seal
MOST_BYTES = 2**30  # of a record; more is no record of ours


class Damaged(ConfigError):
    """A stored file is not what was written. The message is one line: which file, what is wrong, what to do."""

    def __init__(self, path: Path, what: str, remedy: str = "delete it and run the same command") -> None:
        super().__init__(f"damaged: {path}: {what}; {remedy}")
        self.path, self.what = path, what


def read_text(path: Path) -> str:
    """A record's text. Raises FileNotFoundError where there is none, Damaged where it cannot be read."""
    try:
        with open_regular(path) as f:
            if os.fstat(f.fileno()).st_size > MOST_BYTES:
                raise Damaged(path, f"it has more than {MOST_BYTES:,} bytes")
            return f.read(MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        if path.is_symlink():
            raise Damaged(path, "it is a link to nothing") from None
        raise
    except NotRegular as e:
        raise Damaged(path, str(e.strerror)) from None
    except UnicodeDecodeError as e:
        raise Damaged(path, f"byte {e.start} is no UTF-8") from None


def parsed(text: str, path: Path, line: int | None = None) -> Any:
    """JSON that was read from a file, or from a line of it. Raises Damaged."""
    where = "" if line is None else f"line {line} "
    try:
        return json.loads(text)
    except RecursionError:
        raise Damaged(path, f"{where}is nested too deep") from None
    except ValueError as e:  # also for an integer of thousands of digits
        said = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e).split(";")[0]
        raise Damaged(path, f"{where}is no JSON ({said})") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileNotFoundError, Damaged."""
    return parsed(read_text(path), path)


# -- seals ----------------------------------------------------------------------------------------


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its seal."""
    return {**record, SEAL: digest(record)}


def unsealed(path: Path, record: Any) -> dict[str, Any]:
    """A record that was read, without its seal. Raises Damaged where it is none or not what was sealed."""
    if not isinstance(record, dict):
        raise Damaged(path, "it holds no JSON object")
    rest = {k: v for k, v in record.items() if k != SEAL}
    if SEAL in record and not _is_seal(record[SEAL], rest):
        raise Damaged(path, "it is not what was written (its digest is another)")
    return rest


def sealed_lines(lines: list[dict[str, Any]]) -> str:
    """Records as JSON lines; the first one has the seal of all."""
    first, *rest = lines
    return "".join(
        json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in ({**first, SEAL: digest(lines)}, *rest)
    )


def unsealed_lines(path: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that were read from JSON lines, without their seal. Raises Damaged where they are not those."""
    rest = [{k: v for k, v in line.items() if k != SEAL} for line in lines[:1]] + lines[1:]
    if lines and SEAL in lines[0] and not _is_seal(lines[0][SEAL], rest):
        raise Damaged(path, "its lines are not those that were written (their digest is another)")
    return rest


def _is_seal(given: Any, rest: Any) -> bool:
    try:
        return bool(given == digest(rest))
    except (RecursionError, ValueError):  # what no writer of ours made
        return False
