"""The class that transformers builds from a model's folder, known before a weight is read.

check_architecture(folder)      # refused unless it is a family of heads.FAMILIES
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.models.heads import FAMILIES, unknown_family
from mskd.models.sources import first_line, quiet, read_json


def check_architecture(folder: Path) -> None:
    """ConfigError unless a known family is what transformers builds as a causal language model from the folder.

    `architectures` of config.json is only what its writer called the class: it decides where it names another kind of
    transformers' own, a classifier say, whose weights would make a language model of another head.
    """
    given = read_json(Path(folder) / "config.json")
    built = _built(folder, given)
    if built not in FAMILIES:
        raise unknown_family(built)
    named = (given.get("architectures") or [built])[0]
    if not isinstance(named, str):
        raise ConfigError(f"{folder}/config.json is damaged: architectures holds a {type(named).__name__}")
    import transformers

    if hasattr(transformers, named) and named not in _causal().values():
        raise ConfigError(f"{folder} holds a {named}, which is no causal language model; known: {', '.join(FAMILIES)}")


def _built(folder: Path, given: dict[str, Any]) -> str:
    from transformers import CONFIG_MAPPING, AutoConfig

    if "auto_map" in given and given.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"{folder} brings the code of a class of its own (auto_map in config.json), and mskd runs no code of a "
            f"model's folder; known: {', '.join(FAMILIES)}"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as e:
        raise ConfigError(f"cannot load the model in {folder}: {first_line(e)}") from None
    if config.model_type not in _causal():
        raise ConfigError(f"cannot load the model in {folder}: {config.model_type!r} is no causal language model")
    return str(_causal()[config.model_type])


def _causal() -> dict[str, str]:
    """The classes of transformers' causal language models by the type of their configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
