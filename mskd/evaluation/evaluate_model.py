"""One model by itself, outside a run: what `mskd evaluate` does.

found = evaluate_model("out/hops/student-from-teacher-0f/model", settings, data=["dolly.jsonl", "vicuna.jsonl"],
                       tasks=["hellaswag"], teacher="smollm2-135m")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mskd import models
from mskd.config import ConfigError, DataConfig, EvaluateConfig
from mskd.config.hardware import check_backend, detect
from mskd.data.instructions import Example, end_token_id, load_data, load_items
from mskd.evaluation import evaluate, zero_shot
from mskd.evaluation.columns import COLUMNS, DASH, figure
from mskd.evaluation.statistics import summarize
from mskd.models.folder.declared import answer_ends
from mskd.store.files import output_folder
from mskd.store.hashes import digest, weights_digest
from mskd.store.progress import ticker

Items = tuple[Sequence[Example], str]  # with their fingerprint


def evaluate_model(
    model: str,
    settings: EvaluateConfig,
    *,
    data: Sequence[str] = (),
    tasks: Sequence[str] = (),
    teacher: str | None = None,
    out: str | Path = "out",
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate one model on data sets: all rows of each, or where data.test is a number that many drawn ones.

    model, teacher: hub id, folder, GGUF file or known name. data: files or hub ids, by default settings.data.source;
    none where only tasks are named. tasks: lm-eval's zero-shot tasks (`zero_shot.load_tasks`).
    All are read before a model is loaded. What was evaluated before under `out`, by the same weights, items, protocol
    and teacher, is taken from there. Returns model, protocol, and under `data` for every set its file and the figures
    of `statistics.summarize`; under `tasks`, where some are named, what `zero_shot.run_tasks` gives. Raises ConfigError
    for anything the user can mend.
    """
    hardware = detect(settings.run.device, "auto", settings.run.attention)
    check_backend(settings.run.backend, hardware.device)
    out = output_folder(out)
    asked = zero_shot.load_tasks(tasks) if tasks else None
    default = [] if tasks and "source" not in settings.data.model_fields_set else [settings.data.source]
    sources = list(dict.fromkeys([*(data or default), *settings.evaluation.data]))
    if teacher is not None and not sources:
        raise ConfigError("a teacher is compared with on data sets, tasks have no use for it; give --data too")
    if len(sources) > 1 and isinstance(settings.data.test, str):
        raise ConfigError(
            f"data.test is a file, and {len(sources)} data sets are given; name it as one of them instead"
        )
    folder = models.resolve_source(model)
    tokenizer = models.load_tokenizer(folder)
    sets = {s: _items(settings.data.model_copy(update={"source": s}), settings, tokenizer) for s in sources}
    rows = {model: models.size_of(folder).vocabulary}
    for source, (items, _) in sets.items():
        ids = ((*e.prompt_ids, *e.response_ids) for e in items)
        models.check_ids(tokenizer, ids, rows, f"{source}: a row")
    judges: dict[str, models.Teacher] = {}
    hashes: dict[str, str] = {}
    if teacher is not None:
        above = models.resolve_source(teacher)
        models.check_same_tokenizer(models.load_tokenizer(above), tokenizer, teacher, model)
        judges = {Path(teacher).name: models.load_teacher(above, settings.precision, hardware)}
        hashes = {Path(teacher).name: digest([models.content_hash(above), settings.precision])}
    loaded = models.load_model(folder, device=hardware.device, attention=hardware.attention)
    echo(f"{model}: {models.num_parameters(loaded):,} parameters on {hardware.name}")
    directory = out / "evals" / weights_digest(folder)[:16]
    ends = answer_ends(end_token_id(tokenizer, settings.data.template), [folder], len(tokenizer))
    found: dict[str, Any] = {}
    for source, (items, fingerprint) in sets.items():
        path = directory / evaluate.file_name(Path(source).stem, fingerprint, settings.evaluation, hashes, ends)
        if path.exists():
            echo(f"{source}: evaluated before, {path}")
        else:
            told: dict[str, Any] = {"eos_id": ends, "tick": ticker(source)}
            evaluate.evaluate(loaded, tokenizer, items, settings.evaluation, out=path, teachers=judges, **told)
        figures = summarize(path)
        echo(_line(source, figures, next(iter(judges), None)))
        found[source] = {"file": str(path), **figures}
    result: dict[str, Any] = {"model": model, "protocol": settings.evaluation.protocol, "data": found}
    if asked is not None:
        result["tasks"] = zero_shot.run_tasks(loaded, tokenizer, asked, settings.evaluation, directory)
        for name, figures in result["tasks"]["tasks"].items():
            echo(zero_shot.describe(name, figures))
    return result


def _items(data: DataConfig, settings: EvaluateConfig, tokenizer: Any) -> Items:
    if data.test is None:
        return load_items(data, tokenizer, "data")
    splits = load_data(data, tokenizer, seed=settings.seed, need_responses=False)
    return splits.test, splits.fingerprint


def _line(source: str, figures: Mapping[str, Any], teacher: str | None) -> str:
    """The figures of one data set in a line, each with its 95 % interval."""
    cells = {title: figure(figures, field, teacher, form) for title, field, _, form in COLUMNS}
    shown = ", ".join(f"{title} {cell}" for title, cell in cells.items() if cell != DASH)
    lacks = "" if figures["rouge_l"] else "; it has no reference responses, which ROUGE-L and perplexity need"
    return f"{source}: {figures['items']} items: {shown}{lacks}"
