"""mskd: compress language models by multi-step distillation.

    import mskd
    run = mskd.distill(mskd.load("demo"), out="demo-out")

The fused losses are a package of their own: `mskd_kernels`.
"""

import logging
from typing import TYPE_CHECKING, Any

from mskd.config import Config, ConfigError, load
from mskd.config.versions import VERSION

if TYPE_CHECKING:
    from mskd.run.chain import Run, distill

__version__ = VERSION
__all__ = ["Config", "ConfigError", "Run", "distill", "load"]


def _not_about_4_bits(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# bitsandbytes warns at its import, whoever imports it, where it finds no kernel for 4-bit weights, which mskd has none
# of. It asks Hugging Face's package `kernels`; in a checkout's root Python finds our folder of that name instead.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_about_4_bits)


def __getattr__(name: str) -> Any:
    # torch and transformers are imported when they are needed, not by `import mskd`
    if name in ("distill", "Run"):
        from mskd.run import chain

        return getattr(chain, name)
    raise AttributeError(f"module 'mskd' has no attribute {name!r}")
