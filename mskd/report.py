"""The report of a run as Markdown and PNG, made from stored files alone: report.md, loss.png, reverse_kl.png.

    path = write_report(Path("out/runs/demo"))
    document = summary(Path("out/runs/demo"))

What is not there is named under "Absent" and shown as a dash. No model is loaded, so a report can be written again at
any time, also of a run that has not ended.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mskd.checkpoint import write_text
from mskd.results import LEVEL, ON_POLICY, Stored, comparisons, mean, on_policy, shown, summary
from mskd.statistics import Lines

__all__ = ["summary", "write_report"]

DASH = "–"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
STYLES = ("-", "--", "-.", ":")

# The figures of the table: title, field, whether more is better (None: neither), form of a value.
COLUMNS: tuple[tuple[str, str, bool | None, Callable[[float], str]], ...] = (
    ("ROUGE-L", "rouge_l", True, "{:.1f}".format),
    ("Perplexity", "perplexity", False, lambda x: f"{x:,.{0 if x >= 1000 else 1 if x >= 100 else 2}f}"),
    ("Agreement, %", "agreement", True, lambda x: f"{100 * x:.1f}"),
    ("Reverse KL", "reverse_kl", False, "{:z.3f}".format),
    ("Answer, tokens", "answer_tokens", None, "{:.1f}".format),
)

DEFINITIONS = """\
Every figure is followed by its 95 % interval (percentile bootstrap over the test items); of the students the best is
bold. ROUGE-L: Google's rouge_score, stemmer on, F-measure, best over the references, mean x 100. Perplexity: exp of the
mean negative log-likelihood per response token (EOS included, prompt excluded) over the test set. Agreement: share of
the reference's response tokens where the model's most likely token is the top teacher's. Reverse KL: KL(model || top
teacher) over the whole vocabulary at temperature 1, on the model's own answers (mean over an answer's tokens, then over
the items). Answer: its mean length, EOS included."""


def write_report(run: Path) -> Path:
    """Write report.md and its figures into the run's folder; returns the path of report.md.

    Raises ConfigError where `run` is no run, OSError where it cannot be written.
    """
    stored = Stored(run)
    plots = [_plot_losses(stored), _plot_reverse_kl(stored)]
    sections = [
        f"# {stored.name}",
        _introduction(stored),
        "## Result\n\n" + _table(stored) + "\n\n" + DEFINITIONS.replace("\n", " "),
        _comparisons(stored),
        "## Hops\n\n" + "\n\n".join(_hop(stored, hop) for hop in _hops(stored)),
        "## Curves\n\n" + ("\n\n".join(p for p in plots if p) or "No metrics are stored."),
        "## Sample answers\n\n" + _answers(stored),
        "## What was run\n\n" + _what_was_run(stored),
    ]
    if stored.absent:
        sections.append("## Absent\n\n" + "\n".join(f"- {_text(what)}" for what in stored.absent))
    path = stored.directory / "report.md"
    write_text(path, "\n\n".join(s for s in sections if s) + "\n")
    return path


def _hops(stored: Stored) -> list[str]:
    return [key for key in stored.models() if ">" in key]


def _introduction(stored: Stored) -> str:
    students = " and ".join(f"`{shown(path)}`" for path in stored.paths)
    return f"Language models distilled step by step: {students}. Evaluation protocol: {_protocol(stored)}."


def _protocol(stored: Stored) -> str:
    p = stored.index.get("protocol") or {}
    seeds = p.get("seeds") or []
    number = {1: "one seed", 2: "two seeds", 3: "three seeds", 5: "five seeds"}.get(len(seeds), f"{len(seeds)} seeds")
    parts = [number, f"{p.get('max_new_tokens', '?')} tokens"]
    if p.get("sample"):
        parts.append(f"sampled at temperature {p.get('temperature', 1):g}, top-p {p.get('top_p', 1):g}")
    else:
        parts.append("greedy")
    if p.get("no_repeat_ngram_size"):
        parts.append(f"no {p['no_repeat_ngram_size']}-gram twice")
    if p.get("limit"):
        parts.append(f"the first {p['limit']} items")
    label = "quick" if p.get("quick") else str(p.get("protocol", "unknown"))
    if p.get("quick") and p.get("protocol") not in (None, "quick"):
        label = f"quick ({p['protocol']})"
    return f"{label}: {', '.join(parts)}"


# -- tables ---------------------------------------------------------------------------------------


def _table(stored: Stored) -> str:
    rows = []
    keys = stored.models()
    figures = {key: stored.figures(stored.final(key), shown(key)) for key in keys}
    best = _best(stored, figures)
    for key in keys:
        node, top = stored.nodes.get(key, {}), key.split(">")[0]
        row = [f"`{shown(key)}`", _parameters(node.get("parameters"))]
        row += [_figure(figures[key], field, top, form, key in best[field]) for _, field, _, form in COLUMNS]
        time = stored.seconds(key) if ">" in key else None
        rows.append([*row, DASH if time is None else _time(time)])
    head = ["Path", "Parameters", *[title for title, *_ in COLUMNS], "Training time"]
    return _markdown([head, *rows])


def _best(stored: Stored, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each field the paths whose student is best among those that end in the same model; none where it is alone."""
    best: dict[str, set[str]] = {field: set() for _, field, _, _ in COLUMNS}
    for name in {path.split(">")[-1] for path in stored.paths}:
        rivals = [path for path in dict.fromkeys(stored.paths) if path.split(">")[-1] == name]
        for _, field, more, _ in COLUMNS:
            values = {path: mean(figures[path], field, path.split(">")[0]) for path in rivals}
            known = [v for v in values.values() if v is not None]
            if more is not None and len(known) > 1:
                target = max(known) if more else min(known)
                best[field] |= {path for path, value in values.items() if value == target}
    return best


