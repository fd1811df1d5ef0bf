"""Does `mskd plan --measure` find the chain that the full sweep finds best? Both, for several seeds, side by side.

    python -m bench.plan run.toml --seeds 5 --out OUT --write result.json

run.toml: a configuration with [data] validation, its assistants on its paths. The trials choose by validation items;
the sweep trains every path in full, and its students are ranked by reverse KL to the top teacher on the test items.
The last line is JSON. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.harness import environment
from mskd.config import Config, load
from mskd.config.hardware import detect
from mskd.plan.trials import Bench, measure
from mskd.run.chain import distill


def compare(config: Config, out: Path) -> dict[str, Any]:
    """One seed: the trials' ranking, the full sweep's, steps of both, and the place in the sweep of what was picked."""
    found = measure(config, out, lambda line: None)
    bench = Bench(config, out / "plan", lambda line: None)
    run = distill(
        bench.config.model_copy(update={"name": f"sweep-{config.seed}"}), out, yes=True, echo=lambda line: None
    )
    true = {t.path: bench.reverse_kl(run.students[" > ".join(t.path)], t.path[0], "test") for t in found.ranking}
    order = sorted(true, key=lambda path: true[path])
    picked = found.ranking[0].path
    return {
        "seed": config.seed,
        "trials": [
            {"path": t.path, "rung": t.rung, "steps": t.steps, "reverse_kl": t.reverse_kl} for t in found.ranking
        ],
        "sweep": [{"path": path, "reverse_kl": true[path]} for path in order],
        "trial_steps": found.steps,
        "sweep_steps": found.sweep_steps,
        "place_of_the_pick": order.index(picked) + 1,
        "excess_reverse_kl": true[picked] - true[order[0]],
    }


def table(seeds: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: both rankings of every seed, best first."""
    lines = ["| seed | trials' ranking | full sweep's ranking | steps | place of the pick |", "|---|---|---|---|---|"]
    for s in seeds:
        ranks = [", ".join(" > ".join(e["path"]) for e in s[key]) for key in ("trials", "sweep")]
        steps = f"{s['trial_steps']} of {s['sweep_steps']}"
        lines.append(f"| {s['seed']} | {ranks[0]} | {ranks[1]} | {steps} | {s['place_of_the_pick']} |")
    best = sum(s["place_of_the_pick"] == 1 for s in seeds)
    return [*lines, "", f"picked the sweep's best in {best} of {len(seeds)} seeds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    config = load(given.config)
    seeds: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        seeds.append(compare(config.model_copy(update={"seed": seed}), given.out))
        print(table(seeds[-1:])[2], flush=True)
    picked = sum(s["place_of_the_pick"] == 1 for s in seeds)
    where = environment(detect(config.run.device).device)
    result = {"benchmark": "plan", "picked_the_best": picked, "of": len(seeds), "seeds": seeds, "environment": where}
    if given.write:
        given.write.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(seeds)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
