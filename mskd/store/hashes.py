"""Hashes: what a node, a file or a stream of random numbers is known by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FORMAT = 2  # raised when a node's meaning on disk changes; part of every hash


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of a tree of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def stream_seed(seed: int, *names: Any) -> int:
    """A seed in [0, 2^62) for one named stream of random numbers; distinct names give independent streams."""
    return int(digest([seed, *names])[:16], 16) >> 2


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over a model folder's safetensors files, in order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    return digest([[f.name, file_digest(f)] for f in files])
