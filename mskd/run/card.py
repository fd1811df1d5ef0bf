"""The card of a finished model: README.md in its folder, with the front matter that the hub reads.

    write(node, graph, done)             # from the node, what it was made from, and the figures of card_figures.py

A card is about a node, not about a run: the same words whichever run writes it, and every evaluation that any run made
of it. Where nothing is new no byte changes, and a card that was changed by hand is left alone. No hash covers it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mskd.config.phases import PRESETS, Phase
from mskd.data.instructions import ALPACA
from mskd.models.folder.declared import declared_ends
from mskd.models.sources import KNOWN, hub_id
from mskd.report.document import Block, Heading, Items, Table, Text, escaped, markdown
from mskd.report.tables import duration, short
from mskd.run import card_figures, licence
from mskd.run.nodes import Graph, Node
from mskd.store.files import write_text
from mskd.store.hashes import NotRegular, digest, open_regular
from mskd.store.reading import Damaged
from mskd.store.records import Cut, read_record

MAIN = ("steps", "epochs", "batch_size", "lr", "temperature", "kd_ratio", "mix_alpha", "student_share", "beta", "skew")
QUESTION = "Name three rivers of Europe."
Done = Mapping[str, Mapping[str, Any]]  # done.json by the key of its node


# -- the card -------------------------------------------------------------------------------------


def write(node: Node, graph: Graph, done: Done, echo: Callable[[str], None] = print) -> None:
    """Write the card of a finished node, if it is not there, whole or not at all. A source's folder is never touched.

    done: of the node and of all before it. Raises Damaged where something else is in the card's place, OSError where it
    cannot be written.
    """
    if node.source is not None:
        return
    path, text = node.folder / "README.md", signed(card(Facts(node, graph, done, card_figures.recorded(node))))
    try:
        with open_regular(path) as f:
            old = f.read().decode("utf-8", "replace")
    except FileNotFoundError:
        old = None
    except NotRegular as e:
        raise Damaged(path, str(e.strerror)) from None
    if old == text:
        return
    if old is not None and not _is_signed(old):
        echo(f"{node.key}: its card was changed by hand and is left as it is ({path})")
        return
    write_text(path, text)


def signed(text: str) -> str:
    """The text with a last line, not shown on the hub, by which it is known whether somebody changed it."""
    return f"{text}\n<!-- written by mskd, {digest(text)[:16]} -->\n"


def _is_signed(text: str) -> bool:
    return text == signed(text.rpartition("\n<!-- ")[0])


@dataclass(frozen=True)
class Facts:
    """All that a card says: of a node, of what it was made from, and how it was evaluated."""

    node: Node
    graph: Graph
    done: Done
    evaluations: card_figures.Recorded

    @property
    def hops(self) -> list[Node]:
        """The hops from the top of the path to this node; none of a model that was only cut or prepared."""
        found, node = [], self.node
        while node.teacher is not None:
            found.append(node)
            node = node.teacher
        return found[::-1]

    @property
    def starts(self) -> list[Node]:
        """The models of the path, from its top, each as it was before its hop; what they are cut from comes before."""
        hops = self.hops
        queue = [hops[0].teacher, *(hop.start for hop in hops)] if hops else [self.node]
        found: list[Node] = []
        for start in queue:
            line = [start]
            while line[0] is not None and line[0].start is not None:
                line.insert(0, line[0].start)
            found += [n for n in line if n is not None and n not in found]
        return found

    @property
    def origins(self) -> list[str]:
        """The sources that this model comes from: first that of its weights, then those of the models above it."""
        names = [self.node.name, *(n.name for n in self.starts)]
        return list(dict.fromkeys(self.graph.origin(name) for name in names))

    def source(self, name: str) -> str:
        """Where a source model comes from, as the configuration has it."""
        return str(self.graph.config.models[name].source)

    @property
    def own(self) -> Mapping[str, Any]:
        """The node's own done.json."""
        return self.done[self.node.key]

    @property
    def licences(self) -> dict[str, licence.Licence | None]:
        """The licence of every source by the model's name."""
        return {name: licence.licence_of(self.source(name), self.graph.folders[name]) for name in self.origins}


def card(facts: Facts) -> str:
    """The whole card: front matter and Markdown."""
    blocks = [*_head(facts), *_use(facts), *_figures(facts), *_making(facts), *_limits(facts), *_licence(facts)]
    return f"---\n{_metadata(facts)}\n---\n\n{markdown(blocks)}"


