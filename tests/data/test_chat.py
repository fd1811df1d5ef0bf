"""Chat templates: what is trained on is what the template writes, in every convention; bounded; nothing left out."""

import json
import time

import pytest
from chat_templates import CHATML, CONVENTIONS, QWEN3, sentence_tokenizer
from transformers.utils import chat_template_utils

from mskd.config import ConfigError, DataConfig
from mskd.data import rendering
from mskd.data.instructions import end_token_id, load_data, load_items, read

DAY = "2024-02-29"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(a, b, **more):
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return turn("assistant", None, tool_calls=[{"type": "function", "function": function, **more}])


def conversations(convention):
    """Conversations that the convention can hold, by name: messages and tools."""
    single = [turn("user", "What is the sum of two and three?"), turn("assistant", "The sum is five.")]
    several = [*single, turn("user", "Of four\nand one?"), turn("assistant", "Five, again."), turn("user", "漢字 😀?")]
    several.append(turn("assistant", "é, Black. White.\n\nGreen."))
    code = [turn("user", "  Write a body:\n\n"), turn("assistant", "    return x + 0\n")]
    found = {"single": (single, None), "several": (several, None), "code": (code, None)}
    if convention.system:
        found["system"] = ([turn("system", "Answer in one word."), *several], None)
    if convention.tools:
        own = {"id": "abcdefghi"} if convention.call_id else {}
        back = {"tool_call_id": "abcdefghi"} if convention.call_id else {}
        asked = [turn("user", "What is 1 plus 2?"), call(1, 2, **own)]
        found["call"] = (asked, [ADD])
        found["called"] = ([*asked, turn("tool", "3", name="add", **back), turn("assistant", "It is 3.")], [ADD])
    return found


def rows(tmp_path, *made, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def settings(path, **own):
    return DataConfig(source=str(path), template="chat", test=0, max_prompt_tokens=3000, max_tokens=4000, **own)


def reading(path, tokenizer, need_responses=True, **own):
    return read(str(path), "data.source", settings(path, **own), tokenizer, need_responses)


@pytest.fixture
def on_the_day(monkeypatch):
    """The tokenizer's own renders, in this process, on DAY."""

    class Fixed(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(DAY)

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)


# -- the identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, c in CONVENTIONS.items() if c.answers])
def test_prompt_and_answer_are_the_templates_own_conversation(name, tmp_path, on_the_day):
    convention = CONVENTIONS[name]
    tokenizer = convention.tokenizer()
    given = conversations(convention)
    path = rows(tmp_path, *({"messages": m, "tools": t} if t else {"messages": m} for m, t in given.values()))
    made = reading(path, tokenizer, turns="all", date=DAY, template_kwargs=convention.kwargs)
    assert not made.counts.dropped and not made.counts.turns_left_out and not made.counts.apart
    end = tokenizer.convert_tokens_to_ids(convention.end or convention.eos)
    assert end_token_id(tokenizer, "chat") == end
    for (messages, tools), group in zip(given.values(), made.groups, strict=True):
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        assert [item.turn for item in group] == list(range(1, len(places) + 1))
        for place, item in zip(places, group, strict=True):
            options = {"tools": tools, "tokenize": True, "return_dict": False, **convention.kwargs}
            whole = tokenizer.apply_chat_template(messages[: place + 1], **options)
            prompt = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, **options)
            ids = [*item.example.prompt_ids, *item.example.response_ids]
            assert list(item.example.prompt_ids) == prompt
            assert whole[: len(ids)] == ids
            behind = tokenizer.decode(whole[len(ids) :]).removesuffix(convention.eos)
            assert not behind.strip()  # a line end, or Phi's end of text
            ends = [end, tokenizer.convert_tokens_to_ids("<|call|>")] if name == "harmony" else [end]
            assert ids[-1] in ends and sum(i in ends for i in item.example.response_ids) == 1
            said = messages[place]["content"] or "add"
            assert said.strip() in item.answer


def test_there_are_enough_conventions():
    assert len(CONVENTIONS) >= 20 and sum(c.tools for c in CONVENTIONS.values()) >= 6


