"""The report of a run, made from stored files alone: report.md, report.html and the pictures beside them.

    path = write_report(Path("out/runs/demo"))
    document = summary(Path("out/runs/demo"))

What is not there is named under "Absent" and shown as a dash. No model is loaded, so a report can be written again at
any time, also of a run that has not ended. report.html holds everything it shows and works without network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mskd.config import ConfigError
from mskd.evaluation.statistics import Lines
from mskd.report import cost, figures, tables, trends, verdict
from mskd.report.description import protocol, record
from mskd.report.document import Block, Code, Heading, Items, Text, escaped, markdown
from mskd.report.page import page
from mskd.report.results import LEVEL, Stored, comparisons, settings, shown
from mskd.report.summary import summary
from mskd.store.files import write_text

__all__ = ["summary", "write_report"]

FURTHER = """\
The same figures and marks as above, of the finished models on every item of this data set; Holm's correction is over
this data set's comparisons."""


def write_report(run: Path) -> Path:
    """Write report.md, report.html and the pictures into the run's folder; returns the path of report.md.

    Raises ConfigError where `run` is no run, a stored file is damaged or the report cannot be written.
    """
    sweep = settings(run)
    directory = sweep[0].directory
    for stored in sweep:
        stored.check()
    try:
        blocks = _report(sweep)
        write_text(directory / "report.html", page(sweep[0].name, blocks, directory))
        write_text(directory / "report.md", markdown(blocks))
    except OSError as e:
        where = e.filename2 or e.filename or directory
        raise ConfigError(
            f"cannot write the report to {where}: {e.strerror or e}; the models and figures are kept: "
            f"mend that, then mskd report {directory}"
        ) from None
    return directory / "report.md"


def _report(sweep: Sequence[Stored]) -> list[Block]:
    """All blocks. Everything but results, comparisons and trends is the first setting's of a sweep."""
    first = sweep[0]
    blocks: list[Block] = [Heading(1, escaped(first.name)), Text(_introduction(sweep))]
    blocks += _results(sweep) + _further(first) + _trends(sweep) + _graph(sweep) + _cost(first)
    blocks += [Heading(2, "Hops"), *(block for hop in first.hops() for block in _hop(first, hop))]
    curves = [draw(first) for draw in (figures.losses, figures.reverse_kl, figures.validation)]
    shown_curves: list[Block] = [picture for picture in curves if picture]
    blocks += [Heading(2, "Curves"), *(shown_curves or [Text("No metrics are stored.")])]
    blocks += [Heading(2, "Sample answers"), *_answers(first)]
    blocks += [Heading(2, "What was run"), *record(first)]
    absent = dict.fromkeys(what for stored in sweep for what in stored.absent)
    return [*blocks, Heading(2, "Absent"), Items([escaped(what) for what in absent])] if absent else blocks


def _introduction(sweep: Sequence[Stored]) -> str:
    first = sweep[0]
    paths = [f"`{shown(path)}`" for path in first.paths]
    students = " and ".join(paths) if len(paths) < 4 else f"{len(paths)} paths from {first.paths[0].split('>')[0]}"
    seeds = f" Trained with the seeds {', '.join(map(str, first.seeds))}." if len(first.cells) > 1 else ""
    return f"Language models distilled step by step: {students}. Evaluation protocol: {protocol(first)}.{seeds}"


# -- sections -------------------------------------------------------------------------------------


def _results(sweep: Sequence[Stored]) -> list[Block]:
    """The table of the models, the verdict on chains and the paths compared, for every setting."""
    blocks: list[Block] = [Heading(2, "Result")]
    compared: list[Block] = []
    chains: list[Block] = []
    for stored in sweep:
        tests = comparisons(stored)
        title = [Heading(3, trends.grid_text(stored.grid))] if len(sweep) > 1 else []
        judged = verdict.judge(stored, tests)
        chains += [*title, Text(verdict.sentence(judged)), verdict.table(judged)] if judged else []
        blocks += [*title, tables.results(stored, tests)]
        if tests:
            compared += [*title, tables.compared(tests), Text(_tests_note(len(tests)), note=True)]
    legend = tables.legend(sweep[0])
    blocks += [Text(_line(legend), note=True)] if legend else []
    blocks.append(Text(_line(tables.DEFINITIONS) + _seeds_note(sweep[0]), note=True))
    if chains:
        blocks += [Heading(2, "Does a chain beat the direct hop?"), *chains, Text(_line(verdict.NOTE), note=True)]
    return blocks + ([Heading(2, "Paths compared"), *compared] if compared else [])


