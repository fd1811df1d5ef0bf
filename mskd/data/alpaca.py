"""The Alpaca template: one instruction, maybe with a context, and its response. For models without a chat template.

results = Alpaca(tokenizer, end).spell(exchanges, wheres)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mskd.data.conversations import Exchange, Refused
from mskd.data.examples import CLOSE, OPEN, Spelled, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The template of Stanford Alpaca, as MiniLLM's released code writes it.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)


class Alpaca:
    """Spells exchanges of one instruction, maybe with a context, and its response.

    Prompt and response are tokenised apart, so that the boundary is exact: sampling starts from the ids of the prompt
    alone, and a merge across the boundary would train on other ids than those. What the tokenizer puts at the start
    (Llama's and OPT's do) stays, as in pre-training. Spaces before a response stay, those after it go.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.special = special_tokens(tokenizer)

    def spell(self, exchanges: Sequence[Exchange], wheres: Sequence[str]) -> list[Spelled | Refused]:
        made: list[Spelled | Refused | None] = list(map(self._misfit, exchanges, wheres))
        left = [i for i, result in enumerate(made) if result is None]
        prompts = [self._prompt(exchanges[i]) for i in left]
        written = str(self.tokenizer.convert_ids_to_tokens(self.end))
        contents = [str((exchanges[i].answer or {}).get("content", "")) for i in left]
        answers = [text.rstrip().removesuffix(written).rstrip() for text in contents]
        prompt_ids, answer_ids = self._prompt_ids(prompts), plain_ids(answers, self.tokenizer)
        for n, i in enumerate(left):
            e, prompt, answer = exchanges[i], self._marked(prompts[n]), self._marked(answers[n])
            bos = str(self.tokenizer.bos_token or "")
            begins = bos if prompt_ids[n][:1] == [self.tokenizer.bos_token_id] and bos else ""
            if e.answer is None:
                made[i] = Spelled(prompt, begins, prompt_ids[n], lacks=e.lacks)
            else:
                ids = (*answer_ids[n], self.end)
                made[i] = Spelled(prompt, begins, prompt_ids[n], answer + written, ids, answers[n])
        return [result for result in made if result is not None]

    def _misfit(self, e: Exchange, where: str) -> Refused | None:
        reason, rest = "that the Alpaca template cannot hold", "; set data.template = 'chat'"
        if len(e.asked) > 1:
            said = f"{len(e.asked)} turns come before the response, and the Alpaca template takes one"
            return Refused(reason, f"{where}: {said}{rest}")
        if e.tools or any(turn.get("tool_calls") for turn in (*e.asked, *([e.answer] if e.answer else []))):
            return Refused(reason, f"{where}: the Alpaca template knows no tool calls{rest}")
        return None

    def _marked(self, text: str) -> str:
        return self.special.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", text)

    def _prompt(self, e: Exchange) -> str:
        instruction = e.instruction or e.asked[0]["content"].strip()
        return (ALPACA_CONTEXT if e.context else ALPACA).format(instruction=instruction, context=e.context)

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        if not prompts:
            return []
        encoded = self.tokenizer(prompts, split_special_tokens=True, verbose=False)["input_ids"]
        return [ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids for ids in encoded]


def plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of plain text: no special token is added, and one that the text spells out is text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
