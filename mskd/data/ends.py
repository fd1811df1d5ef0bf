"""The tokens that end an answer in a run: the one that is trained, and those that its models declare.

ends = answer_ends(tokenizer, "chat", folders)     # (411, 2): ends[0] ends every response that is trained on
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mskd.data.instructions import end_token_id
from mskd.models.folder.declared import declared_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_ends(tokenizer: PreTrainedTokenizerBase, template: str, folders: Iterable[Path]) -> tuple[int, ...]:
    """Ids that end an answer wherever one is sampled; the first one ends the responses that are trained on.

    That one is the template's end of turn, else the tokenizer's eos (`end_token_id`); the models in `folders` may
    declare more, of which those outside the vocabulary are left out. Raises ConfigError.
    """
    trained = end_token_id(tokenizer, template)
    declared = {i for folder in folders for i in declared_ends(folder) if 0 <= i < len(tokenizer)}
    return (trained, *sorted(declared - {trained}))
