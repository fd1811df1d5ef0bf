"""A run: configuration -> nodes in order -> models on disk, evaluations, report.

A node is one model to prepare or one hop to train. Its hash covers all that determines it, so nodes are shared
between paths and between runs under one OUT, and a node that is done is never run twice:

    run = distill(load("demo"), out="demo-out")
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mskd import models
from mskd.config import Config, ConfigError, RunConfig, parse
from mskd.config.hardware import Hardware, detect, keep_freed_memory
from mskd.config.phases import MinillmPhase
from mskd.config.versions import versions
from mskd.evaluation import evaluate
from mskd.evaluation.statistics import read_evaluation
from mskd.models import Teacher, prune
from mskd.models.batch import SequenceBatch
from mskd.models.folder.stored import DTYPES, exact_dtype, stored_dtype
from mskd.run import card, card_figures
from mskd.run.first_start import keep_date, with_date
from mskd.run.nodes import Graph, Items, Node
from mskd.run.stop import Stop
from mskd.run.sweep import Cell, cells, check_size, is_sweep
from mskd.sampling.rollout import Interrupted
from mskd.store.done import changed_since, digests, is_whole, read_done, write_done
from mskd.store.files import new_folder, output_folder, write_json
from mskd.store.hashes import digest, stream_seed, weights_digest
from mskd.store.locks import lock
from mskd.store.progress import Tick, ticker
from mskd.store.reading import sealed
from mskd.store.run_config import read_config, write_config
from mskd.training import hop
from mskd.training.job import Job
from mskd.training.tracking import check_trackers
from mskd.training.work.data_parallel import chunks

SAMPLE_ROWS = 32  # training rows on which block influence is measured


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the student of every path, and the report's figures.

    students: by 'teacher > ... > student'; in a sweep with the cell behind it: 'teacher > student (seed 1)'.
    """

    directory: Path
    students: dict[str, Path]
    summary: dict[str, Any]


def distill(
    config: Config | dict[str, Any],
    out: str | Path = "out",
    *,
    yes: bool = False,
    stop: Stop | None = None,
    echo: Callable[[str], None] = print,
) -> Run:
    """Run a configuration to its end under the folder `out`, going on where an earlier run of it was stopped.

    With several seeds or a grid, every cell in turn (mskd.run.sweep); yes: however many hops there are to train, and
    however few rows of the data can be used.
    Raises ConfigError for anything the user can mend, Interrupted (state saved) after Ctrl-C or SIGTERM.
    """
    config = config if isinstance(config, Config) else parse(config)
    check_size(config, yes)
    with (stop or Stop()).listening() as listening:
        try:
            return Sweep(config, out, listening, echo, yes).run()
        except Interrupted:
            raise Interrupted(listening.signal) from None


