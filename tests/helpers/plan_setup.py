"""A sweep over two assistants on a five-layer tiny model: what the trials of `mskd plan --measure` are tested on.

python tests/mskd/plan_setup.py FOLDER        # writes model, data and run.toml there, for python -m bench.plan
"""

import sys
from pathlib import Path

from chain_setup import tree, write_rows
from tiny import build_llama, build_tokenizer

from mskd.config import Config, parse, to_toml


def plan_config(folder: Path, kd_steps: int = 24, minillm_steps: int = 12) -> Config:
    """The configuration, with its model and data written to `folder`."""
    model, tokenizer = folder / "model", build_tokenizer()
    if not model.exists():
        build_llama(tokenizer, layers=5).save_pretrained(model)
        tokenizer.save_pretrained(model)
    data = write_rows(folder / "rows.jsonl", 60)
    models = {
        "teacher": {"source": str(model)},
        **{name: {"from": "teacher", "layers": n} for name, n in (("four", 4), ("three", 3), ("student", 2))},
    }
    common = {"batch_size": 4, "warmup_steps": 0}
    phases = [
        {"objective": "kd", "steps": kd_steps, "micro_batch_size": 4, "lr": 3e-3, **common},
        {"objective": "minillm", "steps": minillm_steps, "rollouts": 4, "rollout_batch_size": 4, "ppo_epochs": 2,
         "max_new_tokens": 8, "lr": 1e-3, **common},
    ]  # fmt: skip
    split = {"source": str(data), "test": 12, "validation": 12, "max_prompt_tokens": 200, "max_tokens": 256}
    changes = {"name": "plan", "models": models, "chain": {"paths": "all"}, "phases": phases, "data": split}
    return parse({**tree(model, data), **changes})


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    (where / "run.toml").write_text(to_toml(plan_config(where)))
