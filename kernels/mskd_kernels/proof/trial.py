"""The process of a proof: runs the cases of a subject on a device, then times the ways of the row op.

    python -m mskd_kernels.proof.trial cuda:0 core timed 120

One JSON document a line: {"case"} and {"kernel"} before they run; at last {"done", "gpu", "table"}, or {"wrong",
"kernel"} for the case that was named before, or {"unable"} where nothing could be found out. After so many seconds it
ends itself.
"""

import json
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from mskd_kernels.proof.cases import cases
from mskd_kernels.proof.check import Wrong, check, first_line
from mskd_kernels.proof.kept import FORMAT
from mskd_kernels.proof.measure import measured
from mskd_kernels.proof.timings import SIZES, Size, Timing


def trial(device: torch.device, subject: str, timed: bool) -> int:
    """0 where all cases are right, 1 where one is wrong, 2 where that could not be found out."""
    quick = device.type == "cpu"
    try:
        capability = (0, 0) if quick else torch.cuda.get_device_capability(device)
        if not quick:
            torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN: reading it is seen
        every = cases(subject, capability, quick)
        for case in every:
            say(case=case.name)
            check(case, device, begin)
        torch.use_deterministic_algorithms(False)
        table: tuple[Timing, ...] = ()
        if timed:
            say(case="timing")
            table = measured(device, [Size(4, 1, 300, 5)] if quick else SIZES, begin)
    except Wrong as error:
        say(wrong=error.what, kernel=error.kernel)
        return 1
    except Exception as error:
        say(unable=first_line(error))
        return 2
    name = "Triton's interpreter" if quick else torch.cuda.get_device_name(device)
    say(done=len(every), gpu=name, table=[timing.row() for timing in table])
    return 0


def begin(kernel: str) -> None:
    say(kernel=kernel)


def say(**document: Any) -> None:
    """One line on stdout, at once: what was said last is known even if this process dies."""
    print(json.dumps({"format": FORMAT, **document}), flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command line: device, subject, "timed" or "untimed", seconds."""
    device, subject, timed, limit = arguments
    signal.alarm(int(limit) + 1)  # nobody waits for it any longer
    warnings.simplefilter("ignore")  # only what is said counts
    return trial(torch.device(device), subject, timed == "timed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
