"""Rows of every form: each is read as what it says, or refused by name and counted; nothing vanishes without a word."""

import json
import os
from unittest import mock

import datasets
import pytest
from chat_templates import CONVENTIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE

from mskd.config import ConfigError, DataConfig
from mskd.data.instructions import load_data, load_items, read

TOOLS = (
    "{% if tools %}[tools] {{ tools | tojson }}{{ eos_token }}{% endif %}{% for m in messages %}[{{ m.role }}] "
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Reply."}


def rows(tmp_path, *made, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def reading(path, tokenizer, need_responses=True, **own):
    own = {"template": "chat", "max_prompt_tokens": 2000, "max_tokens": 3000, **own}
    return read(str(path), "data.source", DataConfig(source=str(path), **own), tokenizer, need_responses)


def refused(path, tokenizer, **own):
    with pytest.raises(ConfigError) as error:
        reading(path, tokenizer, **own)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def tools_tokenizer(tokenizer):
    tokenizer.chat_template = TOOLS
    return tokenizer


# -- forms ----------------------------------------------------------------------------------------


def test_messages_that_end_with_a_question_ask_it(tmp_path, tools_tokenizer):
    """In phases that need a response the row is dropped and counted; to minillm and evaluation it is a prompt."""
    open_ = {"messages": [ASK, ANSWER, {"role": "user", "content": "And?"}]}
    path = rows(tmp_path, *[open_] * 6, *[{"messages": [ASK, ANSWER]}] * 6)
    made = reading(path, tools_tokenizer)
    assert made.counts.used == 6 and made.counts.dropped == {"without a response": 6} and made.counts.unanswered == 6
    assert all(item.answer == "Reply.<|im_end|>" for item in made.items)
    (first, *_), _ = load_items(DataConfig(source=str(path), template="chat"), tools_tokenizer)
    assert first.prompt == "[user] Ask.<|im_end|>[assistant] Reply.<|im_end|>[user] And?<|im_end|>[assistant] "
    assert first.response_ids == () and first.references == ()
    prompts = reading(path, tools_tokenizer, need_responses=False)
    assert prompts.counts.used == 12 and prompts.counts.prompts_alone == {"without a response": 6}


def test_several_turns_are_trained_on_where_asked_for(tmp_path, tools_tokenizer):
    messages = [{"role": "system", "content": "One word."}]
    for colour in ("Green.", "White.", "Black."):
        messages += [ASK, {"role": "assistant", "content": colour}]
    path = rows(tmp_path, {"messages": messages})
    assert [i.answer for i in reading(path, tools_tokenizer).items] == ["Black.<|im_end|>"]
    every = reading(path, tools_tokenizer, turns="all").items
    assert [i.answer for i in every] == ["Green.<|im_end|>", "White.<|im_end|>", "Black.<|im_end|>"]
    marked = [m | {"train": m["content"] == "White."} if m["role"] == "assistant" else m for m in messages]
    some = reading(rows(tmp_path, {"messages": marked}), tools_tokenizer, turns="all")
    assert [i.answer for i in some.items] == ["White.<|im_end|>"]
    assert some.counts.turns_left_out == {"with an answer marked as not to be trained on": 2}


def test_calls_tools_and_their_results_are_written(tmp_path, tools_tokenizer):
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "tool", "name": "add", "content": "3"}
    tools = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
    path = rows(
        tmp_path, {"messages": [ASK, call, result, ANSWER], "tools": tools}, {"messages": [ASK, call], "tools": tools}
    )
    first, second = reading(path, tools_tokenizer).items
    assert first.prompt.startswith(f"[tools] {json.dumps(tools)}<|im_end|>[user] Ask.<|im_end|>[assistant] <call>")
    assert first.prompt.endswith(f"<call>{json.dumps(function)}</call><|im_end|>[tool] 3<|im_end|>[assistant] ")
    assert first.answer == "Reply.<|im_end|>" and second.answer == f"<call>{json.dumps(function)}</call><|im_end|>"
    assert second.example.references == (f"<call>{json.dumps(function)}</call>",)
    tools_tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", "(m['content'] or '')")
    said = refused(path, tools_tokenizer)
    assert "1 whose tool call the chat template leaves out" in said and "1 whose tools the chat" in said
    assert "the Alpaca template" in refused(path, tools_tokenizer, template="alpaca")


def test_prompts_and_completions_of_text_or_of_messages(tmp_path, tools_tokenizer):
    text = {"prompt": "The number 6 is", "completion": " small."}
    path = rows(tmp_path, {"prompt": [ASK], "completion": [ANSWER]}, text, {"prompt": [ASK], "completion": "Reply."})
    lists, strings, mixed = reading(path, tools_tokenizer).items
    assert lists.example == mixed.example and lists.answer == "Reply.<|im_end|>"
    assert strings.prompt + strings.answer == "[user] The number 6 is<|im_end|>[assistant]  small.<|im_end|>"
    assert strings.example.references == (" small.",)
    alpaca = reading(path, tools_tokenizer, template="alpaca").items
    assert tools_tokenizer.decode(alpaca[1].example.response_ids) == " small.<|im_end|>"
    only = rows(tmp_path, {"prompt": [ASK]}, {"prompt": "Ask."}, name="only.jsonl")
    assert "no column holds the response; name it with data.response" in refused(only, tools_tokenizer)
    (a, b) = reading(only, tools_tokenizer, need_responses=False).items
    assert a.example == b.example and a.example.response_ids == ()
    given = [ASK, ANSWER, {"role": "user", "content": "And?"}]
    path = rows(tmp_path, {"prompt": given, "completion": [ANSWER]})
    assert len(reading(path, tools_tokenizer, turns="all").items) == 1  # what the prompt says is given


def test_parts_of_text_are_joined_and_others_are_refused_by_name(tmp_path, tools_tokenizer):
    parts = [{"type": "text", "text": "It was "}, {"type": "text", "text": "calm."}]
    image = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": parts}
    path = rows(tmp_path, {"messages": [ASK, answer]}, {"messages": [{"role": "user", "content": image}, answer]})
    made = reading(path, tools_tokenizer)
    assert [i.answer for i in made.items] == ["It was calm.<|im_end|>"]
    assert made.counts.dropped == {"with image parts": 1} and "row 2" in made.counts.first["with image parts"]


def test_a_system_prompt_and_a_history_in_columns_of_their_own(tmp_path, tools_tokenizer):
    row = {"instruction": "And?", "output": "Reply.", "system": "Be brief.", "history": [["Ask.", "Reply."]], "id": 7}
    made = reading(rows(tmp_path, row), tools_tokenizer)
    (item,) = made.items
    assert item.prompt == (
        "[system] Be brief.<|im_end|>[user] Ask.<|im_end|>[assistant] Reply.<|im_end|>[user] And?<|im_end|>[assistant] "
    )
    assert made.counts.columns.unread == ["id"]
    alpaca = reading(rows(tmp_path, row), tools_tokenizer, template="alpaca").counts
    assert alpaca.columns.unread == ["system", "history", "id"] and "not read: system, history, id" in alpaca.lines()[1]


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"messages": [{"role": 5, "content": "Ask."}, ANSWER]}, "with a role that is no text", "a role is 5"),
        ({"messages": [{"content": "Ask."}, ANSWER]}, "a message without a role", "it needs the keys role"),
        ({"messages": [{"role": "user", "content": True}, ANSWER]}, "a bool in place of text", "content holds true"),
        ({"messages": []}, "without an instruction", "asks nothing"),
        ({"messages": [ANSWER]}, "without an instruction", "asks nothing"),
        ({"messages": [ASK, {"role": "assistant", "content": "  "}]}, "without a response", "turn is empty"),
        ({"messages": [ASK, ANSWER | {"weight": 0}]}, "marked as not to be trained on", "row 1"),
        ({"messages": [ASK, ANSWER | {"tool_calls": [{"function": {}}]}]}, "names no function", "no {name, arguments}"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "no JSON", "a function call is no JSON"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "with JSON text that is no JSON", "the column of tools is no JSON"),
        ({"messages": [ASK, ANSWER], "tools": [5]}, "with tools that are no functions", "tools must be a list"),
        ({"messages": [ASK, ANSWER], "tools": [{"function": 5}]}, "with tools that are no functions", "tools must be"),
        ({"messages": [ASK, ANSWER], "tools": {"type": "web"}}, "with tools that are no functions", "tools must be"),
        ({"prompt": "Ask.", "response": "Reply.", "history": ["Ask."]}, "with a history of no pairs", "[question"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, tools_tokenizer, row, reason, message):
    said = refused(rows(tmp_path, row), tools_tokenizer)
    assert reason in said and message in said and "row 1" in said


