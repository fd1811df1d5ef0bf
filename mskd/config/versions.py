"""The versions of mskd and of the packages that take part, read without importing them.

versions()["torch"]          # "2.13.0+cpu"; no entry where a package is not installed
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

VERSION = "0.1.0"  # of a checkout that is on the path but not installed
PACKAGES = ("mskd", "torch", "triton", "transformers", "accelerate", "datasets", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions by package."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found.setdefault("mskd", VERSION)
    return found


def version_line() -> str:
    """What `mskd --version` says, in one line."""
    found = versions()
    others = [f"{name} {found[name]}" for name in ("torch", "transformers") if name in found]
    return f"mskd {found['mskd']} ({', '.join([*others, f'Python {platform.python_version()}'])})"
