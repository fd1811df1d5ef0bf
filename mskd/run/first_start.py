"""What a run keeps of its first start: the date that a chat template's strftime_now tells.

    config = keep_date(config, out / "runs" / config.name / "config.toml")

Without it the prompts of such a template, and so the hashes of all nodes, would be others on the next day.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from mskd.config import Config
from mskd.store.run_config import read_config


def keep_date(config: Config, file: Path) -> Config:
    """The configuration with `data.date`, where conversations may ask for it: its own, that of the stored configuration
    in `file`, else today. Raises ConfigError where that file is damaged."""
    asks = config.data.template == "chat" or "data.template" in config.grid
    if config.data.date is not None or not asks:
        return config
    kept = read_config(file)[0].data.date if os.path.lexists(file) else None
    return with_date(config, kept or f"{date.today()}")


def with_date(config: Config, day: str | None) -> Config:
    """The configuration with this `data.date`."""
    return config.model_copy(update={"data": config.data.model_copy(update={"date": day})})