def test_nesting_has_an_end(tmp_path, tools_tokenizer):
    deep = {}
    for _ in range(100):
        deep = {"a": deep}
    row = {"messages": [ASK, ANSWER], "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]}
    assert "nested more than 64 levels deep" in refused(rows(tmp_path, row), tools_tokenizer)


def test_responses_of_every_type(tmp_path, tokenizer):
    responses = [
        7,
        2.5,
        True,
        ["one", "two"],
        None,
        "",
        "   ",
        {"a": 1},
        float("nan"),
        float("inf"),
        "    return x + 0\n",
    ]
    path = rows(tmp_path, *({"instruction": f"Give {i}.", "response": r} for i, r in enumerate(responses)))
    for template in ("alpaca", "chat"):
        made = reading(path, tokenizer, template=template)
        texts = [item.answer.removesuffix("<|im_end|>").rstrip() for item in made.items]
        assert texts == ["7", "2.5", "one", "    return x + 0"]
        kinds = {f"with a {kind} in place of text": 1 for kind in ("bool", "dict", "float")}
        assert made.counts.dropped == {"without a response": 4} | kinds
        assert made.counts.first["with a bool in place of text"].endswith("row 3, response holds true, not text")
        assert made.counts.first["with a float in place of text"].endswith("row 10, response holds inf, not text")
        assert made.counts.several == 1 and "several references, trained on the first: 1" in "\n".join(
            made.counts.lines()
        )
    spelled = tokenizer.decode(made.items[-1].example.response_ids)
    assert spelled == "    return x + 0\n<|im_end|>"  # a chat template strips what it strips, and no more is stripped


def test_a_parquet_file_does_not_fill_calls_with_what_other_rows_have(tmp_path, tools_tokenizer):
    def row(arguments):
        function = {"name": "f", "arguments": arguments}
        return {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]}

    made = [row({"a": 1}), row({"b": "x"})]
    datasets.Dataset.from_list(made).to_parquet(tmp_path / "a.parquet")
    answers = [item.answer for item in reading(tmp_path / "a.parquet", tools_tokenizer).items]
    assert answers == [i.answer for i in reading(rows(tmp_path, *made), tools_tokenizer).items]
    assert "null" not in answers[0]