@pytest.mark.parametrize("turns", ["last", "all"])
def test_last_is_the_default_and_says_what_it_leaves(tmp_path, turns):
    c = CONVENTIONS["chatml"]
    path = rows(tmp_path, *({"messages": conversations(c)["system"][0]} for _ in range(2)))
    made = reading(path, c.tokenizer(), **({} if turns == "last" else {"turns": "all"}))
    answers = [item.answer for item in made.groups[0]]
    lines = "\n".join(made.counts.lines())
    if turns == "last":
        assert answers == ["é, Black. White.\n\nGreen.<|im_end|>"]
        assert made.counts.earlier == 4 and "earlier assistant turns that are not trained on: 4" in lines
    else:
        assert answers == [
            "The sum is five.<|im_end|>",
            "Five, again.<|im_end|>",
            "é, Black. White.\n\nGreen.<|im_end|>",
        ]
        assert "assistant turns trained on: 6" in lines
        tokens = [len(i.example.prompt_ids) + len(i.example.response_ids) for i in made.groups[0]]
        assert made.counts.tokens == 2 * sum(tokens) and made.counts.longest == 2 * tokens[-1]
        assert f"{sum(tokens) / tokens[-1]:.2f} times the conversations' own" in lines


def test_every_turn_of_a_row_stays_in_one_split(tmp_path):
    c = CONVENTIONS["chatml"]
    messages = conversations(c)["several"][0]
    made = [{"messages": [turn("user", f"{i} {messages[0]['content']}"), *messages[1:]]} for i in range(10)]
    path = rows(tmp_path, *made)
    config = settings(path, turns="all").model_copy(update={"test": 3, "validation": 2})
    splits = load_data(config, c.tokenizer(), seed=0)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [15, 6, 9]
    first = [{e.prompt.split("?")[0] for e in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in first] == [5, 2, 3] and not first[0] & first[1] and not first[0] & first[2]


def test_turns_masked_in_one_sequence_have_the_same_loss(tmp_path):
    """An example for each turn trains on the tokens, and with the logits, that a mask over the whole would."""
    import torch
    from tiny import build_llama

    c = CONVENTIONS["chatml"]
    tokenizer = c.tokenizer()
    path = rows(tmp_path, {"messages": conversations(c)["system"][0]})
    items = reading(path, tokenizer, turns="all").items
    whole = torch.tensor([[*items[-1].example.prompt_ids, *items[-1].example.response_ids]])
    model = build_llama(tokenizer).double()
    with torch.no_grad():
        logprobs = model(input_ids=whole).logits[0].log_softmax(-1)
        for item in items:
            ids = torch.tensor([[*item.example.prompt_ids, *item.example.response_ids]])
            own = model(input_ids=ids).logits[0].log_softmax(-1)
            first, last = len(item.example.prompt_ids), ids.shape[1]
            assert ids[0].tolist() == whole[0, :last].tolist()
            # A Llama's norms and rotary embedding compute in fp32: 1e-6. One more token before: 0.1 and more.
            torch.testing.assert_close(own[first - 1 : last - 1], logprobs[first - 1 : last - 1], rtol=0, atol=1e-4)


# -- templates that think -------------------------------------------------------------------------


def test_thoughts_are_trained_on_as_the_template_writes_them(tmp_path):
    tokenizer = CONVENTIONS["qwen3"].tokenizer()
    thought = "<think>\nOne and one.\n</think>\n\nTwo."
    rows_ = [
        [turn("user", "1 + 1?"), turn("assistant", "Two.")],
        [turn("user", "1 + 1?"), turn("assistant", thought)],
        [turn("user", "1 + 1?"), turn("assistant", "Two.", reasoning_content="One and one.")],
        [turn("user", "Hi"), turn("assistant", thought), turn("user", "1 + 1?"), turn("assistant", thought)],
    ]
    path = rows(tmp_path, *({"messages": m} for m in rows_))
    made = reading(path, tokenizer)
    answers = [item.answer for item in made.items]
    assert answers == ["<think>\n\n</think>\n\nTwo.<|im_end|>"] + 3 * [f"{thought}<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<think>") in made.items[0].example.response_ids
    assert made.items[3].example.prompt.count("<think>") == 0  # what the template leaves out of earlier turns
    off = reading(path, tokenizer, template_kwargs={"enable_thinking": False})
    assert off.items[0].example.prompt.endswith("<think>\n\n</think>\n\n") and off.items[0].answer == "Two.<|im_end|>"
    reason = "whose answer the chat template begins in another way than its prompt says"
    assert off.counts.dropped == {reason: 3}  # they think, and the prompt says that nothing is thought


def test_an_answer_that_its_own_prompt_does_not_begin_is_refused_but_asks(tmp_path):
    tokenizer = CONVENTIONS["deepseek r1"].tokenizer()
    path = rows(tmp_path, {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]})
    with pytest.raises(
        ConfigError, match="<｜Assistant｜>' the prompt goes on with '<think>.n', the conversation with 'Hel"
    ):
        reading(path, tokenizer)
    (e,), _ = load_items(settings(path), tokenizer)
    assert e.prompt.endswith("<｜Assistant｜><think>\n") and e.response_ids == () and e.references == ("Hello.",)


