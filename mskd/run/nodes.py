"""What a run consists of: every model to prepare and every hop, with the hash that says what determines it.

All that can be wrong with a configuration in the world it runs in (models, tokenizers, data, sizes) is found here,
before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mskd import models
from mskd.config import Config, ConfigError, ModelConfig
from mskd.config.hardware import Hardware, check_backend
from mskd.config.phases import Phase
from mskd.config.problems import local_path
from mskd.data.counts import Counts
from mskd.data.instructions import Example, Splits, end_token_id, further, load_items, load_text, read, split
from mskd.models.folder.declared import answer_ends, decoding_settings
from mskd.store.hashes import FORMAT, digest
from mskd.training.optim import check_optimizer

Text = tuple[tuple[int, ...], ...]  # blocks of token ids
Items = tuple[tuple[Example, ...], str]  # of a data set to evaluate on, with their fingerprint


@dataclass(frozen=True)
class Node:
    """One model to prepare or one hop. `start` is the model it begins from, `teacher` the frozen model above a hop."""

    key: str  # "student", or for a hop its path from the top: "teacher>ta>student"
    name: str
    hash: str
    directory: Path
    config: ModelConfig
    phases: tuple[Phase, ...]
    start: Node | None = None
    teacher: Node | None = None
    source: Path | None = None  # a model taken as it is: the folder it lies in

    @property
    def kind(self) -> str:
        return "hop" if self.teacher else "model"

    @property
    def folder(self) -> Path:
        """The finished model: an ordinary transformers folder."""
        return self.source or self.directory / "model"

    @property
    def phase_names(self) -> list[str]:
        """The phases by objective, with a number where one comes again: kd, sft, kd 2."""
        objectives: list[str] = [p.objective for p in self.phases]
        times = [objectives[: i + 1].count(name) for i, name in enumerate(objectives)]
        return [name if n == 1 else f"{name} {n}" for name, n in zip(objectives, times, strict=True)]

    def stages(self) -> list[tuple[str, Path]]:
        """The models along this node's training, first to last, by name."""
        if self.teacher is None:
            return [("initial", self.folder)]
        folders = [self.directory / "phases" / f"{i}-{p.objective}" for i, p in enumerate(self.phases[:-1])]
        between = [(f"after {name}", folder) for name, folder in zip(self.phase_names, folders, strict=False)]
        return [*between, ("final", self.folder)]


