"""config.toml of a run: its resolved configuration, sealed in the first line.

write_config(folder / "config.toml", config, "mskd 0.1.0")
config, text = read_config(folder / "config.toml")
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mskd.config import Config, ConfigError, parse, to_toml
from mskd.config.problems import read_toml
from mskd.store.files import write_text
from mskd.store.reading import Damaged, read_text

SEAL = "# sha256 of all that follows: "


def write_config(path: Path, config: Config, header: str) -> None:
    """Write the configuration under comment lines; OSError where that is not possible."""
    text = to_toml(config, header)
    write_text(path, f"{SEAL}{_digest(text)}\n{text}")


def read_config(path: Path) -> tuple[Config, str]:
    """The configuration and its text without the seal.

    Raises FileNotFoundError; Damaged where it is not what was written; ConfigError where it is no configuration, which
    one of another version may be.
    """
    whole = read_text(path)
    first, _, text = whole.partition("\n")
    if not first.startswith(SEAL):
        text = whole
    elif first != f"{SEAL}{_digest(text)}":
        raise Damaged(path, "it is not what was written (its digest is another)")
    try:
        return parse(read_toml(text, path.name), where=path.name), text
    except ConfigError as e:
        why = str(e).removeprefix(f"{path.name}: ")
        raise ConfigError(f"{path} is no configuration ({why}); delete it and run the same command") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
