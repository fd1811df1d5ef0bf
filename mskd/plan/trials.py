"""Chooses a chain by short trial hops, cut by successive halving (Jamieson and Talwalkar, AISTATS 2016).

    found = measure(config, Path("out"))
    print(found.ranking[0].path, found.steps, "of", found.sweep_steps)

Candidates are all paths over the models on the configuration's paths. The trials have SHARE of the full sweep's
optimizer steps, the same for every rung, spread over the hops of the paths that are left; the better half goes on,
trained anew and longer. A path is judged by the reverse KL of its student to the top teacher, on the validation items:
test items are held out and have no say. Trials are ordinary runs under OUT/plan: shared hops are trained once, and the
same command goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mskd import models
from mskd.config import Config, ConfigError, all_paths
from mskd.config.hardware import Hardware, detect
from mskd.config.phases import MixedPhase, Phase, resolve_steps
from mskd.evaluation import evaluate
from mskd.plan.proposals import from_config, with_paths
from mskd.run.chain import distill
from mskd.run.first_start import keep_date
from mskd.run.nodes import Graph
from mskd.store.files import output_folder
from mskd.store.hashes import digest, weights_digest
from mskd.store.run_config import write_config

SHARE = 1 / 3  # of the full sweep's steps, at most

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A path's last trial: the rung it came to, from 0, the steps of its hops, and KL(student || top teacher)."""

    path: Path_
    rung: int
    steps: int
    reverse_kl: float


@dataclass(frozen=True)
class Ranking:
    """Best first: those of later rungs, then by reverse KL. Optimizer steps of all trials, and of the full sweep.

    config: that sweep, all paths.
    """

    ranking: tuple[Trial, ...]
    steps: int
    sweep_steps: int
    config: Config


def measure(config: Config, out: Path, echo: Callable[[str], None] = print) -> Ranking:
    """Rank all paths by trial hops in at most SHARE of the steps that training them all would take.

    Models' own prepare phases are carried out in full, and not counted. Raises ConfigError where there are no
    validation items, or too few steps to share out.
    """
    if not config.data.validation:
        raise ConfigError("--measure chooses by validation items, of which there are none; set data.validation")
    bench = Bench(config, output_folder(out) / "plan", echo)
    left: list[Path_] = list(bench.config.chain.paths)
    total = bench.steps(left, 1.0)
    rungs = math.ceil(math.log2(len(left)))
    spent = 0
    last: dict[Path_, Trial] = {}
    for rung in range(rungs):
        fraction = bench.fraction(left, (total * SHARE - spent) / (rungs - rung))
        spent += bench.steps(left, fraction)
        scores = bench.run(left, fraction)
        for path in left:
            last[path] = Trial(path, rung, bench.steps([path], fraction), scores[path])
        echo(f"rung {rung + 1} of {rungs}: " + ", ".join(f"{' > '.join(p)} {scores[p]:.4f}" for p in left))
        left = sorted(left, key=lambda path: scores[path])[: math.ceil(len(left) / 2)]
    ranking = sorted(last.values(), key=lambda t: (-t.rung, t.reverse_kl))
    return Ranking(tuple(ranking), spent, total, bench.config)


def eval_every(phase: Phase, fraction: float) -> int | None:
    """Steps between a trial's validations: none, or where the student's share follows them as many as in full."""
    if not isinstance(phase, MixedPhase) or phase.adaptive_share is None or phase.eval_every is None:
        return None
    return max(1, math.floor(fraction * phase.eval_every / phase.steps_per_round)) * phase.steps_per_round