def _metadata(facts: Facts) -> str:
    """The front matter, YAML."""
    from huggingface_hub import ModelCardData

    claimed = licence.together(facts.licences.values())
    base = hub_id(facts.source(facts.origins[0]))
    data = card_figures.dataset_id(facts.graph.config.data.source) if _trained(facts) else None
    top = facts.graph.origin(facts.starts[0].name)
    results = card_figures.results(facts.evaluations)
    values = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mskd", *(["distillation", "knowledge-distillation"] if facts.hops else [])],
        base_model=base,
        base_model_relation="finetune" if base else None,  # the hub knows finetune, adapter, merge and quantized
        license=claimed.id,
        license_name=claimed.name,
        license_link=claimed.link,
        language=licence.languages_of(facts.graph.folders[top]) or None,
        datasets=[data] if data else None,
        model_name=facts.node.name if results else None,
        eval_results=results or None,
    )
    return str(values.to_yaml())


# -- its sections ---------------------------------------------------------------------------------


def _head(facts: Facts) -> list[Block]:
    node, graph = facts.node, facts.graph
    size = f"{short(facts.own['parameters'])} parameters and {graph.layers[node.name]} layers"
    if facts.hops:
        how = f"distilled from {_shown(facts, graph.origin(facts.starts[0].name))} along `{_path(node)}`"
    else:
        how = f"{_ways(node)} from {_shown(facts, facts.origins[0])}"
    made = f"`{node.name}` is a causal language model of {size}, {how}, with mskd {facts.own['versions']['mskd']}."
    return [Heading(1, f"`{node.name}`"), Text(made)]


def _ways(node: Node) -> str:
    ways = [way for way, done in (("cut", node.start or node.config.layers), ("prepared", node.phases)) if done]
    return " and ".join(ways) or "taken"


def _use(facts: Facts) -> list[Block]:
    """Code that loads the folder it stands in and answers one question under the template of the training."""
    graph = facts.graph
    chat = graph.config.data.template == "chat"
    end = graph.ends[0]  # a folder written by an older mskd may not declare it
    stop = "" if end in declared_ends(facts.node.folder) else f", eos_token_id={end}"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file lies, or the model\'s id on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if chat:
        own = "".join(f", {name}={value!r}" for name, value in graph.config.data.template_kwargs.items())
        lines += [
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            f"prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{own})",
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        ]
    else:
        prompt = json.dumps(ALPACA.format(instruction=QUESTION))
        lines += [f"prompt = {prompt}", 'inputs = tokenizer(prompt, return_tensors="pt")']
    lines += [
        "ids, mask = inputs.input_ids, inputs.attention_mask",
        f"answer = model.generate(ids, attention_mask=mask, max_new_tokens=64{stop})",
        "print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
    ]
    return [Heading(2, "Use"), Text("\n".join(["```python", *lines, "```"]))]


def _figures(facts: Facts) -> list[Block]:
    found = card_figures.blocks(facts.node, facts.evaluations)
    return [Heading(2, "Evaluation"), *found] if found else []


def _making(facts: Facts) -> list[Block]:
    blocks: list[Block] = [Heading(2, "How it was made")]
    rows = [
        [f"`{n.name}`", _origin(facts, n), short(facts.graph.sizes[n.name]), str(facts.graph.layers[n.name])]
        for n in facts.starts
    ]
    blocks.append(Table(["model", "what it began as", "parameters", "layers"], rows, left=2))
    for node in _trained(facts):
        blocks += [Heading(3, _trained_title(node)), Items([_phase(p) for p in node.phases]), Text(_cost(facts, node))]
    return [*blocks, Heading(3, "Data and versions"), Items(_data_and_versions(facts))]


def _trained(facts: Facts) -> list[Node]:
    """What was trained, in order: the models that were prepared, the hops."""
    return [*(n for n in facts.starts if n.phases), *facts.hops]


def _trained_title(node: Node) -> str:
    if node.teacher is None:
        return f"`{node.name}` prepared"
    return f"`{_path(node)}`, against `{node.teacher.name}` in {node.teacher.config.precision}"


def _origin(facts: Facts, node: Node) -> str:
    """What a model was before any hop."""
    source = f"`{node.start.name}`" if node.start else _shown(facts, node.name)
    if node.config.layers is None:
        return source
    kept = _kept(node)
    return f"layers {', '.join(map(str, kept))} of {source}" if kept else f"cut from {source}"