def _figure(
    figures: Mapping[str, Any], field: str, teacher: str | None, form: Callable[[float], str], bold: bool = False
) -> str:
    value = figures.get(field)
    if field in ("reverse_kl", "agreement"):
        value = (value or {}).get(teacher)
    if not value:
        return DASH
    text = form(value["mean"])
    return f"{f'**{text}**' if bold else text} [{form(value['low'])}, {form(value['high'])}]"


def _comparisons(stored: Stored) -> str:
    """Every two paths to the same student, compared item by item."""
    tests = comparisons(stored)
    if not tests:
        return ""
    head = ["Compared", "Figure", "Difference", "p", "p, Holm", "Verdict"]
    note = (
        f"Differences a - b with their 95 % interval (paired bootstrap over the test items); p: two-sided paired "
        f"permutation test over the items; Holm: corrected over the {len(tests)} tests of this table. A verdict needs "
        f"p < {LEVEL:g} after the correction."
    )
    return f"## Paths compared\n\n{_markdown([head, *(_comparison(test) for test in tests)])}\n\n{note}"


def _comparison(test: Mapping[str, Any]) -> list[str]:
    title, _, more, _ = next(c for c in COLUMNS if c[1] == test["field"])
    form = "{:+.1f}" if test["field"] == "rouge_l" else "{:+.3f}"
    a, b = shown(test["a"]), shown(test["b"])
    better = a if (test["mean"] > 0) == more else b
    verdict = f"`{better}` is better" if test["p_holm"] < LEVEL else "no difference is shown"
    interval = f"{form.format(test['mean'])} [{form.format(test['low'])}, {form.format(test['high'])}]"
    return [f"`{a}` - `{b}`", title, interval, *(_p_value(test[name]) for name in ("p", "p_holm")), verdict]


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _hop(stored: Stored, hop: str) -> str:
    """One hop: a table of its stages and what its on-policy phase changed."""
    top, rows = hop.split(">")[0], []
    stages = stored.stages(hop)
    figures = [stored.figures(file, f"{shown(hop)} {stage}") for stage, file in stages]
    teacher = next((t for t in (stored.teacher_of(hop, f) for f in figures[::-1]) if t), None)
    form = {field: f for _, field, _, f in COLUMNS}
    for (stage, _), f in zip(stages, figures, strict=True):
        row = [stage, _figure(f, "perplexity", None, form["perplexity"])]
        row += [_figure(f, "reverse_kl", t, form["reverse_kl"]) for t in dict.fromkeys((teacher or "", top))]
        rows.append([*row, *[_figure(f, field, None, form[field]) for field in ("answer_tokens", "rouge_l")]])
    titles = [f"Reverse KL to {t or 'its teacher'}" for t in dict.fromkeys((teacher or "", top))]
    head = ["Stage", "Perplexity", *titles, "Answer, tokens", "ROUGE-L"]
    seconds = stored.nodes.get(hop, {}).get("seconds")
    time = "" if seconds is None else f"Trained for {_time(seconds)}. "
    return f"### {shown(hop)}\n\n{_markdown([head, *rows])}\n\n{time}{_change(stored, hop)}".rstrip()