@dataclass(frozen=True)
class Workplace:
    """What all cells of a run share."""

    out: Path
    stop: Stop
    hardware: Hardware
    accelerator: Any
    echo: Callable[[str], None]  # says nothing but in the main process
    loaded: dict[tuple[str, str], Teacher] = dataclasses.field(default_factory=dict)  # by key and hash of their nodes

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Hold a folder for this run; only the main process does."""
        with lock(folder) if self.main else contextlib.nullcontext():
            yield


class Sweep:
    """A run: the cells that its configuration stands for, mostly one, carried out in order, with one index and report.

    Every cell's graph is made, and so checked, before anything is trained.
    """

    def __init__(self, config: Config, out: str | Path, stop: Stop, echo: Callable[[str], None], yes: bool) -> None:
        check_trackers(config.run.trackers)
        hardware = detect(config.run.device, config.train.precision, config.run.attention)
        if hardware.device.type == "cpu":
            keep_freed_memory()
        out = output_folder(out)
        self.directory = out / "runs" / config.name
        accelerator = make_accelerator(hardware)
        said = echo if accelerator.is_main_process else lambda line: None
        self.place = Workplace(out, stop, hardware, accelerator, said)
        self.config = config = agreed(accelerator, keep_date(config, self.directory / "config.toml"))
        self.chains: list[Chain] = []
        with accelerator.main_process_first():  # the first one fills the caches
            for cell in cells(config):
                before = self.chains[-1].graph if self.chains else None
                graph = Graph(cell.config, out, hardware, said, before)
                if before is None or graph.data is not before.data:
                    for line in graph.counts.lines():
                        said(line)
                    graph.counts.check_half(yes)
                self.chains.append(Chain(cell, graph, self.place))

    def run(self) -> Run:
        """Carry out every node that is not done, evaluate, report."""
        from mskd.report import report

        summary: dict[str, Any] = {}
        with self.place.locked(self.directory):
            self._write_config()
            for i, chain in enumerate(self.chains):
                if is_sweep(self.config):
                    self.place.echo(f"run {i + 1} of {len(self.chains)}: {chain.cell.label}")
                chain.run(self._write_index)
                if self.place.main:
                    self.place.echo(f"report: {report.write_report(self.directory)}")
            if self.place.main:
                summary = report.summary(self.directory)
        return Run(self.directory, self._students(), summary)

    def _students(self) -> dict[str, Path]:
        found = {}
        for chain in self.chains:
            label = f" ({chain.cell.label})" if is_sweep(self.config) else ""
            for path in chain.config.chain.paths:
                found[" > ".join(path) + label] = chain.nodes[">".join(path)].folder
        return found

    def _write_config(self) -> None:
        path = self.directory / "config.toml"
        if not self.place.main:
            return
        if os.path.lexists(path):
            same = {"run": RunConfig()}
            old, _ = read_config(path)
            old = with_date(old, old.data.date or self.config.data.date)  # a run of before it was kept
            if old.model_copy(update=same) != self.config.model_copy(update=same):
                raise ConfigError(
                    f"{self.directory} holds a run with another configuration; give this one a name of its own "
                    f"(--set name=...) or another --out; models that both need are shared"
                )
        where = self.place.hardware.name
        header = f"mskd {versions()['mskd']}, {where}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n{versions()}"
        write_config(path, self.config, header)

    def _write_index(self) -> None:
        """index.json: the first cell's entry, those of all cells begun where it is a sweep, and where it ran."""
        if not self.place.main:
            return
        entries = [chain.entry() for chain in self.chains if chain.done]
        first = {k: v for k, v in entries[0].items() if k not in ("seed", "grid", "label")}
        every = {"cells": entries} if is_sweep(self.config) else {}
        where = {k: str(v) for k, v in dataclasses.asdict(self.place.hardware).items()}
        index = {"name": self.config.name, **first, **every, "hardware": where, "versions": versions()}
        write_json(self.directory / "index.json", sealed(index | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}))


