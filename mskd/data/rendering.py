"""Chat templates are programs: they are run in a process of their own, which bounds their time and memory.

    texts = render(template, [(messages, tools, True), ...], context={"eos_token": "</s>"}, date="2026-11-25")

The process starts with the first template and serves all later ones. What it runs is transformers' own renderer.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mskd.config import ConfigError
from mskd.data import render_process

SECONDS = 5.0  # for one conversation; an ordinary one takes well under a millisecond
CHUNK = 256  # conversations of a request
Job = tuple[Sequence[Mapping[str, Any]], Sequence[Any] | None, bool]  # messages, tools, add_generation_prompt

_lock = threading.Lock()
_processes: list[subprocess.Popen[str]] = []  # one at most


class TemplateError(Exception):
    """What a template says of a conversation that it refuses, in one line."""


def render(template: str, jobs: Sequence[Job], *, context: Mapping[str, Any], date: str) -> list[str | TemplateError]:
    """What a template makes of each conversation, or why it refuses it.

    context: further variables of the template; date: what strftime_now tells, YYYY-MM-DD. Raises ConfigError where the
    template does not end, or its output does not.
    """
    found: list[str | TemplateError] = []
    with _lock:
        for start in range(0, len(jobs), CHUNK):
            part = jobs[start : start + CHUNK]
            process = _process()
            assert process.stdin and process.stdout
            request = {"template": template, "context": dict(context), "date": date, "seconds": SECONDS, "jobs": part}
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it ended: there is no answer either
            for _ in part:
                found.append(_result(process.stdout.readline()))
    return found


def _result(line: str) -> str | TemplateError:
    if not line:
        _stop()
        raise ConfigError(
            f"the tokenizer's chat template did not end within {SECONDS:g} s for one conversation; "
            "it loops, or cannot be run here"
        )
    answer = json.loads(line)
    if "fatal" in answer:
        _stop()
        raise ConfigError(f"the tokenizer's chat template cannot be used: {answer['fatal']}")
    return answer["text"] if "text" in answer else TemplateError(answer["error"])


def _process() -> subprocess.Popen[str]:
    if _processes and _processes[0].poll() is None:
        return _processes[0]
    _processes.clear()
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(render_process.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, **quiet},
        start_new_session=True,  # Ctrl-C is for us
    )
    _processes.append(process)
    assert process.stdout
    if not process.stdout.readline():
        _stop()
        raise ConfigError(
            f"the process that renders chat templates does not start: {sys.executable} {render_process.__file__}"
        )
    return process


@atexit.register
def _stop() -> None:
    for process in _processes:
        process.kill()
        process.communicate()
    _processes.clear()
