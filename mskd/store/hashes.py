"""Hashes: what a node, a file or a stream of random numbers is known by."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

FORMAT = 2  # raised when a node's meaning on disk changes; part of every hash


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of a tree of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def stream_seed(seed: int, *names: Any) -> int:
    """A seed in [0, 2^62) for one named stream of random numbers; distinct names give independent streams."""
    return int(digest([seed, *names])[:16], 16) >> 2


def open_regular(path: Path) -> io.BufferedReader:
    """A file opened for reading. Raises OSError for a FIFO or a device, which would keep us for ever, and a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except NotADirectoryError:
        above = next(folder for folder in reversed(path.parents) if not folder.is_dir())
        raise NotADirectoryError(errno.ENOTDIR, f"{above} is no folder", str(path)) from None
    except ValueError as e:  # a NUL in its name
        raise FileNotFoundError(errno.ENOENT, str(e), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder is in its place", str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError where it cannot be read or is no regular file."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over a model folder's safetensors files, in order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    return digest([[f.name, file_digest(f)] for f in files])