class Chain:
    """One cell: carries out the nodes of its graph that are not done, and evaluates each at once."""

    def __init__(self, cell: Cell, graph: Graph, place: Workplace) -> None:
        self.cell, self.config, self.graph, self.place = cell, cell.config, graph, place
        self.out, self.stop, self.hardware = place.out, place.stop, place.hardware
        self.accelerator, self.main, self.echo = place.accelerator, place.main, place.echo
        self.nodes, self.tokenizer, self.data = graph.nodes, graph.tokenizer, graph.data
        self.done: dict[str, dict[str, Any]] = {}  # done.json of every node so far
        self.evals: list[dict[str, Any]] = []
        self._check_processes()

    def _check_processes(self) -> None:
        """Every process needs a sequence of each optimizer batch, and of a rollout's batch the same share."""
        world = self.accelerator.num_processes
        for phase in (p for node in self.graph.nodes.values() for p in node.phases):
            even = phase.batch_size % world == 0
            if phase.batch_size < world or (isinstance(phase, MinillmPhase) and not even):
                raise ConfigError(
                    f"batch_size of the {phase.objective} phase is {phase.batch_size}; "
                    f"with {world} processes it must be a multiple of {world}"
                )

    # -- running -----------------------------------------------------------------------------------

    def run(self, progress: Callable[[], None]) -> None:
        """Carry out every node that is not done, evaluate it; `progress` is called after each."""
        for node in self.nodes.values():
            self.stop.check()
            self.done[node.key] = self._ensure(node)
            if not (node.folder / "README.md").exists():
                self._write_card(node)  # a run that is stopped while it evaluates leaves no model without one
            self.evals += self._evaluate(node)
            self._write_card(node)
            progress()

    def _ensure(self, node: Node) -> dict[str, Any]:
        """done.json of a node, after making the node if need be."""
        with self.place.locked(node.directory):
            trained = bool(node.phases)
            done = agreed(
                self.accelerator, read_done(node.directory, node=node.hash, trained=trained) if self.main else None
            )
            if done is not None:
                self.echo(f"{node.key}: done before, {done['parameters']:,} parameters")
                for file in changed_since(node.directory, done) if self.main else ():
                    self.echo(f"{node.key}: {file} was changed after the training; nothing uses it now")
                self._remove_states(node)  # which a kill may have left
                return done
            if node.source is not None:
                done = {"weights": None, "parameters": self.graph.sizes[node.name], "source": node.config.source}
            elif node.teacher is None or node.start is None:
                done = self._make_model(node)
            else:
                done = self._train(node, node.start.folder, node.teacher)
            done |= {"key": node.key, "hash": node.hash, "versions": versions(), "hardware": self.hardware.name}
            done |= {"device": self.hardware.device.type, "processes": self.accelerator.num_processes}
            if self.main:
                write_done(node.directory, done)
            self._remove_states(node)
            self.accelerator.wait_for_everyone()
            return done

    def _remove_states(self, node: Node) -> None:
        if self.main:
            shutil.rmtree(node.directory / "state", ignore_errors=True)

    def _make_model(self, node: Node) -> dict[str, Any]:
        """Cut a model by block influence if it is to have fewer layers, then its own phases."""
        folder = node.start.folder if node.start else self.graph.folders[node.name]
        done: dict[str, Any] = {}
        cut = node.directory / ("cut" if node.phases else "model")
        if node.config.layers is not None and self.main and not is_whole(cut, "layers.json"):
            model = self._load(folder)
            rows = sorted(self.data.train, key=lambda e: digest(e.prompt))[:SAMPLE_ROWS]
            parts = chunks(rows, 8)
            influence = prune.block_influence(model, [self._sequences(p).to(self.hardware.device) for p in parts])
            keep = prune.choose_layers(influence, node.config.layers)
            self.echo(f"{node.key}: keeps layers {', '.join(map(str, keep))} of {len(influence)}")
            with new_folder(cut) as tmp:  # in a dtype in which not a bit changes
                dtype = exact_dtype(folder)
                models.save_model(prune.cut(model, keep), self.tokenizer, tmp, ends=self.graph.ends, dtype=dtype)
                layers = {"kept": keep, "influence": influence, "files": digests(tmp)}
                write_json(tmp / "layers.json", sealed(layers))
        self.accelerator.wait_for_everyone()
        if node.phases:
            return done | self._train(node, cut if node.config.layers is not None else folder, None)
        return {"weights": weights_digest(cut), "parameters": self.graph.sizes[node.name]}

    def _sequences(self, examples: list) -> SequenceBatch:
        return SequenceBatch.from_sequences(
            [e.prompt_ids for e in examples], [e.response_ids for e in examples], self.tokenizer.pad_token_id
        )

    def _load(self, folder: Path) -> Any:
        return models.load_model(folder, device=self.hardware.device, attention=self.hardware.attention)

    def _save_dtype(self, node: Node) -> torch.dtype | None:
        """Of a hop's student: `train.save_dtype`, else its checkpoint's. None, fp32, of a model that is prepared.

        Hops train on from a prepared model: rounded to 16 bits it would lose small updates. A hop's student is what the
        run is for; where it teaches the next hop, it teaches as it was saved and evaluated.
        """
        if node.teacher is None or node.start is None:
            return None
        asked = self.config.train.save_dtype
        return DTYPES[asked] if asked else stored_dtype(self.graph.folders[self.graph.origin(node.start.name)])

    def _train(self, node: Node, start: Path, teacher: Node | None) -> dict[str, Any]:
        shown = " then ".join(p.objective for p in node.phases)
        self.echo(f"{node.key}: {shown}" + (f" against {teacher.name} ({teacher.config.precision})" if teacher else ""))
        job = Job(
            name=node.key,
            directory=node.directory,
            seed=stream_seed(self.config.seed, node.hash),
            phases=node.phases,
            student=self._load(start),
            tokenizer=self.tokenizer,
            ends=self.graph.ends,
            teacher=self._teacher(teacher) if teacher else None,
            data=self.data,
            text=self.graph.text,
            config=self.config,
            hardware=self.hardware,
            accelerator=self.accelerator,
            save_dtype=self._save_dtype(node),
            stop=self.stop,
            validate_rollouts=self._validator(node, teacher) if teacher else None,
        )
        try:
            self.stop.polled = True
            return hop.train(job)
        finally:
            self.stop.polled = False
            self.accelerator.free_memory()

    def _write_card(self, node: Node) -> None:
        """The card of a finished node, with the figures there are of it by now."""
        if self.main:
            card_figures.record(node, self.graph, self.evals, self.echo)
            card.write(node, self.graph, self.done, self.echo)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, node: Node) -> list[dict[str, Any]]:
        """Evaluate what was not evaluated before, each stage of a node and on further data its last one.

        Returns the entries of the run's index.
        """
        own: Items = (self.data.test, self.data.fingerprint)
        entries = [self._evaluated(node, stage, folder, own) for stage, folder in node.stages() if self.data.test]
        stage, folder = node.stages()[-1]
        for source, items in self.graph.tests.items():
            entries.append(self._evaluated(node, stage, folder, items, source) | {"data": source})
        self.accelerator.wait_for_everyone()
        return entries

    def _evaluated(
        self, node: Node, stage: str, folder: Path, items: Items, source: str | None = None
    ) -> dict[str, Any]:
        """The entry of one model's evaluation on the run's own test items or those of `source`, made if need be."""
        judges = self._judges(node)
        hashes = {t.name: digest([t.hash, t.config.precision]) for t in judges}
        data = Path(source or self.config.data.source).stem
        name = evaluate.file_name(data, items[1], self.config.evaluation, hashes, self.graph.ends)
        file = Path("evals") / weights_digest(folder)[:16] / name
        if self.main and not (self.out / file).exists():
            self.stop.check()
            self.echo(f"{node.key}: evaluating {stage}{f' on {source}' if source else ''}")
            teachers = {n.name: self._teacher(n) for n in judges}
            model = teachers[node.name].model if node.name in teachers else self._load(folder)
            self._run_evaluation(model, items[0], self.out / file, teachers, ticker(f"{node.key}: evaluating {stage}"))
        entry = {"node": node.key, "stage": stage, "file": file.as_posix(), "label": f"{node.key} {stage}"}
        return entry | ({"digest": read_evaluation(self.out / file)[1]} if self.main else {})

    def _run_evaluation(
        self, model: Any, items: Any, out: Path, teachers: dict[str, Teacher], tick: Tick = lambda done, all_: None
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"teachers": teachers, "eos_id": self.graph.ends, "tick": tick}
        with contextlib.ExitStack() as stack:
            for teacher in teachers.values():
                stack.enter_context(teacher.on_device())
            return evaluate.evaluate(model, self.tokenizer, items, self.config.evaluation, out=out, **told)

    def _judges(self, node: Node) -> list[Node]:
        """Whose distributions a model is compared with: the top teacher of its path and the teacher of its hop."""
        top = self.nodes[node.key.split(">")[0]] if node.teacher else self.nodes[self.config.chain.paths[0][0]]
        return [top] if node.teacher in (None, top) else [top, node.teacher]

    def _teacher(self, node: Node) -> Teacher:
        """The frozen model of a node: at most a path's top and the hop's own teacher are held at a time."""
        loaded, key = self.place.loaded, (node.key, node.hash)
        if key not in loaded:
            if len(loaded) == 2:
                del loaded[max(loaded, key=lambda k: len(k[0]))]  # the one lower in the chain; the top serves every hop
            c = node.config
            loaded[key] = models.load_teacher(
                node.folder,
                c.precision,
                self.hardware,
                offload=self.config.run.teacher_offload,
            )
        return loaded[key]

    def _validator(self, node: Node, teacher: Node) -> Callable[[Any, str], float]:
        """ROUGE-L or reverse KL of a model on the validation items: what keep_by of a minillm phase asks for."""

        def validate(model: Any, metric: str) -> float:
            judge = {teacher.name: self._teacher(teacher)} if metric == "reverse_kl" else {}
            figures = self._run_evaluation(model, self.data.validation, node.directory / "validation.jsonl", judge)
            figure = figures["reverse_kl"][teacher.name] if judge else figures["rouge_l"]
            if figure is None:
                raise ConfigError(
                    "keep_by = 'rouge_l' needs validation items with responses; use keep_by = 'reverse_kl'"
                )
            return figure["mean"]

        return validate

    def entry(self) -> dict[str, Any]:
        """What the run's index says of this cell: its seed and grid values, paths, nodes done, evaluations."""
        return {
            "seed": self.cell.seed,
            "grid": self.cell.grid,
            "label": self.cell.label,
            "paths": [list(p) for p in self.config.chain.paths],
            "nodes": {key: self._node_entry(self.nodes[key], done) for key, done in self.done.items()},
            "evals": self.evals,
            "protocol": self.config.evaluation.model_dump() | {"quick": self.config.evaluation.protocol != "released"},
            "data": {"source": self.config.data.source, "train": len(self.data.train), "test": len(self.data.test)},
        }

    def _node_entry(self, node: Node, done: dict[str, Any]) -> dict[str, Any]:
        entry = {
            "kind": node.kind,
            "name": node.name,
            "dir": str(node.directory.relative_to(self.out)),
            "hash": node.hash,
            "parameters": done["parameters"],
            "seconds": done.get("seconds", 0.0),
            "tokens": done.get("tokens", 0),
            "phases": node.phase_names,
        }
        if node.teacher and node.start:
            entry |= {"teacher": node.teacher.key, "student": node.start.key}
        return entry


def agreed(accelerator: Any, value: Any) -> Any:
    """The main process's value, in every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def make_accelerator(hardware: Hardware) -> Any:
    """The accelerator of this process: CPU or CUDA, mixed precision, a loss scale that starts at 2^11 in fp16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradScalerKwargs

    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    return Accelerator(
        cpu=hardware.device.type == "cpu",
        mixed_precision=hardware.mixed_precision,
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**11)],
    )
