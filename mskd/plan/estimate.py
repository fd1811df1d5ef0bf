"""The tables of what chains and runs will cost: Markdown, before anything is trained or fetched.

print("\n".join(budget_table(load("paper-gpt2"))))      # mskd distill paper-gpt2 --dry-run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mskd.config import Config
from mskd.plan.budget import BANDWIDTH_SHARE, UTILISATION, Budget, Hop, hours, measured, num_rows, shapes_of
from mskd.plan.proposals import Proposal, with_paths
from mskd.plan.sizes import GPUS, Shape, short
from mskd.run.sweep import num_cells


def proposals_table(proposals: Sequence[Proposal], models: Mapping[str, Shape], config: Config) -> list[str]:
    """Lines of Markdown: every chain with its sizes and what all of its hops cost."""
    head = ["rule", "chain", "sizes", "wanted", *_cost_head(measured())]
    rows = []
    for p in proposals:
        budget = Budget(with_paths(config, [p.path]), models, num_rows(config))
        wanted = " > ".join(short(w) for w in p.wanted) or "-"
        sized = " > ".join(short(models[n].parameters) for n in p.path)
        rows.append([" and ".join(p.rules), " > ".join(p.path), sized, wanted, *_cost(budget)])
    return _markdown(head, rows) + ["", *notes(config)]


def budget_table(config: Config) -> list[str]:
    """Lines of Markdown: every hop of a configuration with its cost, then the whole. Nothing is fetched."""
    models = shapes_of(config)
    budget = Budget(config, models, num_rows(config))
    rates = measured()
    head = ["hop", "parameters", "steps", *_cost_head(rates)[:-1]]
    rows = [[h.key, short(h.parameters), _steps(h), *_cells(h, rates)] for h in budget.hops]
    rows += [[key, "not known before it is fetched", *["?"] * (len(head) - 2)] for key in budget.unknown]
    missing = [n for p in config.chain.paths for n in p if n not in models]
    lines = _markdown(head, rows) + [""]
    lines += [f"size not known: {name} ({config.models[name].source})" for name in dict.fromkeys(missing)]
    disk = "?" if budget.disk is None else f"{budget.disk / 1e9:.3g} GB"
    work = budget.work
    cells = f"; as much for each of {num_cells(config)} runs at most" if num_cells(config) > 1 else ""
    total = "not known" if work is None else f"{work.flops:.3g} FLOPs"
    return [*lines, f"{len(rows)} trained nodes: {total}; disk {disk}{cells}", *_too_big(budget), *notes(config)]


def _too_big(budget: Budget) -> list[str]:
    """A line for every GPU whose memory some hops exceed."""
    over = {g: sum(h.memory > g.memory_gb * 1e9 for h in budget.hops) for g in GPUS}
    return [f"{g.name}, {g.memory_gb} GB: too small for {n} of {len(budget.hops)}" for g, n in over.items() if n]


def notes(config: Config) -> list[str]:
    """What the figures assume."""
    data = config.data
    return [
        f"Upper bounds: prompts of {data.max_prompt_tokens} tokens, sequences of {data.max_tokens}, every new token "
        "used; no evaluation. Memory is an estimate, of one device.",
        f"Hours of one GPU, projected where the column says so: {UTILISATION:.0%} of the dense 16-bit peak is assumed, "
        f"decoding at no more than {BANDWIDTH_SHARE:.0%} of the memory bandwidth. Measured: from the FLOP/s that "
        "bench.train_step reached on that machine, with the models of its rows.",
    ]


def _cost_head(rates: Mapping[str, float]) -> list[str]:
    """The measured machines after the GPUs; a GPU with a measurement has that instead of its projection."""
    columns = [f"h {g.name} ({'measured FLOP/s' if _rate(g.name, rates) else 'projected'})" for g in GPUS]
    columns += [f"h {name} (measured FLOP/s)" for name in rates if not any(g.name in name for g in GPUS)]
    return ["FLOPs", *columns, "memory", "disk"]


def _rate(gpu: str, rates: Mapping[str, float]) -> float | None:
    return next((rate for name, rate in rates.items() if gpu in name), None)


def _cost(budget: Budget) -> list[str]:
    """The cells of a whole chain: sums, but of memory the greatest of its hops."""
    disk = "?" if budget.disk is None else f"{budget.disk / 1e9:.3g} GB"
    peak = max((h.memory for h in budget.hops), default=0)
    return [*_cells(Hop("", 0, budget.work, peak, None), measured()), disk]


def _cells(hop: Hop, rates: Mapping[str, float]) -> list[str]:
    """FLOPs, hours on every machine of the head, and memory."""
    others = [rate for name, rate in rates.items() if not any(g.name in name for g in GPUS)]
    memory = f"{hop.memory / 1e9:.3g} GB" if hop.memory else "?"
    if hop.work is None:
        return [*["?"] * (1 + len(GPUS) + len(others)), memory]
    own = [(_rate(g.name, rates), g) for g in GPUS]
    times = [hop.work.flops / rate / 3600 if rate else hours(hop.work, g) for rate, g in own]
    times += [hop.work.flops / rate / 3600 for rate in others]
    return [f"{hop.work.flops:.2e}", *(f"{t:.2g}" if t < 100 else f"{t:,.0f}" for t in times), memory]


def _steps(hop: Hop) -> str:
    return "?" if hop.steps is None else str(hop.steps)


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
