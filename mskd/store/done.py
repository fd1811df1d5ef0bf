"""Finished nodes: done.json, written last, and what it vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.store.hashes import weights_digest


def read_done(folder: Path) -> dict[str, Any] | None:
    """What a node's done.json says, or None where the node is not finished. Raises ConfigError where it is damaged."""
    path = folder / "done.json"
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        weights = done["weights"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise damaged(folder, "done.json cannot be read") from None
    if weights is not None:
        model = folder / "model"
        if not model.is_dir():
            raise damaged(folder, "the folder model is gone")
        if weights_digest(model) != weights:
            raise damaged(folder, "the weights in model are not those that were saved")
    return done


def damaged(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"the node {folder} is damaged: {what}; remove that folder to make it again")
