"""The old place of `mskd.training.objective`: kept for one release."""

import warnings

from mskd.training.objective import returns

__all__ = ["returns"]

warnings.warn("mskd.objective is now mskd.training.objective", DeprecationWarning, stacklevel=2)