class Bench:
    """Carries out trials of one configuration under a folder."""

    def __init__(self, config: Config, out: Path, echo: Callable[[str], None]) -> None:
        if config.seeds or config.grid:
            raise ConfigError("--measure takes one seed and no grid; take seeds and [grid] out of the configuration")
        names = list(from_config(config).models)
        kept = keep_date(config, out / "config.toml")
        if kept is not config and not (out / "config.toml").exists():
            write_config(out / "config.toml", kept, "The first configuration that trials were run of")
        self.config = with_paths(kept, all_paths({}, names))
        self.out, self.echo = out, echo
        self.hardware: Hardware = detect(config.run.device, config.train.precision, config.run.attention)
        self.graph = Graph(self.config, out, self.hardware, echo)

    def phases(self, above: str, below: str, fraction: float) -> list[Phase]:
        """The phases of a hop with that fraction of their steps, at least one; the last model is kept."""
        items = len(self.graph.data.train)
        found = []
        for phase in self.config.hop_phases(above, below):
            steps = max(1, math.floor(fraction * resolve_steps(phase, items)))
            own = {"steps": steps, "warmup_steps": math.floor(phase.warmup_steps * fraction)}
            found.append(phase.model_copy(update=own | {"keep": "last", "eval_every": eval_every(phase, fraction)}))
        return found

    def steps(self, paths: Sequence[Path_], fraction: float) -> int:
        """Optimizer steps of all hops of these paths, shared ones counted once."""
        hops = {path[: i + 1] for path in paths for i in range(1, len(path))}
        return sum(int(p.steps or 0) for hop in hops for p in self.phases(hop[-2], hop[-1], fraction))

    def fraction(self, paths: Sequence[Path_], budget: float) -> float:
        """The fraction of their steps at which these paths take at most `budget` steps. Raises ConfigError."""
        fraction = min(1.0, budget / self.steps(paths, 1.0))
        if self.steps(paths, fraction) > budget:
            raise ConfigError(
                f"too few steps to share out: {math.floor(budget)} for the hops of {len(paths)} paths; "
                "give the phases more steps, or name fewer assistants"
            )
        return fraction

    def run(self, paths: Sequence[Path_], fraction: float) -> dict[Path_, float]:
        """Train the hops of these paths so far, and measure their students."""
        config = with_paths(self.config, paths)
        pairs = {pair for path in paths for pair in zip(path, path[1:], strict=False)}
        hop: dict[str, Any] = {
            f"{a}>{b}": {"phases": [p.model_dump(mode="json", exclude_none=True) for p in self.phases(a, b, fraction)]}
            for a, b in sorted(pairs)
        }
        short = {"limit": 1, "max_new_tokens": 1, "seeds": config.evaluation.seeds[:1], "data": ()}  # a formality
        config = config.model_copy(
            update={"hop": hop, "evaluation": config.evaluation.model_copy(update=short), "name": "trial"}
        )
        name = f"trial-{digest(config.model_dump(mode='json'))[:8]}"
        run = distill(config.model_copy(update={"name": name}), self.out, yes=True, echo=self.echo)
        return {path: self.reverse_kl(run.students[" > ".join(path)], path[0]) for path in paths}

    def reverse_kl(self, folder: Path, top: str, split: Literal["validation", "test"] = "validation") -> float:
        """KL(student || top teacher) per token of the student's own answers to the items of a split."""
        settings, node = self.config.evaluation, self.graph.nodes[top]
        hashes = {top: digest([node.hash, node.config.precision])}
        file = evaluate.file_name(split, self.graph.data.fingerprint, settings, hashes, self.graph.ends)
        out = self.out / "evals" / weights_digest(folder)[:16] / file
        if out.exists():
            figures = evaluate.summarize(out)
        else:
            teacher = models.load_teacher(node.folder, node.config.precision, self.hardware)
            model = models.load_model(folder, device=self.hardware.device, attention=self.hardware.attention)
            items = getattr(self.graph.data, split)
            figures = evaluate.evaluate(
                model, self.graph.tokenizer, items, settings, out=out, teachers={top: teacher}, eos_id=self.graph.ends
            )
        return float(figures["reverse_kl"][top]["mean"])


def ranking_table(found: Ranking) -> list[str]:
    """Lines of Markdown, and what the trials took."""
    lines = ["| place | chain | rung | steps | reverse KL, validation |", "|---|---|---|---|---|"]
    for i, t in enumerate(found.ranking, 1):
        lines.append(f"| {i} | {' > '.join(t.path)} | {t.rung + 1} | {t.steps} | {t.reverse_kl:.4f} |")
    share = found.steps / found.sweep_steps
    return [*lines, "", f"{found.steps} steps of trials, {share:.0%} of the {found.sweep_steps} of the full sweep"]
