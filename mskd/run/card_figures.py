"""The figures of a finished model: evaluations.json in its node's folder, and how its card shows them.

    record(node, graph, evaluations)     # those that a run has just made, beside those that are there
    recorded(node)                       # by evaluation file: data, protocol, top teacher, figures

They belong to the node: every run that evaluates it adds its own, and none is read or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mskd.config.problems import local_path
from mskd.evaluation.columns import FORM, TITLE, figure, mean
from mskd.evaluation.statistics import summarize
from mskd.report.document import Block, Heading, Table, Text, escaped
from mskd.run.nodes import Graph, Node
from mskd.store.files import write_json
from mskd.store.reading import Damaged, read_json, sealed, unsealed
from mskd.store.records import Card, checked

MEANING = {
    "perplexity": "exp of the mean negative log-likelihood per response token, EOS included; less is better",
    "rouge_l": "F-measure, x 100, of the longest common subsequence of answer and reference; more is better",
    "agreement": "share of the reference's tokens where the most likely token is the teacher's",
    "reverse_kl": "KL(model, teacher) in nats per token of the model's own answers; less is better, 0 is the teacher",
}
FILE = "evaluations.json"
Recorded = Mapping[str, Mapping[str, Any]]


def record(
    node: Node, graph: Graph, evaluations: Sequence[Mapping[str, Any]], echo: Callable[[str], None] = print
) -> None:
    """Add to the node's evaluations.json what a run's evaluations say of it, of its top teacher and of its start.

    evaluations: entries of the run's index. One that is there already is not read again: its file's name says what was
    asked, and of which weights.
    """
    if node.source is not None:
        return
    known = recorded(node, echo)
    final = [e for e in evaluations if e["stage"] in ("initial", "final")]
    new: dict[str, Any] = {}
    for entry in final:
        if entry["node"] == node.key and entry["file"] not in known:
            same = [e for e in final if e.get("data") == entry.get("data")]
            evaluation = _evaluation(node, graph, entry.get("data"), {e["node"]: e["file"] for e in same})
            new |= {entry["file"]: evaluation} if evaluation["figures"].get("model") else {}
    if new:
        write_json(node.directory / FILE, sealed(known | new))


def recorded(node: Node, echo: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """evaluations.json of a node: by evaluation file what `record` wrote, {} where that is not there or damaged.

    echo: hears of damage.
    """
    path = node.directory / FILE
    try:
        tree = read_json(path)
        return checked(Card, {"evaluations": unsealed(path, tree)}, path)["evaluations"]
    except FileNotFoundError:
        return {}
    except Damaged as e:
        echo(f"{node.key}: {path} was damaged ({e.what}) and is made again; other runs put their figures back")
        return {}


def _evaluation(node: Node, graph: Graph, data: str | None, files: Mapping[str, str]) -> dict[str, Any]:
    """What was asked in the evaluation files (by node) of one data set, and the figures of the models it is about."""
    c, top = graph.config, _top(node, graph)
    models = {"model": node, "teacher": None if top is node else top, "start": node.start if node.teacher else None}
    source = data or (c.data.test if isinstance(c.data.test, str) else c.data.source)
    return {
        "data": name_of(source),
        "hub": dataset_id(source),
        "held_out": source == c.data.source and data is None,
        "trained_on": _trained_on(graph, data),
        "protocol": c.evaluation.model_dump(exclude={"data", "batch_size", "limit"}, mode="json"),
        "top": top.name,
        "precision": top.config.precision,
        "figures": {role: _figures(graph.out / files[n.key]) for role, n in models.items() if n and n.key in files},
    }


def _trained_on(graph: Graph, data: str | None) -> int:
    """Items of a further data set whose prompt is also a training row's; of the run's own test items none is."""
    trained = {e.prompt for e in graph.data.train}
    items = graph.tests[data][0][: graph.config.evaluation.limit] if data is not None else ()
    return sum(e.prompt in trained for e in items)


def _figures(file: Path) -> dict[str, Any] | None:
    """`statistics.summarize` of an evaluation file; None where it is not there."""
    try:
        return summarize(file)
    except FileNotFoundError:
        return None


def _top(node: Node, graph: Graph) -> Node:
    """The teacher that a node's figures are compared with: the top of its path, of a model that of the first path."""
    return graph.nodes[node.key.split(">")[0] if node.teacher else graph.config.chain.paths[0][0]]


# -- as blocks and as metadata --------------------------------------------------------------------


def results(evaluations: Recorded) -> list[Any]:
    """The model's figures as the hub's model-index has them, a metric for each; agreement is a share, not per cent."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=e["hub"] or e["data"],
            dataset_name=e["data"],
            dataset_split="held-out" if e["held_out"] else None,  # of the same data more may have been evaluated
            metric_type={"rouge_l": "rouge"}.get(field, field),
            metric_name=f"{_title(field, e['top'])} ({e['protocol']['protocol']} protocol)",
            metric_value=value,
        )
        for e in evaluations.values()
        for field in MEANING
        if (value := mean(e["figures"]["model"], field, e["top"])) is not None
    ]


def _title(field: str, top: str) -> str:
    return {"agreement": f"Agreement with {top}", "reverse_kl": f"Reverse KL to {top}"}.get(field, TITLE[field])


def blocks(node: Node, evaluations: Recorded) -> list[Block]:
    """For each evaluation a table: the model beside its top teacher and beside itself before the hop."""
    found: list[Block] = []
    for evaluation in evaluations.values():
        own = ", held out" if evaluation["held_out"] else ""
        found += [Heading(3, escaped(evaluation["data"]) + own), _table(node, evaluation), Text(_protocol(evaluation))]
    return found


def _table(node: Node, evaluation: Mapping[str, Any]) -> Table:
    top, figures = evaluation["top"], evaluation["figures"]
    teacher, start = f"`{top}` in {evaluation['precision']}", f"`{node.name}` before the hop"
    columns = {"model": "this model", "teacher": teacher, "start": start}
    shown = [role for role in columns if figures.get(role)]
    rows = [
        [_title(field, f"`{top}`") + (", %" if field == "agreement" else ""), meaning]
        + [figure(figures[role], field, top, FORM[field]) for role in shown]
        for field, meaning in MEANING.items()
    ]
    return Table(["figure", "what it is", *(columns[role] for role in shown)], rows, left=2)


def _protocol(evaluation: Mapping[str, Any]) -> str:
    p, own = evaluation["protocol"], evaluation["figures"]["model"]
    top_p = "" if p["top_p"] == 1 else f" and top-p {p['top_p']:g}"
    how = f"sampled at temperature {p['temperature']:g}{top_p}" if p["sample"] else "decoded greedily"
    seeds = f"{own['seeds']} seed{'' if own['seeds'] == 1 else 's'}"
    items = f"{own['items']} items{' held out of the training data' if evaluation['held_out'] else ''}"
    seen = evaluation["trained_on"]
    trained = f" {seen} of the items have the prompt of a training row." if seen else ""
    return (
        f"{items}, the `{p['protocol']}` protocol: {seeds}, answers of at most {p['max_new_tokens']} tokens {how}."
        f"{trained} In brackets 95 % intervals, percentile bootstrap over the items."
    )


# -- names of data --------------------------------------------------------------------------------


def dataset_id(source: str) -> str | None:
    """A data set's id on the hub, without its subset; None of the demo's and of a file."""
    return None if source == "demo" or local_path(source, "data").exists() else source.partition(":")[0]


def name_of(source: str) -> str:
    """A source without the machine's path to it."""
    path = local_path(source, "data")
    return path.resolve().name if path.exists() else source
