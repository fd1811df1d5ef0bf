"""One model by itself, outside a run: what `mskd evaluate` does.

figures = evaluate_model("out/hops/student-from-teacher-0f/model", settings, teacher="smollm2-135m")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mskd import checkpoint, evaluate, models
from mskd.config import EvaluateConfig
from mskd.data import end_token_id, load_data, load_items
from mskd.hardware import detect


def evaluate_model(
    model: str,
    settings: EvaluateConfig,
    *,
    teacher: str | None = None,
    out: str | Path = "out",
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate one model on all of `settings.data`, or where data.test is set on that test split; returns the figures.

    model, teacher: hub id, folder, GGUF file or known name. Raises ConfigError for anything the user can mend.
    """
    hardware = detect(settings.run.device, "auto", settings.run.attention)
    checkpoint.check_writable(Path(out))
    folder = models.resolve_source(model)
    tokenizer = models.load_tokenizer(folder)
    if settings.data.test is None:
        items, fingerprint = load_items(settings.data, tokenizer)
    else:
        data = load_data(settings.data, tokenizer, seed=settings.seed, need_responses=False)
        items, fingerprint = data.test, data.fingerprint
    judges, hashes = {}, {}
    if teacher is not None:
        above = models.resolve_source(teacher)
        models.check_same_tokenizer(models.load_tokenizer(above), tokenizer, teacher, model)
        name = Path(teacher).name
        judges[name] = models.load_teacher(above, settings.precision, hardware)
        hashes[name] = checkpoint.digest([models.content_hash(above), settings.precision])
    loaded = models.load_model(folder, device=hardware.device, attention=hardware.attention)
    file = evaluate.file_name(Path(settings.data.source).stem, fingerprint, settings.evaluation, hashes)
    path = Path(out) / "evals" / checkpoint.weights_digest(folder)[:16] / file
    echo(f"{model}: {models.num_parameters(loaded):,} parameters, {len(items)} items on {hardware.name}")
    eos = end_token_id(tokenizer, settings.data.template)
    figures = evaluate.evaluate(loaded, tokenizer, items, settings.evaluation, out=path, teachers=judges, eos_id=eos)
    return {"model": model, "file": str(path), "protocol": settings.evaluation.protocol, **figures}