def _kept(node: Node) -> list[int]:
    """The layers that a cut kept, counted from 0; [] where it does not say."""
    for name in ("model", "cut"):
        try:
            path = node.directory / name / "layers.json"
            kept: list[int] = read_record(Cut, path)["kept"]
            return kept
        except FileNotFoundError:
            continue
    return []


def _phase(phase: Phase) -> str:
    values = ", ".join(f"`{key} = {_value(value)}`" for key, value in settings(phase).items())
    return f"{phase.objective}: {values}"


def settings(phase: Phase) -> dict[str, Any]:
    """A phase's main values, and those that are not what its objective has by default, under the file's names."""
    preset, fields = PRESETS.get(phase.objective, {}), type(phase).model_fields
    values = phase.model_dump(mode="json", exclude={"objective"})
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{k}": v for k, v in value.items()}
        elif value is not None and (key in MAIN or getattr(phase, key) != preset.get(key, fields[key].default)):
            found[key] = value
    return found


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _cost(facts: Facts, node: Node) -> str:
    done = facts.done[node.key]
    processes = f", {done['processes']} processes" if done.get("processes", 1) > 1 else ""
    skipped = f" ({done['skipped_steps']} skipped, not finite)" if done.get("skipped_steps") else ""
    return (
        f"{done['steps']:,} steps{skipped} on {done['tokens']:,} tokens in {duration(done['seconds'])}: "
        f"{done['hardware']}{processes}."
    )


def _data_and_versions(facts: Facts) -> list[str]:
    graph, c, trained = facts.graph, facts.graph.config, [facts.done[n.key] for n in _trained(facts)]
    rows = f"{len(graph.data.train):,} for training, {len(graph.data.validation):,} for validation"
    every = ", every assistant turn" if c.data.turns == "all" else ""
    lines = [f"Instructions: {_data(c.data.source)}; {rows}; template `{c.data.template}`{every}"]
    if trained:  # a cut alone depends on none of these
        if c.data.text:
            lines.append(f"Plain text: {escaped(card_figures.name_of(c.data.text))}, {len(graph.text):,} blocks")
        tokens, seconds = sum(d["tokens"] for d in trained), sum(d["seconds"] for d in trained)
        precision = graph.hardware.mixed_precision
        arithmetic = "fp32" if precision == "no" else precision
        lines.append(f"Together: {tokens:,} training tokens, {duration(seconds)}; arithmetic in {arithmetic}")
        lines.append(f"Seed {c.seed}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.own["versions"].items())
    return [*lines, f"Node `{facts.node.hash}`", f"Versions: {versions}"]


def _limits(facts: Facts) -> list[Block]:
    lines = ["The figures hold for the data, the protocol and the teacher they name. Other tasks were not measured."]
    if not facts.evaluations:
        lines = ["It was not evaluated."]
    if facts.hops:
        lines.insert(0, "A student takes on its teacher's faults and biases, and, being smaller, has more of its own.")
    elif not facts.node.phases:
        lines.insert(0, "Layers were taken out and nothing was trained since: this is where training begins.")
    lines.append("Nobody has tested how safe or how true its answers are.")
    return [Heading(2, "Limits"), Items(lines)]


def _licence(facts: Facts) -> list[Block]:
    lines = []
    for name, found in facts.licences.items():
        said = f"{escaped(found.shown)} ({escaped(found.where)})" if found else "not known; its folder does not say"
        lines.append(f"{_shown(facts, name)}: {said}")
    return [Heading(2, "Licence"), Text("Of the models that this one comes from:"), Items(lines)]


# -- names ----------------------------------------------------------------------------------------


def _path(node: Node) -> str:
    return " > ".join(node.key.split(">"))


def _shown(facts: Facts, name: str) -> str:
    """A source model: a link to the hub, or a file's or folder's name without the machine's path to it."""
    source, revision = facts.source(name), facts.graph.config.models[name].revision
    hub = hub_id(source)
    if hub is None:
        return escaped(card_figures.name_of(source))
    link = f"[{hub}](https://huggingface.co/{hub})" + (f", revision {escaped(revision)}" if revision else "")
    return f"{link}, from {KNOWN[source].requirement}" if source in KNOWN else link


def _data(source: str) -> str:
    hub = card_figures.dataset_id(source)
    return f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else escaped(card_figures.name_of(source))