def _change(stored: Stored, hop: str) -> str:
    """In words, what the on-policy phase of a hop changed."""
    change = on_policy(stored, hop)
    if change is None:
        return "This hop has no on-policy phase."
    before, after = change["before"], change["after"]
    sentence = f"From *{change['stages'][0]}* to *{change['stages'][1]}*, the on-policy training"
    parts = []
    for name, teacher in (("reverse_kl", change["teacher"]), ("reverse_kl_top", hop.split(">")[0])):
        test = change[name]
        if test is not None and (name == "reverse_kl" or teacher != change["teacher"]):
            parts.append(
                f"reverse KL to {teacher} by {test['mean']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}] "
                f"(paired bootstrap over {test['items']} items, lower on {100 * test['items_below_zero']:.0f} %)"
            )
    for field, title in (("perplexity", "perplexity"), ("answer_tokens", "answer length")):
        a, b = mean(before, field), mean(after, field)
        if a and b is not None:
            parts.append(f"{title} by {100 * (b / a - 1):+.1f} %")
    return f"{sentence} changed {'; '.join(parts)}." if parts else f"{sentence} changed what is not known."


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its head; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _time(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _parameters(count: int | None) -> str:
    if count is None:
        return DASH
    unit, name = next(((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= u), (1, ""))
    return f"{count / unit:.1f} {name}" if name else str(count)


# -- curves ---------------------------------------------------------------------------------------


def _plot_losses(stored: Stored) -> str | None:
    """One panel for each objective, the loss of every hop in it. Returns the Markdown that shows the picture."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for hop in _hops(stored):
        for line in stored.metrics(hop):
            value, objective = line.get("train/loss"), line.get("objective", "")
            if isinstance(value, int | float):
                point = (line.get("phase_step", line["step"]), float(value))
                panels.setdefault(objective, {}).setdefault(hop, []).append(point)
    titles = [f"{objective or 'training'}: loss" for objective in panels]
    return _plot(stored, "loss.png", "Loss of every hop", titles, list(panels.values()), "loss")


def _plot_reverse_kl(stored: Stored) -> str | None:
    """Reverse KL to the hop's teacher on the rollouts during the on-policy phases."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for hop in _hops(stored):
        for line in stored.metrics(hop):
            value = line.get("train/reverse_kl")
            if isinstance(value, int | float) and line.get("objective", ON_POLICY[0]) in ON_POLICY:
                curves.setdefault(hop, []).append((line.get("phase_step", line["step"]), float(value)))
    title = "On-policy: reverse KL to the hop's teacher"
    label = "KL(student || teacher), nats per token"
    return _plot(stored, "reverse_kl.png", "Reverse KL of every hop", [title], [curves] if curves else [], label)


def _plot(
    stored: Stored, name: str, alt: str, titles: Sequence[str], panels: Sequence[Mapping[str, Any]], label: str
) -> str | None:
    """Save one picture, a panel beside the other; a curve is a thin line of values under its running mean."""
    path = stored.directory / name
    if not panels:
        path.unlink(missing_ok=True)
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.5, 5.0 * len(panels)), 4.2), dpi=130, layout="constrained")
    for axes, title, curves in zip(figure.subplots(1, len(panels), squeeze=False)[0], titles, panels, strict=True):
        for hop, points in curves.items():
            number = _hops(stored).index(hop)
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
            x, y = zip(*points, strict=True)
            window = max(1, len(y) // 12)
            if window > 1:
                axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.8)
            axes.plot(x, _running_mean(y, window), label=shown(hop), linewidth=1.8, **style)
        axes.set(title=title, xlabel="optimizer step of the phase", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    tmp = path.with_name(f".tmp-{name}")
    try:
        figure.savefig(tmp, format="png")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return f"![{alt}]({name})"


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the window - 1 before it (fewer at the start)."""
    parts = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


# -- sample answers -------------------------------------------------------------------------------


def _answers(stored: Stored) -> str:
    """One answer of every model to the same three prompts."""
    models = {key: stored.lines(stored.final(key), shown(key)) for key in stored.models()}
    source = next((lines for lines in models.values() if lines), None)
    if source is None:
        return "No evaluation is stored."
    prompts = {line["item"]: line for line in source if line.get("prompt") is not None}
    items = sorted(prompts)
    chosen = list(dict.fromkeys(items[round(i * (len(items) - 1) / 2)] for i in range(3))) if items else []
    start = _common_start([prompts[i]["prompt"] for i in items])
    parts = []
    for number, item in enumerate(chosen, 1):
        parts.append(f"### Prompt {number} (item {item})\n\n{_fenced(prompts[item]['prompt'][start:].strip())}")
        references = prompts[item].get("references") or []
        parts += [f"Reference:\n\n{_fenced(references[0])}"] if references else []
        for key, lines in models.items():
            answer = _first_answer(lines, item)
            parts.append(f"`{shown(key)}`:\n\n{_fenced(answer) if answer is not None else 'not evaluated'}")
    note = "The beginning that all prompts share is left out.\n\n" if start else ""
    return note + "\n\n".join(parts)


def _common_start(prompts: Sequence[str]) -> int:
    """The length of the whole lines that all prompts begin with."""
    return os.path.commonprefix(list(prompts)).rfind("\n") + 1 if len(prompts) > 1 else 0


def _first_answer(lines: Lines | None, item: int) -> str | None:
    return next((line["answer"] for line in lines or [] if line["item"] == item), None)


def _fenced(text: str) -> str:
    """Text shown as it is: a code block whose fence is longer than any run of backticks in it."""
    text = "".join(c for c in text if c.isprintable() or c in "\n\t") or "(empty)"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


# -- what was run ---------------------------------------------------------------------------------


def _what_was_run(stored: Stored) -> str:
    try:
        config = tomllib.loads((stored.directory / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored.miss("config.toml, the configuration of the run")
        config = {}
    data, hardware, versions = (stored.index.get(k) or {} for k in ("data", "hardware", "versions"))
    lines = [f"- Model `{name}`: {_model(values)}" for name, values in config.get("models", {}).items()]
    lines += [f"- Phase {i}: {_phase(phase)}" for i, phase in enumerate(config.get("phases", []), 1)]
    lines += [f"- Hop `{shown(hop)}` differs: {_items(values)}" for hop, values in config.get("hop", {}).items()]
    source = data.get("source") or config.get("data", {}).get("source")
    if source:
        sizes = ", ".join(f"{data[k]} {k} items" for k in ("train", "test") if k in data)
        lines.append(f"- Data: {_text(str(source))}{f' ({sizes})' if sizes else ''}")
    lines += [f"- Evaluation: {_protocol(stored)}", f"- Seed: {config['seed']}" if "seed" in config else ""]
    lines += [f"- Machine: {_machine(hardware)}"] if hardware else []
    lines += [f"- Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}"] if versions else []
    lines.append(f"- Date: {stored.index.get('date') or _date(stored.directory / 'index.json')}")
    if config:
        lines.append("- All settings: [config.toml](config.toml)")
    return "\n".join(line for line in lines if line)


def _machine(hardware: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in hardware.items() if k not in ("name", "memory_bytes", "reasons") and str(v) != "None"}
    memory = str(hardware.get("memory_bytes"))
    parts = [_text(str(hardware["name"]))] if "name" in hardware else []
    parts += [f"{int(memory) / 2**30:.0f} GiB"] if memory.isdigit() else []
    return ", ".join([*parts, _items(kept)])


def _model(values: Mapping[str, Any]) -> str:
    origin = f"from {_text(str(values.get('source') or values.get('from')))}"
    layers = f", {values['layers']} layers" if values.get("layers") else ""
    prepared = "".join(f", prepared by {_phase(phase)}" for phase in values.get("prepare", []))
    return f"{origin}{layers}, {values.get('precision', 'int8')} as a teacher{prepared}"


def _phase(phase: Mapping[str, Any]) -> str:
    shape = ("steps", "epochs", "batch_size", "lr", "temperature", "kd_ratio")
    sampling = ("rollouts", "max_new_tokens", "mix_alpha", "ppo_epochs", "clip", "gamma", "include_current", "whiten")
    loss = ("weight_single_step", "clip_weighted_ratio", "lm_weight")
    return f"{phase.get('objective')} ({_items({k: phase[k] for k in (*shape, *sampling, *loss) if k in phase})})"


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {_text(str(v).lower() if isinstance(v, bool) else str(v))}" for k, v in values.items())


def _date(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d}"


def _text(text: str) -> str:
    """Text in running Markdown: characters that would mean something there are escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