class Graph:
    """The nodes of a configuration by key, each after what it needs, with their tokenizer and data.

    before: another graph of the run, whose data this one takes where they are the same.
    Raises ConfigError for what the user can mend.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        hardware: Hardware,
        echo: Callable[[str], None] = print,
        before: Graph | None = None,
    ) -> None:
        self.config, self.out, self.hardware = config, out, hardware
        used = self._used()
        phases = self._phases(used)
        check_backend(config.run.backend, hardware.device)
        for phase in phases:
            check_optimizer(phase)
        for path in config.chain.paths:
            for name in path[:-1]:
                models.check_precision(config.models[name].precision, hardware)
                if config.run.teacher_offload:
                    models.check_offload(config.models[name].precision, hardware)
        self.folders: dict[str, Path] = {}
        for name in used:
            source = config.models[name].source
            if source is not None:
                if before is None and not local_path(source, f"models.{name}.source").is_dir():
                    echo(f"{name}: {source}, fetched and converted on its first use")
                self.folders[name] = models.resolve_source(source, revision=config.models[name].revision)
        self.layers: dict[str, int] = {}  # of every model, as `sizes` its parameters
        self.sources: dict[str, models.Size] = {}  # of every source, uncut
        self.sizes = self._sizes(used)
        tokenizers = self._tokenizers()
        self.tokenizer = tokenizers[self.origin(config.chain.paths[0][0])]
        trained = end_token_id(self.tokenizer, config.data.template)
        self.ends = answer_ends(trained, self.folders.values(), len(self.tokenizer))
        # A run of models that all name one end and no other has it in its tokenizer's and its data's hash already.
        self._one_end = len(self.ends) == 1 and len({t.eos_token_id for t in tokenizers.values()}) == 1
        if before is None:
            self._say_ends(tokenizers, echo)
            self._say_settings(echo)
        need_responses = any(p.needs_responses for p in phases)
        self._data_key = (config.data, config.seed if config.data.seed is None else None, need_responses, self.folders)
        same = before is not None and before._data_key == self._data_key
        self._read: tuple[Splits, Text, str] = before._read if before and same else self._read_data(need_responses)
        self.data, self.text, self.data_hash = self._read
        known = before.tests if before and same else {}
        sources = config.evaluation.data
        self.tests: dict[str, Items] = {s: known.get(s) or self._further(s, echo) for s in sources}
        self._check_positions(phases)
        self.nodes: dict[str, Node] = {}
        self._make_nodes()

    @property
    def counts(self) -> Counts:
        """What became of the rows of the data."""
        assert self.data.counts is not None
        return self.data.counts

    def _read_data(self, need_responses: bool) -> tuple[Splits, Text, str]:
        """Instruction data, plain text, and the hash of what of the data is trained on."""
        c = self.config
        reading = read(c.data.source, "data.source", c.data, self.tokenizer, need_responses)
        data = split(reading, c.data, self.tokenizer, seed=c.seed, need_responses=need_responses)
        for part in (data.train, data.validation, data.test):
            self._check_ids(part, c.data.source)
        text = load_text(c.data.text, self.tokenizer, c.data.max_tokens) if c.data.text else ()
        models.check_ids(self.tokenizer, text, self._rows(), f"{c.data.text}: a line")
        rows = [[e.prompt_ids, e.response_ids] for part in (data.train, data.validation) for e in part]
        return data, text, digest([len(data.validation), rows])  # the test split determines no weights

    def _further(self, source: str, echo: Callable[[str], None]) -> Items:
        """The items of a further data set and their fingerprint; says how many of them the students train on."""
        items, fingerprint = load_items(further(self.config.data, source), self.tokenizer, "evaluation.data")
        self._check_ids(items, source)
        trained = {e.prompt for e in self.data.train}
        seen = sum(e.prompt in trained for e in items)
        if seen:
            echo(f"{source}: {seen} of {len(items)} items have the prompt of a training row")
        return items, fingerprint

    def _check_ids(self, examples: Iterable[Example], source: str) -> None:
        ids = ((*e.prompt_ids, *e.response_ids) for e in examples)
        models.check_ids(self.tokenizer, ids, self._rows(), f"{source}: a row")

    def _rows(self) -> dict[str, int]:
        """Of the embedding of every source."""
        return {name: size.vocabulary for name, size in self.sources.items()}

    def _check_positions(self, phases: Iterable[Phase]) -> None:
        """What is read or sampled in the run stays where no model's rotary embedding depends on the batch."""
        examples = [e for part in (self.data.train, self.data.validation, self.data.test) for e in part]
        examples += [e for items, _ in self.tests.values() for e in items]
        asked = [getattr(p, "teacher_responses", None) for p in phases]
        answers = [getattr(p, "max_new_tokens", 0) for p in [*phases, *asked, self.config.evaluation]]
        prompt = max((len(e.prompt_ids) for e in examples), default=0)
        read = max([*map(len, self.text), *(len(e.prompt_ids) + len(e.response_ids) for e in examples)], default=0)
        for name, size in self.sources.items():
            models.check_positions(size.config, read, f"{name}: the longest row")
            models.check_positions(
                size.config, prompt + max(answers), f"{name}: the longest prompt with max_new_tokens"
            )

    def origin(self, name: str) -> str:
        """The source model that a model is cut from, in however many cuts; itself where it is a source."""
        while (above := self.config.models[name].from_) is not None:
            name = above
        return name

    # -- checks ------------------------------------------------------------------------------------

    def _used(self) -> list[str]:
        """Models on a path, and what they are cut from, in the order of the configuration."""
        used, queue = set(), [name for path in self.config.chain.paths for name in path]
        while queue:
            name = queue.pop()
            used.add(name)
            above = self.config.models[name].from_
            queue += [above] if above and above not in used else []
        return [name for name in self.config.models if name in used]

    def _sizes(self, used: list[str]) -> dict[str, int]:
        """Parameters of every model, counted without loading one; layers and sizes along the paths are checked."""
        sizes: dict[str, int] = {}
        for name in used:
            m, source = self.config.models[name], self.origin(name)
            size = models.size_of(self.folders[source])
            self.sources[source] = size
            has = self._layers(m.from_, size.layers) if m.from_ else size.layers
            if m.layers is not None and m.layers > has:
                raise ConfigError(
                    f"model {name!r} wants {m.layers} layers, but {m.from_ or m.source} has {has}; give at most {has}"
                )
            self.layers[name] = self._layers(name, size.layers)
            sizes[name] = size.cut_to(self.layers[name])
        for path in self.config.chain.paths:
            for above, below in zip(path, path[1:], strict=False):
                if sizes[below] > sizes[above]:
                    raise ConfigError(
                        f"{below!r} ({sizes[below]:,} parameters) is bigger than its teacher {above!r} "
                        f"({sizes[above]:,}); a path goes from big to small"
                    )
        return sizes

    def _layers(self, name: str, of_source: int) -> int:
        """Layers of a model: its own number, else that of what it is cut from, else its source's."""
        m = self.config.models[name]
        if m.layers is not None:
            return m.layers
        return self._layers(m.from_, of_source) if m.from_ else of_source

    def _tokenizers(self) -> dict[str, Any]:
        """The tokenizer of every source, all of them the same but for their end tokens."""
        first = self.config.chain.paths[0][0]
        loaded = {name: models.load_tokenizer(folder) for name, folder in self.folders.items()}
        top = loaded[self.origin(first)]
        for name, tokenizer in loaded.items():
            models.check_same_tokenizer(top, tokenizer, first, name)
        return loaded

    def _say_ends(self, tokenizers: dict[str, Any], echo: Callable[[str], None]) -> None:
        """What ends an answer, in one line, where the models do not all say the same."""

        def shown(i: int) -> str:
            return f"{self.tokenizer.convert_ids_to_tokens(i)!r} ({i})"

        trained, *others = self.ends
        own = {name: t.eos_token_id for name, t in tokenizers.items() if t.eos_token_id != trained}
        if not others and not own:
            return
        whose = "the template's end of turn" if self.config.data.template == "chat" else "the first model's"
        line = f"answers end with {shown(trained)}, {whose}"
        if own:
            line += f", in place of {', '.join(f'{shown(i)} of {name}' for name, i in own.items())}"
        if others:
            line += f"; {' and '.join(map(shown, others))}, which the models declare, may end one too"
        echo(line)

    def _say_settings(self, echo: Callable[[str], None]) -> None:
        """Which settings of `generate` a model has that those made from it do not inherit."""
        starts = {self.origin(name) for path in self.config.chain.paths for name in path[1:]}
        for name in sorted(starts):
            settings = decoding_settings(self.folders[name])
            if settings:
                listed = ", ".join(f"{key} = {value}" for key, value in settings.items())
                echo(
                    f"{name}: its generation_config.json sets {listed}; what is made from it is trained, evaluated and "
                    "saved without"
                )

    def _phases(self, used: list[str]) -> list[Phase]:
        """Every phase of the run."""
        hops = {pair for path in self.config.chain.paths for pair in zip(path, path[1:], strict=False)}
        phases = [p for a, b in hops for p in self.config.hop_phases(a, b)]
        return phases + [p for name in used for p in self.config.models[name].prepare]

    def _make_nodes(self) -> None:
        nodes = self.nodes
        for path in self.config.chain.paths:
            above = self._model_node(path[0])
            for i, name in enumerate(path[1:], 1):
                start = self._model_node(name)
                key = ">".join(path[: i + 1])
                if key not in nodes:
                    nodes[key] = self._hop_node(key, name, start, above)
                above = nodes[key]

    def _common(self) -> dict[str, Any]:
        """What the hash of every trained node covers besides its own."""
        train = self.config.train.model_dump(exclude_none=True) | {"precision": self.hardware.mixed_precision}
        return {
            "format": FORMAT,
            "seed": self.config.seed,
            "data": self.data_hash,
            "text": digest(self.text),
            "train": train,
        } | ({} if self._one_end else {"ends": self.ends})

    def _model_node(self, name: str) -> Node:
        nodes = self.nodes
        if name in nodes:
            return nodes[name]
        m = self.config.models[name]
        start = self._model_node(m.from_) if m.from_ else None
        own: dict[str, Any] = {"layers": m.layers}
        own["start"] = start.hash if start else models.content_hash(self.folders[name])
        if m.layers is not None:
            own["sample"] = self.data_hash
        if m.prepare:
            own |= {"phases": [p.identity() for p in m.prepare]} | self._common()
        value = digest(own)
        directory = self.out / "models" / f"{name}-{value[:12]}"
        plain = start is None and m.layers is None and not m.prepare
        source = self.folders[name] if plain else None
        nodes[name] = Node(name, name, value, directory, m, m.prepare, start, source=source)
        return nodes[name]

    def _hop_node(self, key: str, name: str, start: Node, teacher: Node) -> Node:
        phases = self.config.hop_phases(teacher.name, name)
        value = digest(
            self._common()
            | {"phases": [p.identity() for p in phases], "student": start.hash, "teacher": teacher.hash}
            | {"teacher_precision": teacher.config.precision, "teacher_dtype": str(self.hardware.teacher_dtype)}
        )
        directory = self.out / "hops" / f"{name}-from-{teacher.name}-{value[:12]}"
        return Node(key, name, value, directory, self.config.models[name], phases, start, teacher)
