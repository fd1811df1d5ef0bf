"""Finished nodes: done.json, written last, and what it vouches for.

    write_done(folder, {"weights": weights_digest(folder / "model"), "parameters": 84_900_000, ...})
    done = read_done(folder, trained=True)        # None: not finished; Damaged: something in it is not what was written
    changed_since(folder, done)                   # ["metrics.jsonl"]

By digest it vouches for itself and for every file of the node that later work or a reader takes for true. What only
informs may be changed, and is then said to be; the card and evaluations.json have seals of their own. One of an earlier
version has no digests but that of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mskd.store.files import TMP, write_json
from mskd.store.hashes import NotRegular, file_digest, weights_digest
from mskd.store.reading import Damaged, sealed
from mskd.store.records import Cut, Done, Finished, FinishedTraining, read_record

NAME, METRICS = "done.json", "metrics.jsonl"
FOLDERS = ("model", "phases", "cut", "responses")  # of a node, with files to vouch for
INFORM = (METRICS, "responses/")  # nothing that comes later depends on these
CARD = "README.md"  # every run that evaluates the model may add to it


def digests(folder: Path, *below: str) -> dict[str, str]:
    """SHA-256 of the files in a folder, or in some folders and files below it, by path. Cards are left out."""
    paths = [path for name in below or (".",) for path in (folder / name, *sorted((folder / name).rglob("*")))]
    files = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file() and path.name != CARD}
    return {name: file_digest(path) for name, path in files.items() if TMP not in name}


def write_done(folder: Path, done: Mapping[str, Any]) -> None:
    """Finish a node: write what there is to say of it, with the digests of its files.

    done["files"] holds those that were taken before, when the file was written.
    """
    files = {**digests(folder, *FOLDERS, METRICS), **done.get("files", {})}
    write_json(folder / NAME, sealed({**done, "files": files}))


def read_own(folder: Path, kind: type[Done] = Done) -> dict[str, Any]:
    """What done.json of a node says; no other file is read. Raises FileNotFoundError, Damaged."""
    try:
        return read_record(kind, folder / NAME)
    except Damaged as e:
        raise damaged(folder, e.path, e.what) from None


def read_done(folder: Path, *, node: str | None = None, trained: bool = False) -> dict[str, Any] | None:
    """What done.json of a node says, or None where the node is not finished.

    node: its hash. Raises Damaged unless done.json and all that it vouches for is what was written for this node.
    """
    try:
        done = read_own(folder, FinishedTraining if trained else Finished)
    except FileNotFoundError:
        return None
    if node is not None and done.get("hash", node) != node:
        raise damaged(folder, folder / NAME, "it is that of another node")
    for name, digest in done.get("files", {}).items():
        if not name.startswith(INFORM):
            _check(folder, name, digest)
    if done["weights"] is not None:
        _check_weights(folder, done)
    return done


def _check_weights(folder: Path, done: Mapping[str, Any]) -> None:
    """That model/ holds the weights that were written, and no others, which would be loaded with them."""
    model = folder / "model"
    if not model.is_dir():
        raise damaged(folder, model, "the folder is gone")
    vouched = [Path(name) for name in done.get("files", {}) if name.startswith("model/")]
    try:
        if vouched:  # their content was checked
            names = {path.name for path in vouched if path.suffix == ".safetensors"}
            same = names == {path.name for path in model.glob("*.safetensors")}
        else:
            same = weights_digest(model) == done["weights"]
    except NotRegular as e:
        raise damaged(folder, Path(e.filename), str(e.strerror)) from None
    if not same:
        raise damaged(folder, model, "its weights are not those that were written")


def _check(folder: Path, name: str, digest: str) -> None:
    try:
        same = file_digest(folder / name) == digest
    except FileNotFoundError:
        raise damaged(folder, folder / name, "it is gone") from None
    except NotRegular as e:
        raise damaged(folder, folder / name, str(e.strerror)) from None
    if not same:
        raise damaged(folder, folder / name, "it is not what was written (its digest is another)")


def is_whole(cut: Path, record: str) -> bool:
    """Whether a model that was cut, of a node that is not finished, is there as it was written.

    Its record holds the digests; one of an earlier version has none and vouches for nothing.
    """
    try:
        files = read_record(Cut, cut / record).get("files", {})
        return all(file_digest(cut / name) == digest for name, digest in files.items())
    except (FileNotFoundError, NotRegular, Damaged):
        return False


def changed_since(folder: Path, done: Mapping[str, Any]) -> list[str]:
    """Of the files that only inform those that are not what they were when the node was finished, by path."""
    changed = []
    for name, digest in done.get("files", {}).items():
        if name.startswith(INFORM):
            try:
                _check(folder, name, digest)
            except Damaged:
                changed.append(name)
    return changed


def damaged(folder: Path, path: Path, what: str) -> Damaged:
    """A file of a node is damaged, which the whole node has to be made again for."""
    return Damaged(path, what, f"delete the folder {folder} and run the same command")
