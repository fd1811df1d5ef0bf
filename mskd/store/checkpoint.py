"""Resumable states: weights, optimizer, rollout and plain values in one safetensors file, named by its own SHA-256."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mskd.store.done import damaged
from mskd.store.files import TMP, disk_errors, sync_folder
from mskd.store.hashes import NotRegular, file_digest


@dataclass(frozen=True)
class State:
    """A resumable state: plain values and tensors by name."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def save_state(folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the newest state in `folder`: one safetensors file, its name ending in its own SHA-256."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tmp = folder / f"{TMP}{os.getpid()}"
    try:
        with disk_errors(folder):
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp, {"mskd": json.dumps(meta)})
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        old = _states(folder)
        count = 1 + max((int(p.name.split("-")[0]) for p in old), default=0)
        os.rename(tmp, folder / f"{count:08d}-{file_digest(tmp)}.safetensors")
    finally:
        tmp.unlink(missing_ok=True)
    sync_folder(folder)
    for path in old:
        path.unlink()


def load_state(folder: Path) -> State | None:
    """The newest state, or None where there is none. Raises Damaged where the file is not what was saved."""
    from safetensors import safe_open

    files = _states(folder)
    if not files:
        return None
    path = files[-1]
    try:
        same = file_digest(path) == path.stem.split("-")[1]
    except NotRegular as e:
        raise damaged(folder.parent, path, str(e.strerror)) from None
    if not same:
        raise damaged(folder.parent, path, "it is not what was saved (its digest is another)")
    with safe_open(path, "pt") as f:
        return State(json.loads(f.metadata()["mskd"]), {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118


def _states(folder: Path) -> list[Path]:
    """The files of states in a folder, the newest last."""
    return sorted(p for p in folder.glob("*.safetensors") if re.fullmatch(r"\d{8,}-[0-9a-f]{64}", p.stem))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name ('index.key'), none sharing memory, and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    seen: set[int] = set()
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, torch.Tensor):
                shared = value.data_ptr() in seen
                tensors[f"{index}.{key}"] = value.clone() if shared else value
                seen.add(value.data_ptr())
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """One parameter's entries. bitsandbytes has its 8-bit ones in a dictionary of their own, which loading undoes."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield key, value


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> None:
    """Put back what `pack_optimizer` gave. Parameter groups keep the values of the running configuration."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pack_sequences(sequences: Iterable[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Sequences of token ids as two int64 tensors: all `ids`, one after the other, and the `lengths`."""
    kept = list(sequences)
    flat = {"ids": [token for s in kept for token in s], "lengths": [len(s) for s in kept]}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in flat.items()}


def unpack_sequences(tensors: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """What `pack_sequences` was given."""
    return [ids.tolist() for ids in tensors["ids"].split(tensors["lengths"].tolist())]
