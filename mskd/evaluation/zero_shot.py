"""Zero-shot tasks (reasoning, knowledge) through EleutherAI's lm-eval, the extra `eval`.

    tasks = load_tasks(["hellaswag,piqa", "my-task.yaml"])       # before any model is loaded
    found = run_tasks(model, tokenizer, tasks, config.evaluation, Path("out/evals/0f3c..."))
    found["tasks"]["hellaswag"]                                  # acc, acc_stderr, acc_norm, ..., items, version

lm-eval asks, scores and averages: the figures are those of its own command with `--num_fewshot 0` and
`--model_args pretrained=FOLDER,dtype=float32`. mskd hands it the model and keeps what it finds.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mskd.config import ConfigError, EvalConfig
from mskd.store.files import write_json
from mskd.store.hashes import digest
from mskd.store.reading import sealed
from mskd.store.records import Asked, read_record

SEED, NUMPY_SEED, TORCH_SEED, FEWSHOT_SEED = 0, 1234, 1234, 1234  # the defaults of lm-eval's command line
LOCATION = {"dataset_path", "dataset_name", "dataset_kwargs"}  # where a task's data are, not what they are
REFUSED = {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "asks about images or sound"}


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval by name, their data read; groups (mmlu) average over some of them."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    def file_name(self, limit: int | None) -> str:
        """tasks-<8 hex digits>.json; the digits cover lm-eval's version, the tasks, their items and the limit."""
        asked = []
        for name, task in sorted(self.tasks.items()):
            config = {key: value for key, value in task.dump_config().items() if key not in LOCATION}
            asked.append([name, task.VERSION, config, list(task.eval_docs)])
        text = json.dumps([_lm_eval().__version__, sorted(self.groups), asked, limit], sort_keys=True, default=str)
        return f"tasks-{digest(re.sub(r' at 0x[0-9a-f]+', '', text))[:8]}.json"  # without addresses of functions


def load_tasks(given: Sequence[str]) -> Tasks:
    """Read tasks and their data. given: names of lm-eval's tasks, groups and tags, or task files (.yaml); commas part.

    Tasks are asked zero-shot, whatever their default. A task file may call functions of Python files beside it; nothing
    else runs code that does not come with lm-eval. Raises ConfigError: lm-eval missing, no such task, a task file that
    is damaged, data that cannot be had, a task that runs generated code or needs more than text.
    """
    names = list(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("--tasks names no task; give a name such as hellaswag, or a .yaml file")
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    lm_eval = _lm_eval()  # before _silent: the libraries set their loggers' levels when they are imported
    with _aside(), _silent():
        manager = lm_eval.tasks.TaskManager(include_defaults=not all(map(_is_file, names)))  # takes seconds
        for name in names:
            found = _load(manager, name)
            for task in tasks.keys() & found["tasks"].keys():
                raise ConfigError(f"the task {task!r} is in {name!r} and in another of the tasks given; name it once")
            tasks |= found["tasks"]
            groups |= found["groups"]
    for name, task in tasks.items():
        _prepare(name, task)
    return Tasks(tasks, groups)


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks, config: EvalConfig, folder: Path) -> dict[str, Any]:
    """Ask a loaded causal language model; figures stay in `folder`/tasks-<8 hex digits>.json and are taken from there.

    Returns file, lm_eval (its version), num_fewshot, limit and, under `tasks`, for every task and every group that has
    an average its metrics and their standard errors as lm-eval names them (acc, acc_stderr; "exact_match,strict" where
    a filter has a name; None where it gives none), items and version. The file has also `lines`: for every task one an
    item with the item's values, for `mskd.evaluation.statistics.item_values`.
    One forward takes config.batch_size sequences; config.limit: items of each task at most. Random states and the
    model's mode are afterwards as they were. Raises ConfigError where a task fails, FloatingPointError where the
    model's output is not a number, OSError where the file cannot be written.
    """
    with _aside():  # items are made by functions of the tasks
        path = folder / tasks.file_name(config.limit)
    if not path.exists():
        results = _evaluate(model, tokenizer, tasks, config)
        _check_numbers(results["samples"])
        found = {
            "lm_eval": _lm_eval().__version__,
            "num_fewshot": 0,
            "limit": config.limit,
            "tasks": _figures(results),
            "lines": {name: _lines(samples) for name, samples in results["samples"].items()},
        }
        write_json(path, sealed(found))
    return {"file": str(path), **_read(path)}


def describe(name: str, figures: Mapping[str, Any]) -> str:
    """One task's figures in a line, with their standard errors."""
    shown = []
    for metric, value in figures.items():
        plain, comma, filter_ = metric.partition(",")
        error = figures.get(f"{plain}_stderr{comma}{filter_}")
        if metric not in ("items", "version") and not plain.endswith("_stderr"):
            shown.append(f"{metric} {value}" if value is None else f"{metric} {value:.4g}")
            shown[-1] += "" if error is None else f" ± {error:.2g}"
    return f"{name}: {figures['items']} items: {', '.join(shown)}"


