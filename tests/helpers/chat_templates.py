"""Chat templates in the conventions of known model families, written anew, each with the tokens of its own.

    tokenizer = CONVENTIONS["qwen3"].tokenizer()

What is kept of a family: its control tokens, where spaces and line ends stand, whether texts are trimmed, who may speak
when, how tools, calls and thoughts are written, and what is left out of earlier turns.
"""

# ruff: noqa: E501 -- a template reads best with its lines as they are
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "What is the sum of two and three?", "Answer in one word.", "The sum is five.", "    return x + 0\n", "<call>",
    "user\n", "assistant\n", "system\n", "\n\n", "Green. White. Black.", '{"name": "add", "arguments": {"a": 1}}',
] * 3  # fmt: skip


# Where texts are cut before merges, as in Llama 3 and Qwen: line ends with the space before them, words, the rest.
PIECES = r"\s*[\r\n]+|\s+(?!\S)|\s?[^\s\w]+|\s?\w+|\s+"


@dataclass(frozen=True)
class Convention:
    """A template, the tokens that it writes, and what it can hold."""

    template: str
    tokens: tuple[str, ...]  # special ones; the first begins a text
    eos: str
    end: str | None = None  # of an answer, where it is not eos
    plain_tokens: tuple[str, ...] = ()  # added, but not special: <think> in Qwen3
    system: bool = True
    tools: bool = False
    rstrip: bool = False  # special tokens swallow the space behind them, as Phi-3's
    kwargs: dict[str, Any] = field(default_factory=dict)
    call_id: bool = False  # calls need an id of nine letters
    answers: bool = True  # the template shows answers as its prompt begins them

    def tokenizer(self) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_])
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator(WORDS, trainer)
        core.add_special_tokens(
            [AddedToken(t, special=True, normalized=False, rstrip=self.rstrip) for t in self.tokens]
        )
        core.add_tokens([AddedToken(t, normalized=False) for t in self.plain_tokens])
        made = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=self.tokens[0], eos_token=self.eos, pad_token=self.eos,
            model_max_length=4096, clean_up_tokenization_spaces=False,
        )  # fmt: skip
        made.chat_template = self.template
        return made