def test_one_prompt_of_all_rows_is_said_with_the_remedy(tmp_path, tokenizer):
    path = rows(tmp_path, *({"instruction": "Say something.", "response": f"Something {i}."} for i in range(12)))
    config = DataConfig(source=str(path))
    with pytest.raises(ConfigError, match="hold out none with data.test = 0 .* or give data.test a file of its own"):
        load_data(config, tokenizer, seed=0)
    assert len(load_data(config.model_copy(update={"test": 0}), tokenizer, seed=0).train) == 12
    counts = reading(path, tokenizer).counts
    assert counts.repeated == (1, 12) and "prompts that occur more than once: 1, in 12 rows" in "\n".join(
        counts.lines()
    )


def test_text_data_is_spelled_as_it_is(tmp_path, tokenizer):
    """Byte-order mark, every line end, and letters of every kind."""
    text = '{"instruction": "Repeat: 👩\u200d🚀 e\u0301 你好", "response": "👩\u200d🚀 e\u0301 你好 𐍈"}'
    expected = reading(rows(tmp_path, json.loads(text)), tokenizer).items
    for end in ("\n", "\r\n", "\r"):
        path = tmp_path / "own.jsonl"
        path.write_bytes(("\ufeff" + end.join([text, text, ""])).encode())
        assert [i.example for i in reading(path, tokenizer).items] == [expected[0].example] * 2, repr(end)
    assert tokenizer.decode(expected[0].example.response_ids[:-1]) == "👩\u200d🚀 e\u0301 你好 𐍈"


# -- files that are no files, and mad JSON --------------------------------------------------------


