"""One process a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mskd.config import ConfigError
from mskd.store.files import remove_leftovers


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go when the process ends, however it ends.

    Raises ConfigError at once when another process holds it, or where it cannot be held.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    if os.path.lexists(path) and not path.is_file():
        raise ConfigError(f"{path} is no regular file; delete it and run the same command")
    with open(path, "a+", errors="replace") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            f.seek(0)
            owner = f.read(20).strip() or "?"
            raise ConfigError(
                f"{folder} is being worked on by process {owner}; wait for it to end, stop it, or use another --out"
            ) from None
        f.seek(0)
        f.truncate()
        f.write(str(os.getpid()))
        f.flush()
        remove_leftovers(folder)
        yield