def sentence_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: a space before the first word, none before the others, bytes for what it lacks."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    single = sorted({c for word in WORDS for c in word.replace(" ", "▁") if c != "\n"} | set("0123456789[]<>/|_"))
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=single, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
    )  # fmt: skip
    core.train_from_iterator([word.replace("\n", " ") for word in WORDS], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        model_max_length=4096, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SMOLLM2 = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML

LLAMA2 = """\
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set rest = messages %}{% set system = none %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}{% endif %}
{%- if loop.first and system is not none %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}
{%- else %}{% set text = m.content %}{% endif %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if tools %}{{ 'You may call:\\n' }}{% for t in tools %}{{ (t | tojson(indent=4)) + '\\n\\n' }}{% endfor %}{% endif %}
{{- system + '<|eot_id|>' }}
{%- for m in rest %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
{%- elif m.role in ('tool', 'ipython') %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- set ns = namespace(count=0, last=0) %}
{%- for m in rest %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- if m.role in ('user', 'assistant') and not m.tool_calls %}
{%- if (m.role == 'user') != (ns.count % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.count = ns.count + 1 %}
{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if loop.last and system %}{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if not call.id is defined or call.id | length != 9 %}{{ raise_exception('call ids have nine letters') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + (m.content | trim) + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
{{- (m.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

GEMMA_WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
)

QWEN3 = """\
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '<tools>' }}
{%- for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.question and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- ('\\n' if content or not loop.first else '') + '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

HERMES = """\
{%- if tools %}{{ '<|im_start|>system\\nTools: <tools>' + (tools | tojson) + '</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>tool\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4 = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

TULU = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}{{ '\\n' if not loop.last }}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

VICUNA = """\
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% set rest = messages[1:] %}
{%- else %}{{ 'A chat between a user and an assistant.\\n\\n' }}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if m.role == 'user' %}{{ 'USER: ' + m.content + '\\n' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

DEEPSEEK = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
{{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' + eos_token }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

DEEPSEEK_V31 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + eos_token }}
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

HARMONY = """\
{{- '<|start|>system<|message|>You are a model.\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' }}
{{- (reasoning_effort or 'medium') + '\\n\\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- if messages[0].role in ('system', 'developer') %}{% set developer = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set developer = '' %}{% set rest = messages %}{% endif %}
{%- if developer or tools %}
{{- '<|start|>developer<|message|>' + ('# Instructions\\n\\n' + developer + '\\n\\n' if developer else '') }}
{%- if tools %}{{ '# Tools\\n\\nnamespace functions {\\n\\n' }}
{%- for t in tools %}{{ 'type ' + t.function.name + ' = (_: ' + (t.function.parameters | tojson) + ') => any;\\n\\n' }}{% endfor %}
{{- '} // namespace functions' }}{% endif %}
{{- '<|end|>' }}
{%- endif %}
{%- set ns = namespace(call='') %}
{%- for m in rest %}
{%- if m.role == 'assistant' %}
{%- if m.tool_calls %}
{%- if m.thinking and m.content %}{{ raise_exception('a call has a thought or content, not both') }}{% endif %}
{%- set call = m.tool_calls[0].function %}{% set ns.call = call.name %}
{%- if m.thinking or m.content %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.thinking or m.content) + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' + call.name + ' <|constrain|>json<|message|>' }}
{{- (call.arguments | tojson) + '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}
{%- else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

GRANITE = """\
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role) + '<|end_of_role|>' + (m.content or '') }}
{%- if m.tool_calls %}{{ '<|tool_call|>[' }}
{%- for call in m.tool_calls %}{{ (call.function | tojson) + (', ' if not loop.last else '') }}{% endfor %}{{ ']' }}{% endif %}
{{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

COMMAND_R = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|START_OF_TURN_TOKEN|>' + {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>',
                                 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}
{{- (m.content.strip() if m.role == 'assistant' else m.content) + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEEP = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)  # fmt: skip
CALLS = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
OSS = (
    "<|startoftext|>",
    "<|return|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|call|>",
)
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
HEADER = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEM = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROLE = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>")
TURN = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")

CONVENTIONS = {
    "chatml": Convention(CHATML, IM, "<|im_end|>"),
    "chatml of a base model": Convention(CHATML, IM, "<|endoftext|>", end="<|im_end|>"),
    "smollm2": Convention(SMOLLM2, IM, "<|im_end|>"),
    "hermes": Convention(HERMES, IM, "<|im_end|>", plain_tokens=THINK[2:4], tools=True),
    "llama 2": Convention(LLAMA2, ("<s>", "</s>"), "</s>"),
    "llama 3": Convention(LLAMA3, HEADER, "<|end_of_text|>", end="<|eot_id|>", tools=True),
    "mistral": Convention(MISTRAL, ("<s>", "</s>", *CALLS), "</s>", tools=True, call_id=True, system=False),
    "gemma": Convention(GEMMA_WITHOUT_SYSTEM, GEM, "<eos>", "<end_of_turn>", system=False),
    "gemma 3": Convention(GEMMA, GEM, "<eos>", "<end_of_turn>"),
    "qwen3": Convention(QWEN3, IM, "<|im_end|>", plain_tokens=THINK, tools=True),
    "qwen3, not thinking": Convention(
        QWEN3, IM, "<|im_end|>", plain_tokens=THINK, tools=True, kwargs={"enable_thinking": False}
    ),
    "phi 3": Convention(PHI3, PHI, "<|endoftext|>", "<|end|>", rstrip=True),
    "phi 4": Convention(PHI4, (*IM, "<|im_sep|>"), "<|im_end|>"),
    "zephyr": Convention(ZEPHYR, ("<s>", "</s>"), "</s>"),
    "tulu": Convention(TULU, ("<s>", "<|endoftext|>"), "<|endoftext|>"),
    "vicuna": Convention(VICUNA, ("<s>", "</s>"), "</s>"),
    "deepseek v3": Convention(DEEPSEEK, DEEP, DEEP[1]),
    "deepseek v3.1": Convention(DEEPSEEK_V31, DEEP, DEEP[1], plain_tokens=THINK[:2], kwargs={"thinking": False}),
    "deepseek r1": Convention(DEEPSEEK_R1, DEEP, DEEP[1], plain_tokens=THINK[:2], answers=False),
    "harmony": Convention(HARMONY, OSS, "<|return|>", tools=True),
    "granite": Convention(GRANITE, ROLE, "<|end_of_text|>", tools=True),
    "command r": Convention(COMMAND_R, (*TURN, "<|CHATBOT_TOKEN|>"), "<|END_OF_TURN_TOKEN|>"),
}  # fmt: skip
