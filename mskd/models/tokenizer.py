"""Tokenizers of model folders, and whether two are the same one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mskd.config import ConfigError
from mskd.models.sources import first_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; it has an end token, and a padding token or that one for it. Raises ConfigError."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as e:  # the tokenizers package raises bare Exceptions
            if "trust_remote_code" in str(e):
                why = "it brings code of its own (auto_map in tokenizer_config.json), and mskd runs no code of a folder"
                raise ConfigError(f"cannot load the tokenizer in {folder}: {why}") from None
            raise ConfigError(f"cannot load the tokenizer in {folder}: {first_line(e)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token; responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_ids(
    tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]], rows: Mapping[str, int], where: str
) -> None:
    """ConfigError where the padding token, or one of the sequences, has an id beyond the embedding of a model.

    rows: of every model's embedding, by the model's name. where: what the sequences are, for the message.
    """
    size = 1 + max(tokenizer.get_vocab().values())
    name = min(rows, key=rows.__getitem__)
    if size <= rows[name]:
        return
    for source, ids in chain([("the padding", [tokenizer.pad_token_id])], ((where, s) for s in sequences)):
        worst = max(ids, default=0)
        if worst >= rows[name]:
            token = tokenizer.convert_ids_to_tokens(worst)
            raise ConfigError(
                f"{source} holds the token {token!r}, id {worst}, but the embedding of {name} has {rows[name]} rows "
                f"for a tokenizer of {size} tokens: tokens were added without a resize; call "
                "model.resize_token_embeddings(len(tokenizer)) and save the model, or take them out of the tokenizer"
            )


PROBE = "In 1984, Zoë's 12345 cats don't\trun.\n\n  x = [y**2]; 日本語 😀 <|im_end|></s>"


def check_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, name_a: str, name_b: str) -> None:
    """ConfigError unless two tokenizers have the same tokens and cut a probe text alike; their ends may differ."""
    why = None
    if a.get_vocab() != b.get_vocab():
        ours, theirs = a.get_vocab(), b.get_vocab()
        odd = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        why = f"{len(ours)} and {len(theirs)} tokens; {odd!r} is {ours.get(odd)} and {theirs.get(odd)}"
    elif a(PROBE)["input_ids"] != b(PROBE)["input_ids"]:
        why = "they cut the same text differently"
    if why:
        raise ConfigError(f"{name_a} and {name_b} have different tokenizers ({why}); a hop needs the same one")
