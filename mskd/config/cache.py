"""The user's cache folder: what is made once on a machine and found again by every run.

cache_dir() / "smollm2-135m-..."     # $MSKD_CACHE, $XDG_CACHE_HOME/mskd or ~/.cache/mskd
"""

from __future__ import annotations

import os
from pathlib import Path

from mskd.config.problems import local_path


def cache_dir() -> Path:
    """The user's cache folder, not created here. Raises ConfigError where MSKD_CACHE is no path."""
    if given := os.environ.get("MSKD_CACHE"):
        return local_path(given, "MSKD_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mskd"
    return Path.home() / ".cache" / "mskd"