def _lm_eval() -> Any:
    """lm-eval, imported nowhere else. Raises ConfigError where it is missing."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as e:
        raise ConfigError(f"--tasks needs lm-eval, which cannot be imported ({e}); pip install 'mskd[eval]'") from None
    return lm_eval


# -- tasks ----------------------------------------------------------------------------------------


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _check_file(name: str) -> None:
    """Raise ConfigError for a task file that cannot be read or, as lm-eval cannot do it, holds a group."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the task file {name!r}: {getattr(e, 'strerror', None) or e}") from None
    if re.search(r"^group\s*:", text, re.MULTILINE):
        raise ConfigError(f"the file {name!r} holds a group of tasks; give the files of its tasks")


def _load(manager: Any, name: str) -> Any:
    """What lm-eval's TaskManager makes of one name. Raises ConfigError."""
    if _is_file(name):
        _check_file(name)
    elif name not in manager.all_tasks:
        near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=4))
        hint = f"; close to it: {near}" if near else ""
        raise ConfigError(f"lm-eval has no task {name!r}{hint}; `lm-eval ls tasks` lists all; a file ends in .yaml")
    try:
        return manager.load([name])
    except ConnectionError as e:
        raise ConfigError(
            f"the data of the task {name!r} cannot be had: {_said(e)}; load it once where there is a network (it stays "
            "in the cache), or write a task file over a local one (docs/evaluation.md)"
        ) from None
    except Exception as e:  # whatever YAML, templates, functions and data sets of others may raise
        raise ConfigError(
            f"the task {name!r} cannot be loaded: {type(e).__name__}: {_said(e)}; docs/evaluation.md has a task file"
        ) from None


def _prepare(name: str, task: Any) -> None:
    """Ask a task zero-shot, as `--num_fewshot 0` does. Raises ConfigError for one that mskd does not run."""
    for what, why in REFUSED.items():
        if getattr(task, what, False):
            raise ConfigError(f"the task {name!r} {why}, which mskd does not do; take lm-eval's own command")
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _said(error: BaseException) -> str:
    """All of an error's message in one line: YAML's errors say in the second line where they are."""
    return " ".join(str(error).split())[:300]


# -- figures --------------------------------------------------------------------------------------


def _evaluate(model: Any, tokenizer: Any, tasks: Tasks, config: EvalConfig) -> Any:
    """lm-eval's results, samples included. Raises ConfigError where a task, most likely its file, fails."""
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    with _aside(devices):
        random.seed(SEED)
        np.random.seed(NUMPY_SEED)
        torch.manual_seed(TORCH_SEED)
        try:
            with _silent():  # it says that a loaded model is a loaded model
                lm = _lm_eval().models.huggingface.HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size
                )
            return _lm_eval().evaluate(
                lm, {"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)}, limit=config.limit
            )
        except OverflowError as e:
            raise FloatingPointError(f"a perplexity is too large for a number ({e}); the model has diverged") from None
        except (LookupError, TypeError, ValueError) as e:
            names = ", ".join(tasks.tasks)
            raise ConfigError(f"lm-eval fails on a task ({names}): {type(e).__name__}: {_said(e)}") from None
        finally:
            model.train(training)


def _check_numbers(samples: Mapping[str, Any]) -> None:
    """Raise FloatingPointError where a log-likelihood is NaN: lm-eval would count the first choice as chosen."""
    for task, lines in samples.items():
        for line in lines:
            for request in line["resps"]:
                for answer in request:
                    value = answer[0] if isinstance(answer, tuple | list) else answer
                    if isinstance(value, float) and math.isnan(value):
                        raise FloatingPointError(f"{task}, item {line['doc_id']}: a log-likelihood is not a number")


def _figures(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, given in results["results"].items():
        metrics = {_metric(*key.split(",", 1)): _number(value) for key, value in given.items() if "," in key}
        if metrics:
            found[name] = metrics | {"items": given["sample_len"], "version": results["versions"].get(name)}
    return found


def _lines(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line an item: its values of all metrics; where a metric is no mean, what it is made of."""
    lines: dict[int, dict[str, Any]] = {}
    for sample in samples:
        line = lines.setdefault(sample["doc_id"], {"item": sample["doc_id"]})
        line |= {_metric(name, sample["filter"]): _plain(sample[name]) for name in sample["metrics"]}
    return list(lines.values())


def _metric(name: str, filter_: str) -> str:
    return name if filter_ == "none" else f"{name},{filter_}"


def _number(value: Any) -> float | None:
    """A figure; None where lm-eval has none ("N/A", or no number)."""
    return float(value) if not isinstance(value, str) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, bool | int | float | np.number | np.bool_) else value


def _read(path: Path) -> dict[str, Any]:
    """A file of `run_tasks`, without its lines. Raises Damaged where it is not what was written."""
    found = read_record(Asked, path)
    del found["lines"]
    return found


# -- state that must be as it was -----------------------------------------------------------------


@contextlib.contextmanager
def _aside(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """What is printed goes to stderr, as our last line is JSON; random states are afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No warnings of lm-eval and of those who fetch its data: defaults it chooses, attempts to reach the hub."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
