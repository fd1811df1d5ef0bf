"""What a model's folder declares about decoding: the ids that end an answer, and settings of `generate`.

declared_ends(folder)              # (2, 411)
answer_ends(411, [folder], 512)    # (411, 2)
decoding_settings(folder)          # {"repetition_penalty": 1.1, "temperature": 0.6}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.models.sources import read_json

# Settings of generation_config.json that choose no token: ids, bookkeeping, speed and what is returned.
NOT_DECODING = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "cache_implementation", "cache_config", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "compile_config", "disable_compile", "max_cache_len", "prefill_chunk_size",
}  # fmt: skip
# Values that change nothing, as transformers itself fills them in.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,), "top_p": (1.0,), "top_k": (0,), "repetition_penalty": (1.0,), "num_beams": (1,),
    "min_length": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "length_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,), "num_return_sequences": (1,), "num_beam_groups": (1,), "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "diversity_penalty": (0.0,),
}  # fmt: skip


def as_ends(eos_id: int | Collection[int]) -> tuple[int, ...]:
    """One end token or several, as a tuple without repeats, in the order given."""
    return (eos_id,) if isinstance(eos_id, int) else tuple(dict.fromkeys(eos_id))


def declared_ends(folder: Path) -> tuple[int, ...]:
    """The ids at which `generate` of transformers ends an answer of a folder's model; () where it declares none.

    generation_config.json holds where it is there, else config.json. Raises ConfigError where they are no ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file():
            given = read_json(path).get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise ConfigError(f"{path}: eos_token_id is {given!r}; it must be an id or a list of ids")
            return as_ends(ids)
    return ()


def answer_ends(trained: int, folders: Iterable[Path], vocabulary: int) -> tuple[int, ...]:
    """Ids that end an answer wherever one is sampled, of which the first ends the responses that are trained on.

    trained: that one; the models in `folders` may declare more. Those outside the vocabulary are left out. Raises
    ConfigError.
    """
    declared = {i for folder in folders for i in declared_ends(folder) if 0 <= i < vocabulary}
    return (trained, *sorted(declared - {trained}))


def decoding_settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json of a folder says about how tokens are chosen, less values that change nothing."""
    path = Path(folder) / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    return {
        name: value
        for name, value in given.items()
        if name not in NOT_DECODING
        and not name.startswith("_")
        and value not in (None, False, [], {})
        and value not in NEUTRAL.get(name, ())
    }