# -- nothing is left out --------------------------------------------------------------------------


def refusal(path, tokenizer, **own):
    with pytest.raises(ConfigError) as error:
        reading(path, tokenizer, **own)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_template_leaves_out_is_refused_by_name(tmp_path):
    plain = CONVENTIONS["chatml"].tokenizer()
    asked = turn("user", "1 + 2?")
    given = {
        "tool call": {"messages": [asked, call(1, 2)]},
        "tools": {"messages": [asked, turn("assistant", "3")], "tools": [ADD]},
        "reasoning": {"messages": [asked, turn("assistant", "3", reasoning_content="One more than two.")]},
    }
    for part, row in given.items():
        path = rows(tmp_path, row, name=f"{part}.jsonl".replace(" ", "-"))
        if part == "tool call":  # the template writes content, and there is none
            assert "1 that the chat template refuses" in refusal(path, plain) or f"whose {part}" in refusal(path, plain)
        else:
            assert f"1 whose {part} the chat template leaves out; the first: {path}, row 1" in refusal(path, plain)
    plain.chat_template = CHATML.replace("m.content", "(m.content if m.role != 'tool' else '')")
    path = rows(tmp_path, {"messages": [asked, turn("tool", "3"), turn("assistant", "Three.")]})
    assert "whose tool turn the chat template leaves out" in refusal(path, plain)
    plain.chat_template = CHATML.replace("m.content", "(m.content if m.role != 'assistant' else 'ok')")
    path = rows(tmp_path, {"messages": [asked, turn("assistant", "Three.")]})
    assert "whose assistant turn the chat template leaves out" in refusal(path, plain)


def test_a_thought_that_the_template_cuts_off_is_not_lost_unsaid(tmp_path):
    convention = CONVENTIONS["deepseek v3.1"]
    messages = [turn("user", "1 + 1?"), turn("assistant", "<think>One and one.</think>Two.")]
    path = rows(tmp_path, {"messages": messages}, {"messages": [messages[0], turn("assistant", "Two.")]})
    made = reading(path, convention.tokenizer(), template_kwargs=convention.kwargs)
    assert made.counts.dropped == {"whose thought the chat template leaves out": 1} and made.items[0].row == 2


def test_a_template_that_refuses_other_words_cannot_be_checked(tmp_path):
    tokenizer = CONVENTIONS["hermes"].tokenizer()
    tokenizer.chat_template += "{% if tools and tools[0].function.name != 'add' %}{{ raise_exception('?') }}{% endif %}"
    path = rows(tmp_path, {"messages": [turn("user", "1 + 2?"), turn("assistant", "3")], "tools": [ADD]})
    assert "1 that cannot be checked for what the chat template leaves out; the first: " in refusal(path, tokenizer)