def _further(stored: Stored) -> list[Block]:
    """The table of the models on every further data set; marks are corrected over that data set's comparisons."""
    blocks: list[Block] = []
    for data in stored.further():
        view = stored.on(data)
        tests = comparisons(view)
        blocks += [Heading(2, f"On {escaped(Path(data).stem)}"), tables.results(view, tests)]
        blocks.append(Text(_line(f"{FURTHER} Data: {escaped(data)}."), note=True))
    return blocks


def _tests_note(count: int) -> str:
    return (
        "Differences a - b with their 95 % interval (paired bootstrap over the test items), of perplexity in per cent; "
        "p: two-sided paired permutation test over the items; Holm: corrected over the "
        f"{count} tests of this table. A verdict needs p < {LEVEL:g} after the correction, and holds for these models: "
        "another seed trains others."
    )


def _seeds_note(stored: Stored) -> str:
    count = len(stored.cells)
    return (
        f" Of {count} seeds an item's value is the mean; intervals and tests are over items only." if count > 1 else ""
    )


def _graph(sweep: Sequence[Stored]) -> list[Block]:
    first = sweep[0]
    only = f"From here on the models are those of {trends.grid_text(first.grid)}." if len(sweep) > 1 else ""
    curves = f" Curves and answers are those of seed {first.seeds[0]}." if len(first.cells) > 1 else ""
    note: list[Block] = [Text(f"{only}{curves}".strip(), note=True)] if only or curves else []
    return [Heading(2, "All paths"), *note, figures.graph(first)]


def _trends(sweep: Sequence[Stored]) -> list[Block]:
    found = [table for table in (trends.spread(sweep), trends.variance(sweep), trends.correlations(sweep)) if table]
    return [Heading(2, "Over the students"), *found, Text(_line(trends.NOTE), note=True)] if found else []


def _cost(stored: Stored) -> list[Block]:
    picture = figures.gain(stored)
    note = Text(cost.note(stored), note=True)
    return [Heading(2, "Gain against cost"), cost.table(stored), note, *([picture] if picture else [])]


def _hop(stored: Stored, hop: str) -> list[Block]:
    """One hop: a table of its stages and what its on-policy phase changed."""
    seconds = stored.nodes.get(hop, {}).get("seconds")
    time = "" if seconds is None else f"Trained for {tables.duration(seconds)}. "
    return [Heading(3, shown(hop)), tables.stages(stored, hop), Text(f"{time}{tables.change(stored, hop)}".rstrip())]


def _line(text: str) -> str:
    return text.replace("\n", " ")


# -- sample answers -------------------------------------------------------------------------------


def _answers(stored: Stored) -> list[Block]:
    """One answer of every model to the same three prompts."""
    models = {key: stored.lines(stored.final(key), shown(key)) for key in stored.models()}
    source = next((lines for lines in models.values() if lines), None)
    if source is None:
        return [Text("No evaluation is stored.")]
    prompts = {line["item"]: line for line in source if line.get("prompt") is not None}
    items = sorted(prompts)
    chosen = list(dict.fromkeys(items[round(i * (len(items) - 1) / 2)] for i in range(3))) if items else []
    start = _common_start([prompts[i]["prompt"] for i in items])
    blocks: list[Block] = [Text("The beginning that all prompts share is left out.", note=True)] if start else []
    for number, item in enumerate(chosen, 1):
        blocks += [Heading(3, f"Prompt {number} (item {item})"), Code(prompts[item]["prompt"][start:].strip())]
        references = prompts[item].get("references") or []
        blocks += [Text("Reference:"), Code(references[0])] if references else []
        for key, lines in models.items():
            answer = _first_answer(lines, item)
            blocks += [Text(f"`{shown(key)}`:"), Text("not evaluated") if answer is None else Code(answer)]
    return blocks


def _common_start(prompts: Sequence[str]) -> int:
    """The length of the whole lines that all prompts begin with."""
    return os.path.commonprefix(list(prompts)).rfind("\n") + 1 if len(prompts) > 1 else 0


def _first_answer(lines: Lines | None, item: int) -> str | None:
    return next((line["answer"] for line in lines or [] if line["item"] == item), None)
