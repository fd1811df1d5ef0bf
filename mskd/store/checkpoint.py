"""The store on disk: hashes, locks, atomic writes and resumable states.

Nothing here is ever half there: a file or folder is written beside its place under a temporary name, flushed to the
disk, then renamed. What a kill leaves behind is a temporary name: nobody reads it, the lock's next owner or the file's
next writer removes it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mskd.config import ConfigError

FORMAT = 2  # raised when a node's meaning on disk changes; part of every hash
_TMP = ".tmp-"


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


def check_writable(out: Path) -> None:
    """Make the output folder, or say in one line why it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ConfigError(f"cannot write to the output folder {out}: {e.strerror}; choose another with --out") from None


# -- atomic writes --------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.parent / f"{_TMP}{path.name}-{os.getpid()}"
    try:
        with open(tmp, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    _remove_unfinished(path)
    _sync_folder(path.parent)


def _remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of the same file: some folders, such as evals/, have no lock to do it under."""
    for tmp in path.parent.glob(f"{_TMP}{glob.escape(path.name)}-*"):
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
    tmp = path.parent / f"{_TMP}{path.name}-{os.getpid()}"
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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left under temporary names. Call it under the folder's lock only."""
    for item in [*folder.glob(f"{_TMP}*"), *folder.glob(f"*/{_TMP}*")]:
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


# -- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go when the process ends, however it ends.

    Raises ConfigError at once when another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            f.seek(0)
            owner = f.read().strip() or "?"
            raise ConfigError(
                f"{folder} is being worked on by process {owner}; wait for it to end, stop it, or use another --out"
            ) from None
        f.seek(0)
        f.truncate()
        f.write(str(os.getpid()))
        f.flush()
        remove_leftovers(folder)
        yield


# -- finished nodes -------------------------------------------------------------------------------


def read_done(folder: Path) -> dict[str, Any] | None:
    """What a node's done.json says, or None where the node is not finished. Raises ConfigError where it is damaged."""
    path = folder / "done.json"
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        weights = done["weights"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise _damaged(folder, "done.json cannot be read") from None
    if weights is not None:
        model = folder / "model"
        if not model.is_dir():
            raise _damaged(folder, "the folder model is gone")
        if weights_digest(model) != weights:
            raise _damaged(folder, "the weights in model are not those that were saved")
    return done


def _damaged(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"the node {folder} is damaged: {what}; remove that folder to make it again")


# -- resumable states -----------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A resumable state: plain values and tensors by name."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def save_state(folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the newest state in `folder`: one safetensors file, its name ending in its own SHA-256."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tmp = folder / f"{_TMP}{os.getpid()}"
    try:
        with disk_errors(folder):
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp, {"mskd": json.dumps(meta)})
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        old = sorted(folder.glob("*.safetensors"))
        count = 1 + max((int(p.name.split("-")[0]) for p in old), default=0)
        os.rename(tmp, folder / f"{count:08d}-{file_digest(tmp)}.safetensors")
    finally:
        tmp.unlink(missing_ok=True)
    _sync_folder(folder)
    for path in old:
        path.unlink()


def load_state(folder: Path) -> State | None:
    """The newest state, or None where there is none. Raises ConfigError where the file is not what was saved."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    path = files[-1]
    if file_digest(path) != path.stem.split("-")[1]:
        raise _damaged(folder.parent, f"{path.name} in state is not what was saved")
    with safe_open(path, "pt") as f:
        return State(json.loads(f.metadata()["mskd"]), {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118


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