def test_a_template_that_writes_the_system_prompt_of_the_last_turn_only_is_seen_through(tmp_path):
    """Mistral's, where the answer comes last, loses the system prompt that the question alone has."""
    tokenizer = CONVENTIONS["mistral"].tokenizer()
    path = rows(tmp_path, {"messages": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello.")]})
    assert "1 whose system turn the chat template leaves out" in refusal(path, tokenizer)


def test_arguments_are_a_table_or_text_as_the_template_takes_them(tmp_path):
    asked = turn("user", "1 + 2?")
    table, text = call(1, 2), call(1, 2)
    text["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": 2}'
    path = rows(tmp_path, {"messages": [asked, table]}, {"messages": [asked, text]})
    for name in ("deepseek v3", "qwen3", "hermes", "llama 3", "harmony", "granite"):
        made = reading(path, CONVENTIONS[name].tokenizer(), date=DAY)
        assert len({item.answer for item in made.items}) == 1, name
        assert '"a": 1, "b": 2}' in made.items[0].answer, name
    none = [call(1, 2) for _ in range(4)]
    for turn_, arguments in zip(none, ({}, "null", None, "{}"), strict=True):
        turn_["tool_calls"][0]["function"]["arguments"] = arguments
    path_ = rows(tmp_path, *({"messages": [asked, turn_], "tools": []} for turn_ in none), name="none.jsonl")
    (answer,) = {item.answer for item in reading(path_, CONVENTIONS["qwen3"].tokenizer()).items}
    assert answer.endswith('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>')
    tokenizer = CONVENTIONS["chatml"].tokenizer()
    written = "(m.content or m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments)"
    tokenizer.chat_template = CHATML.replace("m.content", written)
    assert {i.answer for i in reading(path, tokenizer).items} == {'add{"a": 1, "b": 2}<|im_end|>'}  # not {'a': 1, ...}


def test_calls_of_other_forms_are_the_same_calls(tmp_path):
    tokenizer = CONVENTIONS["qwen3"].tokenizer()
    function = ADD["function"]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Three."},
        ],
        "tools": json.dumps([function]),
        "system": "Be brief.",
    }
    rest = [turn("tool", "3"), turn("assistant", "Three.")]
    own = [turn("system", "Be brief."), turn("user", "1 + 2?"), call(1, 2), *rest]
    bare = turn("assistant", None, tool_calls=[{"name": "add", "arguments": {"a": 1, "b": 2}}])
    flat = [*own[:2], bare, *rest]
    (a,) = reading(rows(tmp_path, sharegpt, name="a.jsonl"), tokenizer).items
    (b,) = reading(rows(tmp_path, {"messages": own, "tools": [ADD]}, name="b.jsonl"), tokenizer).items
    (c,) = reading(rows(tmp_path, {"messages": flat, "tools": [function]}, name="c.jsonl"), tokenizer).items
    assert a.example == b.example == c.example and "<tool_call>" in a.prompt and "Add two numbers" in a.prompt


# -- special tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama 3", "mistral", "gemma 3", "harmony", "deepseek v3.1", "command r"])
def test_special_tokens_in_the_data_are_text_everywhere(name, tmp_path):
    convention = CONVENTIONS[name]
    tokenizer = convention.tokenizer()
    spelled = " and ".join(convention.tokens)
    messages = [turn("user", f"What are {spelled}?"), turn("assistant", f"They are {spelled}, written as text.")]
    bare = [turn("user", "What are?"), turn("assistant", "They are, written as text.")]
    path = rows(tmp_path, {"messages": messages}, {"messages": bare})
    (item,), (other,) = reading(path, tokenizer, date=DAY, template_kwargs=convention.kwargs).groups
    special = set(tokenizer.convert_tokens_to_ids(list(convention.tokens)))

    def found(e):
        return [i for i in (*e.prompt_ids, *e.response_ids) if i in special]

    assert found(item.example) == found(other.example)
    assert tokenizer.decode([*item.example.prompt_ids, *item.example.response_ids]).count(spelled) == 2
    assert spelled in item.example.prompt and item.example.references[0].endswith(messages[1]["content"])


