"""A small run of the whole chain on the tests' tiny model: the configuration, its data, and how to run it elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mskd.config import Config, parse

ROOT = Path(__file__).parents[2]
WORDS = "request response instruction describes task appropriately completes input context further paired write".split()


def write_rows(path: Path, count: int = 24) -> Path:
    """Instruction rows of short, different texts."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * k + k) % len(WORDS)] for k in range(1, 4 + i % 3)]
        rows.append({"instruction": f"{i} {' '.join(words)}", "response": " ".join(reversed(words))})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def tree(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Teacher > ta > student and teacher > student, kd then minillm, with every part small."""
    base: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "models": {
            "teacher": {"source": str(model)},
            "ta": {"from": "teacher", "layers": 3},
            "student": {"from": "teacher", "layers": 2},
        },
        "chain": {"paths": [["teacher", "ta", "student"], ["teacher", "student"]]},
        "data": {"source": str(data), "test": 4, "validation": 3, "max_prompt_tokens": 200, "max_tokens": 256},
        "phases": [
            {"objective": "kd", "steps": 4, "batch_size": 4, "micro_batch_size": 2, "lr": 3e-3, "warmup_steps": 1,
             "keep": "best", "eval_every": 2},
            {"objective": "minillm", "steps": 7, "rollouts": 4, "rollout_batch_size": 3, "batch_size": 2,
             "ppo_epochs": 2, "max_new_tokens": 8, "lr": 1e-3, "warmup_steps": 0},
        ],
        "evaluation": {"protocol": "quick", "max_new_tokens": 8, "batch_size": 4},
        "run": {"device": "cpu"},
    }  # fmt: skip
    return {**base, **changes}


def config(model: Path, data: Path, **changes: Any) -> Config:
    return parse(tree(model, data, **changes))


def environment() -> dict[str, str]:
    """For processes of their own: this checkout on the path, one thread, so that they do not fight for the cores."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def mskd(
    *arguments: Any, check: bool = False, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """The command line in a process of its own. env: variables besides those of `environment`."""
    command = [sys.executable, "-m", "mskd", *map(str, arguments)]
    env = environment() | dict(env or {})
    return subprocess.run(command, env=env, capture_output=True, text=True, check=check, **options)


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of the weights of every finished node under an output folder, by its folder's name."""
    done = {
        p.parent.name: json.loads(p.read_text())
        for p in [*out.glob("hops/*/done.json"), *out.glob("models/*/done.json")]
    }
    return {name: d["weights"] for name, d in sorted(done.items()) if d["weights"]}
