"""What was run, in words: models, phases, data, protocol, machine, versions, from a run's stored files.

blocks = record(stored)
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mskd.report.document import Attachment, Block, Items, escaped
from mskd.report.results import Stored, shown


def record(stored: Stored) -> list[Block]:
    """The list of all that determined the run, and config.toml."""
    config, text = stored.config()
    lines = [f"Model `{name}`: {_model(values)}" for name, values in config.get("models", {}).items()]
    lines += [f"Phase {i}: {_phase(phase)}" for i, phase in enumerate(config.get("phases", []), 1)]
    lines += [f"Hop `{shown(hop)}` differs: {_items(values)}" for hop, values in config.get("hop", {}).items()]
    lines += [*_data(stored, config), f"Evaluation: {protocol(stored)}", *_seeds(stored, config)]
    hardware, versions = (stored.index.get(k) or {} for k in ("hardware", "versions"))
    lines += [f"Machine: {_machine(hardware)}"] if hardware else []
    lines += [f"Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}"] if versions else []
    lines.append(f"Date: {stored.index.get('date') or _date(stored.directory / 'index.json')}")
    return [Items(lines), *([Attachment("config.toml", text)] if text else [])]


def _data(stored: Stored, config: Mapping[str, Any]) -> list[str]:
    data = stored.index.get("data") or {}
    source = data.get("source") or config.get("data", {}).get("source")
    sizes = ", ".join(f"{data[k]} {k} items" for k in ("train", "test") if k in data)
    return [f"Data: {escaped(str(source))}{f' ({sizes})' if sizes else ''}"] if source else []


def _seeds(stored: Stored, config: Mapping[str, Any]) -> list[str]:
    if len(stored.seeds) > 1:
        return [f"Seeds: {', '.join(map(str, stored.seeds))}"]
    return [f"Seed: {config['seed']}"] if "seed" in config else []


def _machine(hardware: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in hardware.items() if k not in ("name", "memory_bytes", "reasons") and str(v) != "None"}
    memory = str(hardware.get("memory_bytes"))
    parts = [escaped(str(hardware["name"]))] if "name" in hardware else []
    parts += [f"{int(memory) / 2**30:.0f} GiB"] if memory.isdigit() else []
    return ", ".join([*parts, _items(kept)])


def _model(values: Mapping[str, Any]) -> str:
    origin = f"from {escaped(str(values.get('source') or values.get('from')))}"
    layers = f", {values['layers']} layers" if values.get("layers") else ""
    prepared = "".join(f", prepared by {_phase(phase)}" for phase in values.get("prepare", []))
    return f"{origin}{layers}, {values.get('precision', 'int8')} as a teacher{prepared}"


def _phase(phase: Mapping[str, Any]) -> str:
    shape = ("steps", "epochs", "batch_size", "lr", "temperature", "kd_ratio")
    sampling = ("rollouts", "max_new_tokens", "mix_alpha", "ppo_epochs", "clip", "gamma", "include_current", "whiten")
    loss = ("weight_single_step", "clip_weighted_ratio", "lm_weight")
    return f"{phase.get('objective')} ({_items({k: phase[k] for k in (*shape, *sampling, *loss) if k in phase})})"


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {escaped(str(v).lower() if isinstance(v, bool) else str(v))}" for k, v in values.items())


def _date(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d}"


def protocol(stored: Stored) -> str:
    """The evaluation protocol in words."""
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
