"""Does a chain beat the direct hop? Judged as strictly as the seeds of a run allow.

    found = judge(stored, comparisons(stored))
    blocks = [sentence(found), table(found)]

A chain trains more than a direct hop. So it is judged against the direct hop of as many steps a hop and, where the run
has baselines with the same objectives, against the direct hop whose training tokens come nearest to the chain's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mskd.evaluation.columns import DASH, MORE, TITLE, mean
from mskd.evaluation.statistics import paired_t
from mskd.report.cost import cost
from mskd.report.document import Table
from mskd.report.results import COMPARED, LEVEL, Stored, shown
from mskd.report.tables import difference, p_value

MIN_SEEDS = 3  # fewer say nothing about what another training would give

NOTE = f"""\
Chain against direct hop, difference chain - direct. Tokens: response tokens in the losses of the chain's training for
one of the direct hop's. p over items: paired permutation test, Holm-corrected with all comparisons of the paths; p
over seeds: paired t test of the students' figures, not corrected. Better or worse needs {MIN_SEEDS} seeds and both
p < {LEVEL:g}: the items say whether these students differ, the seeds whether training again would give the same."""


@dataclass(frozen=True)
class Judgement:
    """One figure of a chain beside a direct hop."""

    chain: str
    direct: str
    field: str
    tokens: float | None  # of the chain's training, for one of the direct hop's
    difference: float  # chain - direct; of perplexity that of its logarithm
    p_items: float
    p_seeds: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """ "better", "worse", "no difference is shown" or "inconclusive": what may be said of the chain."""
        if self.seeds < MIN_SEEDS:
            return "inconclusive"
        if self.p_items >= LEVEL or self.p_seeds is None or self.p_seeds >= LEVEL:
            return "no difference is shown"
        return "better" if (self.difference > 0) == MORE[self.field] else "worse"


def judge(stored: Stored, tests: Sequence[Mapping[str, Any]]) -> list[Judgement]:
    """Every chain beside its direct hops, in every figure that was compared."""
    found = {(test["a"], test["b"], test["field"]): test for test in tests}
    judged = []
    for chain in (path for path in stored.paths if path.count(">") > 1):
        for direct in dict.fromkeys((stored.direct(chain), _of_equal_training(stored, chain))):
            for field in COMPARED if direct else ():
                for pair, sign in (((chain, direct), 1), ((direct, chain), -1)):
                    test = found.get((*pair, field))
                    if test and direct:
                        judged.append(_judgement(stored, chain, direct, sign * test["mean"], test))
    return judged


def _judgement(stored: Stored, chain: str, direct: str, change: float, test: Mapping[str, Any]) -> Judgement:
    field = test["field"]
    sides = [[_value(cell, path, field) for cell in stored.each()] for path in (chain, direct)]
    seeds = [a - b for a, b in zip(*sides, strict=True) if a is not None and b is not None]
    return Judgement(
        chain, direct, field, _tokens(stored, chain, direct), change, test["p_holm"], paired_t(seeds), len(seeds)
    )


def _value(cell: Stored, path: str, field: str) -> float | None:
    """The figure of one student; of perplexity its logarithm, as it is compared."""
    value = mean(cell.figures(cell.final(path), shown(path)), field, path.split(">")[0])
    return math.log(value) if value is not None and field == "perplexity" else value


def _tokens(stored: Stored, chain: str, direct: str) -> float | None:
    ours, theirs = cost(stored, chain).tokens, cost(stored, direct).tokens
    return ours / theirs if ours and theirs else None


def _of_equal_training(stored: Stored, chain: str) -> str | None:
    """Of the direct hops with the objectives of the chain's last hop that whose tokens are nearest to the chain's."""

    def objectives(path: str) -> set[str]:
        return {phase.split()[0] for phase in stored.nodes.get(path, {}).get("phases", [])}

    own = objectives(chain)
    rivals = [p for p in stored.rivals(chain) if p.count(">") == 1 and objectives(p) == own]
    near = {p: abs(math.log(ratio)) for p in rivals if (ratio := _tokens(stored, chain, p))}
    return min(near, key=near.__getitem__) if near else None


def sentence(judged: Sequence[Judgement]) -> str:
    """The verdict of a run in words."""
    seeds = min(j.seeds for j in judged)
    if seeds < MIN_SEEDS:
        count = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"**Inconclusive**: {count}, and a verdict on chains needs {MIN_SEEDS}."
    clear = [j for j in judged if j.verdict in ("better", "worse")]
    if not clear:
        return f"**No difference** between chain and direct hop is shown over {seeds} seeds."
    parts = [f"`{shown(j.chain)}` is **{j.verdict}** than `{shown(j.direct)}` in {TITLE[j.field]}" for j in clear]
    return f"Over {seeds} seeds, {'; '.join(parts)}. In the rest no difference is shown."


def table(judged: Sequence[Judgement]) -> Table:
    """One row a chain, direct hop and figure."""
    head = ["Chain", "Direct hop", "Tokens", "Figure", "Chain - direct", "p over items", "p over seeds", "Verdict"]
    return Table(head, [_row(j) for j in judged], left=2)


def _row(j: Judgement) -> list[str]:
    tokens = DASH if j.tokens is None else f"{j.tokens:.2f}"
    p_seeds = DASH if j.p_seeds is None else p_value(j.p_seeds)
    names = [f"`{shown(j.chain)}`", f"`{shown(j.direct)}`"]
    verdict = f"**{j.verdict}**" if j.verdict in ("better", "worse") else j.verdict
    return [*names, tokens, TITLE[j.field], difference(j.field, j.difference), p_value(j.p_items), p_seeds, verdict]
