"""The process that renders chat templates, which are programs of strangers: bounded in time and in memory.

    python -P render_process.py          # started by rendering.py; a JSON request a line, a JSON answer a line

A request: {"template", "context", "date", "seconds", "jobs": [[messages, tools, add_generation_prompt], ...]}. An
answer for each job: {"text"}, or {"error"} where the template refuses it, or {"fatal"} where nothing more can be
rendered. A template that does not end within so many seconds ends this process instead, with or without a
parent. The first line says that the process is ready.
"""

import json
import os
import resource
import signal
import sys
from datetime import datetime
from types import ModuleType
from typing import Any

MEMORY_BYTES = 2**30  # beyond what the imports take
MAX_CHARACTERS = 10_000_000  # of one conversation


def limit_memory() -> None:
    """No more than MEMORY_BYTES on top of what this process has by now."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, resource.RLIM_INFINITY))


def fix_date(chat: ModuleType, date: str) -> None:
    """Make strftime_now tell this day, at midnight. Raises RuntimeError where the renderer takes it from elsewhere."""

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.fromisoformat(date).replace(tzinfo=tz)

    chat.datetime = Fixed  # type: ignore[attr-defined]
    shown = render(chat, "{{ strftime_now('%Y-%m-%d') }}", [{"role": "user", "content": ""}], None, False, {})
    if shown != date:
        raise RuntimeError("this version of transformers takes the date of strftime_now from another place")


def render(chat: ModuleType, template: str, messages: Any, tools: Any, prompt: bool, context: dict[str, Any]) -> str:
    """What the template makes of one conversation; transformers' own renderer, as apply_chat_template calls it."""
    rendered, _ = chat.render_jinja_template(
        conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **context
    )
    return str(rendered[0])


def answer(chat: ModuleType, request: dict[str, Any], job: list[Any]) -> dict[str, str]:
    """The answer to one job, whatever the template does, unless it does not end."""
    messages, tools, prompt = job
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # its signal ends a process that does not handle it
    try:
        text = render(chat, request["template"], messages, tools, prompt, request["context"])
    except MemoryError:
        return {"fatal": f"it took over {MEMORY_BYTES // 2**20} MiB of memory for one conversation"}
    except Exception as e:  # a template raises what it likes
        return {"error": (str(e).strip().splitlines() or [type(e).__name__])[0][:500]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(text) > MAX_CHARACTERS:
        return {"fatal": f"it wrote over {MAX_CHARACTERS:,} characters for one conversation"}
    return {"text": text.encode("utf-8", "replace").decode("utf-8")}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that is imported may write between the answers
    import transformers.utils.chat_template_utils as chat

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        limit_memory()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request, failed = json.loads(line), None
        try:
            if "strftime_now" in request["template"]:
                fix_date(chat, request["date"])
        except Exception as e:
            failed = {"fatal": str(e)}
        for job in request["jobs"]:
            print(json.dumps(failed or answer(chat, request, job)), file=answers, flush=True)


if __name__ == "__main__":
    main()
