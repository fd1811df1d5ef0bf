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


class NotRegular(OSError):
    """Something that is no regular file is in a file's place; strerror says what."""


def open_regular(path: Path) -> io.BufferedReader:
    """A file opened for reading. Raises NotRegular for a pipe or a device, which would keep us for ever, a folder, ...

    Other errors of the system are raised as they are.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except NotADirectoryError as e:
        above = next(folder for folder in reversed(path.parents) if not folder.is_dir())
        raise NotRegular(e.errno, f"{above} is no folder", str(path)) from None
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):  # links in a circle; ENXIO: a socket
            raise NotRegular(e.errno, e.strerror, str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    what = "a folder is in its place" if stat.S_ISDIR(mode) else "it is no regular file"
    raise NotRegular(errno.EINVAL, what, str(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises NotRegular, OSError."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over a model folder's safetensors files, in order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    return digest([[f.name, file_digest(f)] for f in files])