def test_only_regular_files_are_read(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "full.csv").symlink_to("/dev/full")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("pipe.jsonl", "zero.jsonl", "full.csv"):
        assert "is a device or a pipe, not a file" in refused(tmp_path / name, tokenizer)
    assert "is a folder" in refused(tmp_path / "folder.parquet", tokenizer)
    assert "loop.jsonl" in refused(tmp_path / "loop.jsonl", tokenizer)
    with pytest.raises(ConfigError, match="data.text .* is a device or a pipe"):
        load_data(DataConfig(text=str(tmp_path / "pipe.jsonl")), tokenizer, seed=0)


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x.jsonl", "a" * 3000, "a" * 3000 + ".jsonl", "a\0b.jsonl"])
def test_paths_that_cannot_be_are_one_line(tokenizer, source, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert refused(source, tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 2 holds JSON that cannot be read: nested too deeply",
        ),
        ('{"instruction": ' + "9" * 5000 + "}", "line 2 holds JSON that cannot be read: a number of too many digits"),
    ],
)
def test_mad_json_is_one_line(tmp_path, tokenizer, line, message):
    path = tmp_path / "mad.jsonl"
    path.write_text('{"instruction": "Ask.", "response": "Reply."}\n' + line + "\n")
    assert message in refused(path, tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": ""}, "at least 1 character"),
        ({"test": True}, "data.test is true: give a number of rows"),
        ({"date": "yesterday"}, "'yesterday' is no day; write it like 2026-11-25"),
        ({"turns": "all"}, "turns is for conversations; set template = 'chat' too"),
        ({"turns": "first"}, "'last' or 'all'"),
        ({"template": "chat", "template_kwargs": {"messages": 1}}, "'messages' is not set here"),
        ({"template": "chat", "template_kwargs": {"x": float("nan")}}, "a template takes text, numbers"),
        ({"template_kwargs": {"enable_thinking": False}}, "template_kwargs is for conversations"),
    ],
)  # fmt: skip
def test_settings_that_have_no_meaning_are_refused(given, message):
    from mskd.config import DataSettings, parse

    with pytest.raises(ConfigError) as error:
        parse({"data": given}, kind=DataSettings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_a_family_cannot_hold_leaves_the_others(tmp_path):
    good = {"messages": [ASK, ANSWER]}
    bad = {"messages": [ASK, ASK, ANSWER]}
    made = reading(rows(tmp_path, good, bad, good), CONVENTIONS["llama 2"].tokenizer())
    assert made.counts.used == 2 and [item.row for item in made.items] == [1, 3]


# -- anything in any column -----------------------------------------------------------------------

TEXT = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(
    ["<|im_end|>", "{}", "[1]", "user", "assistant"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANY = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=6)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation"])
CALL = st.fixed_dictionaries({"name": TEXT | ANY}, optional={"arguments": TEXT | ANY, "id": ANY})
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE | SCALAR, "content": TEXT | ANY},
    optional={
        "tool_calls": st.lists(CALL | CALL.map(lambda c: {"function": c}) | ANY, max_size=2) | ANY,
        "from": ROLE, "value": ANY, "name": ANY, "reasoning_content": ANY, "weight": ANY,
    },
)  # fmt: skip
TOOL = st.fixed_dictionaries({}, optional={"function": CALL | ANY, "name": TEXT, "type": TEXT, "parameters": ANY})
CELL = ANY | st.lists(TOOL, max_size=2) | st.lists(MESSAGE, max_size=4)
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "tools",
    "system",
    "history",
)
TOKENIZER = CONVENTIONS["qwen3"].tokenizer()


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELL, min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([("alpaca", "last"), ("chat", "last"), ("chat", "all")]),
    st.booleans(),
)
def test_whatever_a_row_holds_it_is_read_or_refused_in_one_line(made, how, need_responses):
    template, turns = how
    with mock.patch("mskd.data.instructions.read_rows", return_value=made):
        try:
            found = reading("any.jsonl", TOKENIZER, need_responses, template=template, turns=turns)
        except ConfigError as error:
            assert str(error).strip()
            return
    counts = found.counts
    assert counts.used == len(found.groups) and counts.used + counts.dropped.total() == len(made)
    for item in found.items:
        assert all(isinstance(i, int) for i in (*item.example.prompt_ids, *item.example.response_ids))
        assert item.example.response_ids or not need_responses
    assert counts.lines() and json.dumps(counts.as_dict())