def test_an_end_token_that_is_not_special_is_text_in_the_data_too(tmp_path):
    tokenizer = CONVENTIONS["chatml"].tokenizer()
    tokenizer.add_tokens(["<|turn_end|>"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|turn_end|>")
    end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    assert end_token_id(tokenizer, "chat") == end
    messages = [turn("user", "What is <|turn_end|>?"), turn("assistant", "The <|turn_end|> ends a turn.")]
    (item,) = reading(rows(tmp_path, {"messages": messages}), tokenizer).items
    assert item.example.prompt_ids.count(end) == item.example.response_ids.count(end) == 1
    assert tokenizer.decode(item.example.response_ids) == "The <|turn_end|> ends a turn.<|turn_end|>"


def test_an_end_that_the_answer_spells_is_written_once(tmp_path):
    tokenizer = CONVENTIONS["chatml"].tokenizer()
    path = rows(tmp_path, {"messages": [turn("user", "Hi"), turn("assistant", "Hello.<|im_end|>\n")]})
    (item,) = reading(path, tokenizer).items
    assert item.answer == "Hello.<|im_end|>" and item.example.response_ids.count(tokenizer.eos_token_id) == 1


def test_the_start_token_is_written_once(tmp_path):
    convention = CONVENTIONS["llama 3"]
    tokenizer = convention.tokenizer()
    tokenizer.add_bos_token = True
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it would write one too
    path = rows(tmp_path, {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]})
    (item,) = reading(path, tokenizer, date=DAY).items
    assert item.example.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in item.example.response_ids


def test_tokens_that_would_span_prompt_and_answer_are_cut_there(tmp_path):
    """A prompt that ends with a space: sampling starts with its ids, and no second space comes before the answer."""
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    tokenizer = sentence_tokenizer(template)
    given = [[turn("user", "The sum?"), turn("assistant", answer)] for answer in ("White.", "    return")]
    path = rows(tmp_path, *({"messages": messages} for messages in given))
    made = reading(path, tokenizer)
    first, second = (item.example for item in made.items)
    prompt = tokenizer("[user] The sum?</s>[assistant] ", add_special_tokens=False).input_ids
    whole = tokenizer("[user] The sum?</s>[assistant] White.</s>", add_special_tokens=False).input_ids
    assert whole[: len(prompt)] != prompt  # a token does span both: the test can fail
    assert made.counts.apart >= 1 and list(first.prompt_ids) == prompt == list(second.prompt_ids)
    assert tokenizer.decode([*first.prompt_ids, *first.response_ids]) == tokenizer.decode(whole)
    assert tokenizer.decode([*second.prompt_ids, *second.response_ids]).endswith("[assistant]     return</s>")


def test_a_template_without_an_end_gets_one(tmp_path):
    tokenizer = CONVENTIONS["chatml"].tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    path = rows(tmp_path, {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]})
    (item,) = reading(path, tokenizer).items
    assert item.answer == " Hello.<|im_end|>" and item.example.response_ids[-1] == tokenizer.eos_token_id


# -- templates are programs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end within 0.5 s"),
        ("{{ 'x' * 9999999999 }}", "took over 1024 MiB of memory"),
        ("{% set n = namespace(x='xy') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "of memory"),
        ("{{ 'x' * 11000000 }}", "wrote over 10,000,000 characters"),
        ("{% if %}", "refuses the turns user, assistant: "),
        ("{{ messages.nothing.at.all }}", "refuses the turns user, assistant: "),
    ],
)  # fmt: skip
def test_a_template_that_does_not_end_is_one_line(tmp_path, monkeypatch, template, message):
    monkeypatch.setattr(rendering, "SECONDS", 0.5 if "0.5" in message else 5)
    tokenizer = CONVENTIONS["chatml"].tokenizer()
    tokenizer.chat_template = template
    start = time.monotonic()
    assert message in refusal(
        rows(tmp_path, {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]}), tokenizer
    )
    assert time.monotonic() - start < 20
    tokenizer.chat_template = QWEN3  # and the next one is rendered as if nothing had been
    assert end_token_id(tokenizer, "chat") == tokenizer.eos_token_id


def test_a_row_that_the_template_refuses_is_dropped_and_the_first_one_is_named(tmp_path):
    tokenizer = CONVENTIONS["gemma"].tokenizer()
    good = {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]}
    bad = {"messages": [turn("system", "No."), *good["messages"]]}
    made = reading(rows(tmp_path, good, bad, good, bad), tokenizer)
    assert made.counts.used == 2 and made.counts.dropped == {"that the chat template refuses": 2}
    (first,) = made.counts.first.values()
    said = "row 2: the tokenizer's chat template refuses the turns system, user: System role not supported"
    assert first.endswith(said)
    said = refusal(rows(tmp_path, bad, bad), tokenizer)
    assert "none of its 2 rows can be used: 2 that the chat template refuses; the first: " in said


def test_a_template_of_several_takes_the_one_for_tools(tmp_path):
    tokenizer = CONVENTIONS["hermes"].tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": tokenizer.chat_template}
    asked = [turn("user", "1 + 2?"), turn("assistant", "3")]
    path = rows(tmp_path, {"messages": asked, "tools": [ADD]}, {"messages": asked})
    with_tools, without = (item.prompt for item in reading(path, tokenizer).items)
    assert "<tools>" in with_tools and without == "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"


def test_the_date_of_a_template_is_the_configurations(tmp_path):
    tokenizer = CONVENTIONS["llama 3"].tokenizer()
    path = rows(tmp_path, {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]})
    prompts = [reading(path, tokenizer, date=day).items[0].prompt for day in ("2024-02-29", "2031-12-01", "2024-02-29")]
    assert "Today Date: 29 Feb 2024" in prompts[0] and "01 Dec 2031" in prompts[1] and prompts[0] == prompts[2]
