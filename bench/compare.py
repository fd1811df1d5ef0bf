"""Result files of several machines side by side: one table, one plot.

    python -m bench.compare bench/results/tesla-v100-sxm2-16gb.json bench/results/nvidia-h100-80gb-hbm3.json
    python -m bench.compare A.json B.json --benchmark kl_kernel --provider "ours triton" --plot both.png

A cell is the median, and in brackets the share of the machine's own roof where the row has one. The plot shows one
provider. Last line: one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness import KEY, Row, read_results, table
from bench.plot import Panel, draw

Machines = dict[str, dict[tuple[str, ...], Row]]  # machine -> values of KEY -> row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="result files, one a machine, in the order of the columns")
    parser.add_argument("--benchmark", help="only this one's rows")
    parser.add_argument("--provider", default="ours", help="the one that is plotted")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), help="where the plot goes")
    options = parser.parse_args(arguments)
    try:
        machines = read(options.files, options.benchmark)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    keys = list(dict.fromkeys(key for rows in machines.values() for key in rows))
    cells = {key: {machine: _cell(rows.get(key)) for machine, rows in machines.items()} for key in keys}
    lines = [{**dict(zip(KEY, key, strict=True)), "cells": cells[key]} for key in keys]
    columns = {title: lambda line, title=title: line[title] for title in KEY}
    print(table(lines, columns | {m: lambda line, m=m: line["cells"][m] for m in machines}))
    plotted = plot(machines, options.provider, options.plot)
    print(f"plot of {options.provider}: {options.plot}" if plotted else f"no plot: no row is of {options.provider}")
    print(json.dumps({"machines": list(machines), "rows": lines, "plot": str(options.plot) if plotted else None}))
    return 0


def read(files: Sequence[Path], benchmark: str | None = None) -> Machines:
    """The rows of each file, named for the file. ValueError, in one line, where a file cannot serve."""
    machines: Machines = {}
    for path in files:
        name = path.stem if path.stem not in machines else str(path)
        rows = [r for r in read_results(path)["rows"] if benchmark in (None, r["benchmark"])]
        machines[name] = {tuple(r[k] for k in KEY): r for r in rows}
    if not any(machines.values()):
        raise ValueError(
            "no rows" + (f" of benchmark {benchmark!r}" if benchmark else "") + " in the files; nothing to compare"
        )
    return machines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if "wrong" in row:
        return "WRONG"
    value = f"{row['tokens_per_s']:.4g} tokens/s" if "tokens_per_s" in row else f"{row['ms_p50']:.4g} ms"
    return value + (f" ({row['roof_percent']:.0f} %)" if "roof_percent" in row else "")


def plot(machines: Machines, provider: str, path: Path) -> bool:
    """Median and share of the roof of one provider, a colour a machine; False where there is nothing to draw."""
    units = {"ms_p50": "ms", "roof_percent": "% of the machine's roof"}
    panels = []
    for field, unit in units.items():
        rows: dict[str, dict[str, float]] = {}
        for machine, found in machines.items():
            for (_, shape, dtype, name), row in found.items():
                if name == provider and field in row:
                    rows.setdefault(f"{shape} {dtype}", {})[machine] = row[field]
        panels.append(Panel(unit, rows, log=field == "ms_p50", limit=100.0 if field == "roof_percent" else None))
    if not panels[0].rows:
        return False
    draw(path, f"{provider}, by machine", panels)
    return True


if __name__ == "__main__":
    sys.exit(main())
