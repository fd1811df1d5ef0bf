"""How a byte-level tokenizer cuts text into words before it merges bytes, by the name that a GGUF file has for it.

A GGUF file names the cut (`tokenizer.ggml.pre`) and does not hold it. Names whose cut is written here from the model's
own tokenizer are read; any other is refused, since a near cut gives other ids without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from mskd.config import ConfigError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def _split(digits: str) -> Any:
    pattern = Regex(f"{CONTRACTIONS}|{WORDS}|{digits}|{REST}")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior="isolated"), _bytes(use_regex=False)])


def _gpt2(core: Tokenizer) -> None:
    core.pre_tokenizer = _bytes()


def _smollm(core: Tokenizer) -> None:
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()])


def _llama3(core: Tokenizer) -> None:
    core.pre_tokenizer = _split(r"\p{N}{1,3}")
    core.model.ignore_merges = True  # a word that is a token is that token, whether or not merges lead to it


def _qwen2(core: Tokenizer) -> None:
    core.pre_tokenizer = _split(r"\p{N}")
    core.normalizer = normalizers.NFC()


CUTS: dict[str, Callable[[Tokenizer], None]] = {
    "gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3, "qwen2": _qwen2,
}  # fmt: skip


def check_cut(kind: str | None, name: str | None, file: str) -> None:
    """ConfigError unless the cut of a GGUF tokenizer is known. kind, name: its `tokenizer.ggml.model` and `.pre`."""
    if kind != "gpt2":
        if name in (None, "default"):  # SentencePiece's kinds have their cut in the kind
            return
        known = "none but 'default'"
    elif name in CUTS:
        return
    else:
        known = ", ".join(CUTS)
    said = f"its tokenizer cuts text as {name!r}" if name else "it does not say how its tokenizer cuts text into words"
    raise ConfigError(
        f"{file}: {said} (tokenizer.ggml.pre; known for the kind {kind!r}: {known}), and another cut would give other "
        "ids; give the model's folder or hub id"
    )


def set_cut(core: Tokenizer, kind: str | None, name: str | None) -> None:
    """Give a tokenizer that was read from a GGUF file the cut of that name, which `check_cut` let pass."""
    if kind == "gpt2" and name is not None:
        CUTS[name](core)
