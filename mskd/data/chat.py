"""A tokenizer's chat template: exchanges -> prompt and answer, as the template itself writes them.

    results = Chat(tokenizer, config, end).spell(exchanges, wheres)       # a Spelled or a Refused for each
    texts = Chat(tokenizer, config).render([(messages, tools, True)])

What holds is verified for every exchange: prompt and answer, one after the other, are what the template makes of the
whole conversation, and nothing that the row holds is left out of it (probe.py).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date as day
from typing import TYPE_CHECKING, Any

from mskd.config import ConfigError, DataConfig
from mskd.data.conversations import Exchange, Refused, Turn
from mskd.data.examples import CLOSE, OPEN, SPELLED_OUT, Spelled, special_tokens, unmarked
from mskd.data.probe import Shown, calls, mapped, needs_probe, probe, strings, with_text_arguments
from mskd.data.rendering import Job, TemplateError, render
from mskd.data.rows import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = Spelled | Refused


class Chat:
    """A tokenizer's chat template with the settings of a run (`data.template_kwargs`, `data.date`).

    The prompt is the template's render of what was asked, with its generation prompt; the answer is what the render of
    the whole conversation has more, to the token that ends it. Raises ConfigError where there is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, end: int | None = None) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("data.template is 'chat', but the tokenizer has no chat template; use 'alpaca'")
        _check_own_renderer(tokenizer)
        try:
            plain, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
        except ValueError as e:
            raise ConfigError(f"the tokenizer's chat template cannot be used: {first_line(e)}") from None
        self.templates = (str(plain), str(with_tools))
        self.tokenizer = tokenizer
        self.end = "" if end is None else str(tokenizer.convert_ids_to_tokens(end))
        own = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if not isinstance(v, list)}
        self.context = {**tokenizer.special_tokens_map, **own, **config.template_kwargs}
        self.date = config.date or f"{day.today()}"
        self.special = special_tokens(tokenizer, *filter(None, [self.end]))

    def render(self, jobs: Sequence[Job]) -> list[str | TemplateError]:
        """What the template makes of each conversation; another one may be there for those with tools."""
        found: dict[int, str | TemplateError] = {}
        for template in dict.fromkeys(self.templates):
            own = [i for i, job in enumerate(jobs) if self.templates[bool(job[1])] == template]
            texts = render(template, [jobs[i] for i in own], context=self.context, date=self.date)
            found |= dict(zip(own, texts, strict=True))
        return [found[i] for i in range(len(jobs))]

    def spell(self, exchanges: Sequence[Exchange], wheres: Sequence[str]) -> list[Result]:
        """Every exchange in text and ids, or why it cannot be."""
        shown = self._show([_without_end(e, self.end) for e in exchanges], wheres)
        self._try_arguments_as_text(shown)
        gone = self._left_out(shown)
        marked = self._marked(shown)
        results: list[Result] = []
        for s, missing, text in zip(shown, gone, marked, strict=True):
            results.append(self._texts(s, missing, text))
        self._add_ids(results)
        return results

    def _show(self, exchanges: Sequence[Exchange], wheres: Sequence[str]) -> list[Shown]:
        jobs: list[Job] = [(e.asked, e.tools, True) for e in exchanges]
        jobs += [((*e.asked, e.answer), e.tools, False) for e in exchanges if e.answer is not None]
        texts = iter(self.render(jobs))
        prompts = [next(texts) for _ in exchanges]
        wholes = [None if e.answer is None else next(texts) for e in exchanges]
        return [Shown(*parts) for parts in zip(exchanges, wheres, prompts, wholes, strict=True)]

    def _try_arguments_as_text(self, shown: list[Shown]) -> None:
        """Some templates take the arguments of a call as a table, some as JSON text: a table they refuse, or write as
        Python would. Those exchanges are shown again with text."""
        odd = [i for i, s in enumerate(shown) if any(_python(call, s) for call in calls(s.exchange))]
        again = self._show([with_text_arguments(shown[i].exchange) for i in odd], [shown[i].where for i in odd])
        for i, s in zip(odd, again, strict=True):
            if not isinstance(s.prompt, TemplateError) and not isinstance(s.whole, TemplateError):
                shown[i] = s

    def _left_out(self, shown: Sequence[Shown]) -> list[tuple[Refused, bool] | None]:
        """Why an exchange is refused of which the template leaves a part out, and whether it is one of the answer.

        Seen by a second render, with a word of its own in each part, where a look at the text does not tell.
        """
        probes = {i: probe(s.exchange) for i, s in enumerate(shown) if needs_probe(s)}
        jobs: list[Job] = []
        for other, _ in probes.values():
            answer = [] if other.answer is None else [other.answer]
            jobs.append(((*other.asked, *answer), other.tools, other.answer is None))
        found: list[tuple[Refused, bool] | None] = [None] * len(shown)
        for (i, (_, words)), text in zip(probes.items(), self.render(jobs), strict=True):
            where = shown[i].where
            if isinstance(text, TemplateError):
                said = f"{where}: with other words the template refuses it, so nobody knows what it leaves out: {text}"
                found[i] = Refused("that cannot be checked for what the chat template leaves out", said), False
                continue
            missing = sorted((own, part) for word, part, own in words if word not in text)  # the prompt's first
            for own, part in missing[:1]:
                said = f"{where}: the template does not write the {part}"
                found[i] = Refused(f"whose {part} the chat template leaves out", said), own
        return found

    def _marked(self, shown: Sequence[Shown]) -> list[Shown]:
        """The same texts, with marks around special tokens that the data spells out: they are text."""
        spelled = [i for i, s in enumerate(shown) if any(map(self.special.search, strings(s.exchange)))]
        mark: Callable[[str], str] = functools.partial(self.special.sub, lambda m: f"{OPEN}{m[0]}{CLOSE}")
        again = self._show([mapped(shown[i].exchange, mark) for i in spelled], [shown[i].where for i in spelled])
        found = dict(zip(spelled, again, strict=True))
        return [found.get(i, s) for i, s in enumerate(shown)]

    def _texts(self, s: Shown, missing: tuple[Refused, bool] | None, marked: Shown) -> Result:
        """The marked texts of prompt and answer, still without ids."""
        prompt, whole = s.prompt, s.whole
        if isinstance(prompt, TemplateError):
            return self._refusal(s, s.exchange.asked, prompt)
        if any(unmarked(str(m)) != str(t) for m, t in ((marked.prompt, prompt), (marked.whole, whole))):
            return Refused(
                "whose special tokens in text the chat template takes apart", f"{s.where}: it spells one out"
            )
        assert isinstance(marked.prompt, str)
        lacks = s.exchange.lacks
        if missing is not None:
            lacks, of_the_answer = missing
            if not of_the_answer:
                return lacks
        elif isinstance(whole, TemplateError):
            lacks = self._refusal(s, (*s.exchange.asked, s.exchange.answer or {}), whole)
        elif whole is not None and not whole.startswith(prompt):
            common = os.path.commonprefix([prompt, whole])
            lacks = Refused(
                "whose answer the chat template begins in another way than its prompt says",
                f"{s.where}: after {common[-20:]!r} the prompt goes on with {prompt[len(common) :][:20]!r}, the "
                f"conversation with {whole[len(common) :][:20]!r}; data.template_kwargs may settle it",
            )
        if lacks is not None or whole is None:
            return Spelled(marked.prompt, "", [], lacks=lacks)
        assert isinstance(marked.whole, str)
        answer = self._to_the_end(marked.whole[len(marked.prompt) :])
        return Spelled(marked.prompt, "", [], answer, reference=self._spoken(answer))

    def _refusal(self, s: Shown, turns: Iterable[Turn], error: TemplateError) -> Refused:
        roles = ", ".join(turn["role"] for turn in turns)
        said = f"the tokenizer's chat template refuses the turns {roles}: {error}"
        return Refused("that the chat template refuses", f"{s.where}: {said}")

    def _to_the_end(self, tail: str) -> str:
        """An answer to the token that ends it: the run's end, another special token that is last, or the end added."""
        for found in re.finditer(f"{SPELLED_OUT.pattern}|{re.escape(self.end)}", tail, re.DOTALL):
            if found[0] == self.end:
                return tail[: found.end()]
        tail = tail.rstrip()
        closed = any(tail.endswith(found[0]) for found in self.special.finditer(tail) if found.end() == len(tail))
        return tail if closed else tail + self.end

    def _spoken(self, answer: str) -> str:
        pieces = enumerate(SPELLED_OUT.split(answer))
        return "".join(p if n % 2 else self.special.sub("", p) for n, p in pieces).rstrip()

    # -- ids ---------------------------------------------------------------------------------------

    def _add_ids(self, results: list[Result]) -> None:
        """Put the ids to the texts: those of the whole conversation, cut where the prompt alone ends.

        Where a token of the whole would span that place, prompt and answer are tokenised apart: a model that answers
        begins with the ids of the prompt alone.
        """
        own = [i for i, result in enumerate(results) if isinstance(result, Spelled)]
        spelled = [result for result in results if isinstance(result, Spelled)]
        prompts = self._ids([s.prompt for s in spelled])
        wholes = self._ids([s.prompt + s.answer for s in spelled])
        for i, s, prompt, whole in zip(own, spelled, prompts, wholes, strict=True):
            apart = bool(s.answer) and whole[: len(prompt)] != prompt
            answer = self._ids_after(s.answer) if apart else whole[len(prompt) :]
            results[i] = replace(s, prompt_ids=prompt, answer_ids=tuple(answer), apart=apart)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [i for i, text in enumerate(texts) if OPEN not in text]
        found = dict(zip(plain, self._encode([texts[i] for i in plain]), strict=True))
        return [found[i] if i in found else self._ids_of_marked(text) for i, text in enumerate(texts)]

    def _encode(self, given: list[str], **options: Any) -> list[list[int]]:
        if not given:
            return []
        return self.tokenizer(given, add_special_tokens=False, verbose=False, **options)["input_ids"]

    def _ids_of_marked(self, text: str, after: bool = False) -> list[int]:
        ids: list[int] = []
        for n, piece in enumerate(SPELLED_OUT.split(text)):
            if piece:
                options = {"split_special_tokens": bool(n % 2)}
                pieces = [piece[:1], piece[1:]] if n % 2 and len(self._encode([piece], **options)[0]) == 1 else [piece]
                for part in pieces:  # a token that is not special is not split by that option
                    ids += self._continued(part, first=not (ids or after), **options)
        return ids

    def _ids_after(self, text: str) -> list[int]:
        return self._ids_of_marked(text, after=True)

    def _continued(self, text: str, *, first: bool, **options: Any) -> list[int]:
        """Ids of text that stands after other text: without the space that tokenizers like Llama's put before a first
        word."""
        if not first:
            before, both = self._encode(["\n", "\n" + text], **options)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode([text], **options)[0]


def _check_own_renderer(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerBase as Base

    if type(tokenizer).apply_chat_template is not Base.apply_chat_template:
        raise ConfigError(
            f"{type(tokenizer).__name__} writes conversations by code of its own, which is not bounded here; "
            "use data.template = 'alpaca'"
        )


def _without_end(e: Exchange, end: str) -> Exchange:
    """An end that the answer spells out is the template's to write."""
    if e.answer is None or not e.answer["content"].rstrip().endswith(end):
        return e
    return replace(e, answer=e.answer | {"content": e.answer["content"].rstrip().removesuffix(end)})


def _python(call: Mapping[str, Any], s: Shown) -> bool:
    """Whether a template was given a table for text: it refuses it, or writes it as Python does."""
    text = s.prompt if s.whole is None else s.whole
    if isinstance(call["arguments"], str):
        return False
    return isinstance(text, TemplateError) or (bool(call["arguments"]) and str(call["arguments"]) in text)
