"""Data: exact boundaries, splits, fingerprints, every format and every error line."""

import csv
import json
import logging
import re
from collections import Counter
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mskd.config import ConfigError, DataConfig
from mskd.data.instructions import (
    ALPACA,
    ALPACA_CONTEXT,
    end_token_id,
    load_data,
    load_items,
    load_text,
    order,
)
from mskd.data.rows import DEMO
from mskd.models.batch import SequenceBatch

ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Say the number {i}.",
        "context": None if i % 2 else f"It is number {i}.",
        "response": f"It is {i:03d}.",
    }
    for i in range(40)
]


def write(path, rows):
    """Rows to a file of the kind that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def load(path, tokenizer, seed=0, need_responses=True, **config):
    config = {"max_prompt_tokens": 1000, "max_tokens": 1024, **config}
    return load_data(DataConfig(source=str(path), **config), tokenizer, seed=seed, need_responses=need_responses)


def everything(splits):
    return [*splits.train, *splits.validation, *splits.test]


# -- prompt and response --------------------------------------------------------------------------


def test_alpaca_prompts_are_those_of_the_released_code(tmp_path, tokenizer):
    splits = load(write(tmp_path / "a.jsonl", ROWS[:2]), tokenizer, test=0)
    assert splits.train[0].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay the number 0.\n\n### Input:\nIt is number 0.\n\n### Response:\n"
    )
    assert splits.train[1].prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay the number 1.\n\n### Response:\n"
    )


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_ids_spell_prompt_and_response_and_end_once(tmp_path, tokenizer, template):
    splits = load(write(tmp_path / "a.jsonl", ROWS), tokenizer, template=template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for e in everything(splits):
        assert tokenizer.decode(e.prompt_ids) == e.prompt
        assert e.response_ids[-1] == tokenizer.eos_token_id
        assert e.response_ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(e.response_ids[:-1]) == e.references[0]


def test_the_boundary_is_exact_where_a_merge_would_cross_it(tmp_path):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges across words
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["\nYes"] * 20,
        trainers.BpeTrainer(
            special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    (e,) = load(write(tmp_path / "a.jsonl", [{"prompt": "Really?", "answer": "Yes"}]), tokenizer, test=0).train
    joint = tokenizer(e.prompt + "Yes").input_ids
    assert joint[: len(e.prompt_ids)] != list(e.prompt_ids)  # a merge did cross: the test can fail
    assert list(e.prompt_ids) == tokenizer(e.prompt).input_ids  # what sampling starts from
    assert tokenizer.decode(e.prompt_ids + e.response_ids[:-1]) == e.prompt + "Yes"


def test_special_tokens_in_the_data_are_text_and_a_spelled_out_end_is_not_doubled(tmp_path, tokenizer):
    rows = [
        {"instruction": "What is <|im_end|>?", "response": "The token <|im_end|> ends a turn."},
        {"instruction": "Say hello.", "response": "Hello.<|im_end|>"},
    ]
    first, second = load(write(tmp_path / "a.jsonl", rows), tokenizer, test=0).train
    end = tokenizer.eos_token_id
    assert end not in first.prompt_ids
    assert first.response_ids.count(end) == 1 and first.response_ids[-1] == end
    assert tokenizer.decode(first.response_ids[:-1]) == rows[0]["response"]
    assert tokenizer.decode(second.response_ids) == "Hello.<|im_end|>"


def test_start_tokens_of_the_tokenizer_stay_and_its_end_token_goes(tmp_path, tokenizer):
    tokenizer.add_bos_token = True
    tokenizer.add_eos_token = True
    assert tokenizer("x").input_ids[-1] == tokenizer.eos_token_id
    (e,) = load(write(tmp_path / "a.jsonl", ROWS[:1]), tokenizer, test=0).train
    assert e.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in e.prompt_ids
    assert tokenizer.bos_token_id not in e.response_ids
    assert e.response_ids.count(tokenizer.eos_token_id) == 1


def test_a_response_is_cut_at_max_tokens_and_then_has_no_end(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    (whole,) = load(path, tokenizer, test=0).train
    room = len(whole.prompt_ids) + len(whole.response_ids)
    (fits,) = load(path, tokenizer, test=0, max_tokens=room).train
    (cut,) = load(path, tokenizer, test=0, max_tokens=room - 1).train
    assert fits == whole
    assert cut.response_ids == whole.response_ids[:-1]  # all but the end token: the answer does not end there
    assert cut.prompt_ids == whole.prompt_ids and cut.references == whole.references


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path, tokenizer, caplog):
    rows = [
        *ROWS[:3],
        {"instruction": " \n", "response": "x"},
        {"instruction": None, "response": "x"},
        {"instruction": "No answer?", "response": ""},
        {"instruction": "long " * 200, "response": "x"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        splits = load(path, tokenizer, test=0, max_prompt_tokens=250)
    assert len(splits.train) == 3
    assert "4 of 7 rows dropped" in caplog.text
    assert "2 without an instruction" in caplog.text
    assert "1 without a response" in caplog.text
    assert "1 with a prompt over 250 tokens" in caplog.text
    assert len(load(path, tokenizer, test=0, max_prompt_tokens=250, need_responses=False).train) == 4


def test_the_longest_prompt_allowed_is_max_prompt_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    length = len(load(path, tokenizer, test=0).train[0].prompt_ids)
    assert len(load(path, tokenizer, test=0, max_prompt_tokens=length).train) == 1
    assert len(load(path, tokenizer, test=0, max_tokens=length + 1).train[0].response_ids) == 1
    for limit in ({"max_prompt_tokens": length - 1}, {"max_tokens": length}):
        with pytest.raises(ConfigError, match=r"none of its 1 rows can be used: 1 with a prompt over"):
            load(path, tokenizer, test=0, **limit)


def test_several_references_are_kept_and_the_first_is_trained_on(tmp_path, tokenizer):
    rows = [{"question": "Which metal is it?", "answers": ["Gold.", "  It is gold. ", "", None]}]
    (e,) = load(write(tmp_path / "a.jsonl", rows), tokenizer, test=0).train
    assert e.references == ("Gold.", "  It is gold.")
    assert tokenizer.decode(e.response_ids[:-1]) == "Gold."


def test_prompts_alone_are_enough_where_no_response_is_needed(tmp_path, tokenizer):
    rows = [{"prompt": f"Tell me about {i}."} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    splits = load(path, tokenizer, test=1, need_responses=False)
    assert len(splits.train) == 3 and len(splits.test) == 1
    assert all(e.response_ids == () and e.references == () for e in everything(splits))
    with pytest.raises(ConfigError, match="no column holds the response; name it with data.response; .*there: prompt$"):
        load(path, tokenizer, test=1)


def test_odd_text_survives(tmp_path, tokenizer):
    row = {"instruction": "Line one\r\nline two\r\u2028 漢字 😀 {braces} {0}", "response": " é\ud83d\u00a0x\r\ny "}
    path = write(tmp_path / "a.jsonl", [row])
    (e,) = load(path, tokenizer, test=0).train
    assert "### Instruction:\nLine one\nline two\n\u2028 漢字 😀 {braces} {0}\n\n### Response:\n" in e.prompt
    assert e.references == (" é?\u00a0x\ny",)  # half a surrogate pair is no text
    assert tokenizer.decode(e.prompt_ids) == e.prompt
    path.write_text('{"instruction": "one\u2028line", "response": "\x85 x"}\n', encoding="utf-8")  # unescaped
    assert "one\u2028line" in load(path, tokenizer, test=0).train[0].prompt


# -- chat -----------------------------------------------------------------------------------------

CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": f"And {i}?"},
            {"role": "assistant", "content": f"Also {i}."},
        ]
    }
    for i in range(4)
]


def test_the_last_assistant_turn_is_the_response(tmp_path, tokenizer):
    splits = load(write(tmp_path / "a.jsonl", CHAT), tokenizer, test=0, template="chat")
    assert splits.train[1].prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert splits.train[1].references == ("Also 1.",)
    # As a whole it is what the template itself makes of the conversation.
    whole = tokenizer.apply_chat_template(CHAT[1]["messages"], tokenize=False)
    assert tokenizer.decode(splits.train[1].prompt_ids + splits.train[1].response_ids) == whole.rstrip("\n")


def test_instruction_rows_become_one_user_turn(tmp_path, tokenizer):
    first, second = load(write(tmp_path / "a.jsonl", ROWS[:2]), tokenizer, test=0, template="chat").train
    assert first.prompt == ("<|im_start|>user\nSay the number 0.\n\nIt is number 0.<|im_end|>\n<|im_start|>assistant\n")
    assert second.prompt == "<|im_start|>user\nSay the number 1.<|im_end|>\n<|im_start|>assistant\n"
    assert first.prompt_ids[0] == tokenizer.bos_token_id  # the template's own, not text


def test_other_shapes_of_messages(tmp_path, tokenizer):
    single = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    for name, messages in (("messages", single), ("conversations", sharegpt)):
        for template in ("chat", "alpaca"):
            path = write(tmp_path / f"{name}.jsonl", [{"id": 1, name: messages}])
            (e,) = load(path, tokenizer, test=0, template=template).train
            assert e.references == ("Hello.",)
            assert ("### Instruction:\nHi\n\n" if template == "alpaca" else "user\nHi<|im_end|>") in e.prompt
    path = write(tmp_path / "open.jsonl", [{"messages": single[:1]}])
    (e,) = load(path, tokenizer, test=0, template="chat", need_responses=False).train
    assert e.prompt.endswith("Hi<|im_end|>\n<|im_start|>assistant\n") and e.response_ids == ()


def test_the_end_token_is_the_templates_end_of_turn(tmp_path, tokenizer):
    assert end_token_id(tokenizer, "chat") == end_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"  # as in base models with a chat template
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_token_id(tokenizer, "chat") == turn
    assert end_token_id(tokenizer, "alpaca") == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (e,) = load(write(tmp_path / "a.jsonl", CHAT[:1]), tokenizer, test=0, template="chat").train
    assert e.response_ids[-1] == turn and e.response_ids.count(turn) == 1
    tokenizer.chat_template = "<|im_start|>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    assert end_token_id(tokenizer, "chat") == tokenizer.eos_token_id  # a template without an end of turn


# -- batches --------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 5), max_size=6)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(ids.filter(bool), ids), max_size=5))
def test_positions_and_targets_are_those_of_a_plain_loop(pairs):
    pad = 2  # occurs in prompts and responses too, as where pad == eos
    batch = SequenceBatch.from_sequences([p for p, _ in pairs], [r for _, r in pairs], pad)
    width = max((len(p) + len(r) for p, r in pairs), default=0)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(pairs), width)
    positions, targets = [], []
    for b, (prompt, response) in enumerate(pairs):
        sequence = prompt + response
        for t in range(width):
            inside = t < len(sequence)
            assert batch.input_ids[b, t] == (sequence[t] if inside else pad)
            assert batch.attention_mask[b, t] == inside
            if len(prompt) <= t + 1 < len(sequence):
                positions.append(b * width + t)
                targets.append(sequence[t + 1])
    assert batch.positions.tolist() == positions and batch.targets.tolist() == targets
    for tensor in (batch.input_ids, batch.attention_mask, batch.positions, batch.targets):
        assert tensor.dtype == torch.int64


def test_a_batch_scores_responses_as_single_sequences_do(tiny_llama_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64)
    prompts = [tokenizer(p).input_ids for p in ("Hi", "Write a response", "x")]
    responses = [tokenizer(r).input_ids + [tokenizer.eos_token_id] for r in ("there", "", "that is a task")]
    batch = SequenceBatch.from_sequences(prompts, responses, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        got = logits.flatten(0, 1)[batch.positions].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        expected = []
        for prompt, response in zip(prompts, responses, strict=True):
            for i, token in enumerate(response):
                step = model(input_ids=torch.tensor([prompt + response[:i]])).logits[0, -1]
                expected.append(step.log_softmax(-1)[token])
    # A Llama's norms and rotary embedding compute in fp32: 1e-6. One token off: 0.3 and more.
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-4)


def test_batches_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        SequenceBatch.from_sequences([[1], [2]], [[1]], 0)
    with pytest.raises(ValueError, match="a prompt has no token"):
        SequenceBatch.from_sequences([[1], []], [[1], [2]], 0)


def test_to_moves_every_tensor():
    batch = SequenceBatch.from_sequences([[1, 2]], [[3]], 0).to("meta")
    assert all(getattr(batch, f).is_meta for f in ("input_ids", "attention_mask", "positions", "targets"))


def test_order_is_a_permutation_of_its_own_for_each_epoch_and_seed():
    assert order(8, 0, 0) == [7, 4, 1, 2, 3, 0, 6, 5]  # for ever: runs are resumed on other machines
    orders = {tuple(order(50, epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert order(0, 0, 0) == []


# -- splits and fingerprint -----------------------------------------------------------------------


def test_splits_are_disjoint_complete_and_drawn_by_the_seed(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    splits = load(path, tokenizer, seed=3, test=7, validation=5)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [28, 5, 7]
    assert len({e.prompt for e in everything(splits)}) == 40
    assert load(path, tokenizer, seed=3, test=7, validation=5) == splits
    other = load(path, tokenizer, seed=4, test=7, validation=5)
    assert {e.prompt for e in other.test} != {e.prompt for e in splits.test}
    numbers = [int(e.references[0][6:9]) for e in splits.train]
    assert numbers == sorted(numbers)  # train keeps the order of the file; `order` shuffles it
    # More validation leaves the test as it is.
    assert load(path, tokenizer, seed=3, test=7, validation=9).test == splits.test


def test_by_default_a_tenth_is_the_test(tmp_path, tokenizer):
    assert len(load(write(tmp_path / "a.jsonl", ROWS), tokenizer).test) == 4
    assert len(load(write(tmp_path / "b.jsonl", ROWS[:5]), tokenizer).test) == 1


def test_the_test_can_be_a_file_of_its_own(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS[:30])
    other = write(tmp_path / "t.csv", [{"Question": r["instruction"], "Answer": r["response"]} for r in ROWS[31::2]])
    splits = load(path, tokenizer, test=str(other), validation=2)
    assert len(splits.train) == 28
    assert [e.references[0] for e in splits.test] == [r["response"] for r in ROWS[31::2]]


def test_no_prompt_is_trained_on_and_tested(tmp_path, tokenizer, caplog):
    rows = [row | {"response": f"{row['response']} {k}"} for row in ROWS[:10] for k in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        splits = load(path, tokenizer, test=4, validation=3)
    prompts = [{e.prompt for e in s} for s in (splits.train, splits.validation, splits.test)]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert len(splits.test) == 4 and len(splits.validation) == 3
    left = 30 - 7 - len(splits.train)
    assert left > 0 and f"{left} rows dropped: with the prompt of a test or validation row" in caplog.text
    own = write(tmp_path / "t.jsonl", ROWS[:4])
    assert len(load(path, tokenizer, test=str(own)).train) == 18


def test_limit_counts_before_the_split(tmp_path, tokenizer):
    splits = load(write(tmp_path / "a.jsonl", ROWS), tokenizer, limit=10, test=3)
    assert {e.references[0] for e in everything(splits)} == {row["response"] for row in ROWS[:10]}


def test_the_fingerprint_changes_with_content_and_with_nothing_else(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    base = dict(test=5, validation=3)
    seen = load(path, tokenizer, **base).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", seen)

    renamed = [{"question": r["instruction"], "input": r["context"], "output": r["response"], "id": 1} for r in ROWS]
    (tmp_path / "deep").mkdir()
    same = {
        "path": load(write(tmp_path / "deep" / "b.jsonl", ROWS), tokenizer, **base),
        "kind": load(write(tmp_path / "b.parquet", ROWS), tokenizer, **base),
        "names of columns": load(write(tmp_path / "c.csv", renamed), tokenizer, **base),
        "columns named": load(path, tokenizer, **base, instruction="instruction", response="response"),
        "limit that cuts nothing": load(path, tokenizer, **base, limit=1000),
        "lengths that cut nothing": load(path, tokenizer, **base, max_tokens=1000, max_prompt_tokens=999),
        "split of a hub id": load(path, tokenizer, **base, split="other"),
        "spaces around": load(write(tmp_path / "d.json", [r | {"response": r["response"] + " \r\n"} for r in ROWS]),
                              tokenizer, **base),
    }  # fmt: skip
    assert {what: s.fingerprint == seen for what, s in same.items()} == dict.fromkeys(same, True)

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one\ntwo\n")
    edited = [r | {"response": r["response"].replace("017", "17")} for r in ROWS]
    extra = [r | {"response": [r["response"], "Another."]} if i == 4 else r for i, r in enumerate(ROWS)]
    changed = {
        "a character": load(write(tmp_path / "e.jsonl", edited), tokenizer, **base),
        "a reference": load(write(tmp_path / "f.jsonl", extra), tokenizer, **base),
        "order": load(write(tmp_path / "g.jsonl", ROWS[::-1]), tokenizer, **base),
        "a row": load(write(tmp_path / "h.jsonl", ROWS[:-1]), tokenizer, **base),
        "seed": load(path, tokenizer, seed=1, **base),
        "test": load(path, tokenizer, test=6, validation=3),
        "validation": load(path, tokenizer, test=5, validation=4),
        "template": load(path, tokenizer, template="chat", **base),
        "column": load(path, tokenizer, context="response", response="context", need_responses=False, **base),
        "limit": load(path, tokenizer, limit=30, **base),
        "max_tokens": load(path, tokenizer, max_tokens=100, **base),
        "text": load(path, tokenizer, text=str(corpus), **base),
    }
    corpus.write_text("one\nthree\n")
    changed["text that changed"] = load(path, tokenizer, text=str(corpus), **base)
    changed["tokens"] = load(path, _shifted(tokenizer), **base)
    prints = [seen, *(s.fingerprint for s in changed.values())]
    assert len(set(prints)) == len(prints), Counter(prints).most_common(1)


def _shifted(tokenizer):
    """The same tokenizer, but for how it spells one word."""
    tokenizer.add_tokens(["number"])
    return tokenizer


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "A.JSONL", "odd [1]*.csv", "odd [1]*.parquet"]
)
def test_every_format_gives_the_same_examples_and_leaves_nothing_behind(tmp_path, tokenizer, name, capfd):
    expected = load(write(tmp_path / "expected.jsonl", ROWS), tokenizer, test=4)
    folder = tmp_path / "user"
    folder.mkdir()
    path = write(folder / name.lower(), ROWS).rename(folder / name)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    capfd.readouterr()
    assert load(path, tokenizer, test=4) == expected
    assert capfd.readouterr() == ("", "")  # no progress bars
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert datasets.is_progress_bar_enabled()  # off while we read, as it was afterwards


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_windows_files_with_a_byte_order_mark(tmp_path, tokenizer, name):
    path = write(tmp_path / name, [{"instruction": "Two\nlines?", "response": 'Yes,\n"two".'}])
    text = path.read_text().replace("\r\n", "\n").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (e,) = load(path, tokenizer, test=0).train
    assert "### Instruction:\nTwo\nlines?\n\n### Response" in e.prompt and e.references == ('Yes,\n"two".',)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_values_are_never_reinterpreted(tmp_path, tokenizer, name):
    answers = ["2020-01-01", "2021-12-31"], ["007", "1.50"], ["NA", "null"], ["true", "1e5"]
    for column in answers:
        rows = [{"instruction": f"Say {a}", "response": a} for a in column]
        splits = load(write(tmp_path / name, rows), tokenizer, test=0)
        assert [e.references[0] for e in splits.train] == column


def test_numbers_are_spelled_and_missing_cells_are_empty(tmp_path, tokenizer):
    rows = [{"instruction": "How many?", "response": 5}, {"instruction": 7, "context": None, "response": 2.5}]
    first, second = load(write(tmp_path / "a.jsonl", rows), tokenizer, test=0).train
    assert first.references == ("5",) and second.references == ("2.5",)
    assert first.prompt == ALPACA.format(instruction="How many?") and second.prompt == ALPACA.format(instruction="7")
    rows = [{"instruction": "a", "response": 1.5}, {"instruction": "b", "response": float("nan")}]
    assert len(load(write(tmp_path / "a.parquet", rows), tokenizer, test=0).train) == 1


def test_a_table_with_an_index_column(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text(",instruction,response\n0,Hi,Hello.\n1,Bye,\n")
    (e,) = load(path, tokenizer, test=0).train
    assert e.references == ("Hello.",)


@pytest.mark.parametrize(
    ("columns", "prompt", "reference"),
    [
        (("instruction", "input", "output"), ALPACA_CONTEXT, "c"),
        (("Instruction", "Context", "Response"), ALPACA_CONTEXT, "c"),
        (("question", "context", "answer"), ALPACA_CONTEXT, "c"),
        (("input", "meta", "output"), ALPACA, "c"),
        (("prompt", "other", "completion"), ALPACA, "c"),
        (("query", "id", "answers"), ALPACA, "c"),
    ],
)
def test_columns_are_found_by_their_usual_names(tmp_path, tokenizer, columns, prompt, reference):
    path = write(tmp_path / "a.jsonl", [dict(zip(columns, ("a", "b", "c"), strict=True))])
    (e,) = load(path, tokenizer, test=0).train
    assert e.prompt == prompt.format(instruction="a", context="b") and e.references == (reference,)


def test_a_list_of_one_turn_is_an_instruction(tmp_path, tokenizer):
    path = write(tmp_path / "vicuna.jsonl", [{"question_id": 1, "category": "generic", "turns": ["How?"]}])
    (item,), _ = load_items(DataConfig(source=str(path)), tokenizer)
    assert item.prompt == ALPACA.format(instruction="How?") and item.references == ()
    write(path, [{"turns": ["How?", "Why?"]}])
    with pytest.raises(ConfigError, match="row 1, turns holds a list, not text"):
        load_items(DataConfig(source=str(path)), tokenizer)


def test_columns_that_are_named_win(tmp_path, tokenizer):
    row = {"instruction": "no", "response": "no", "messages": [], "ask": "a", "extra": "b", "say": "c"}
    path = write(tmp_path / "a.jsonl", [row])
    (e,) = load(path, tokenizer, test=0, instruction="ask", context="extra", response="say").train
    assert e.prompt == ALPACA_CONTEXT.format(instruction="a", context="b") and e.references == ("c",)
    (e,) = load(path, tokenizer, test=0, response="instruction", instruction="ask").train
    assert e.references == ("no",) and "### Input" not in e.prompt


def test_the_hub_is_asked_for_id_subset_split_and_revision(tmp_path, tokenizer, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("owner/some-data:part", tokenizer, split="train[:40]", revision="abc")
    assert calls == [(("owner/some-data", "part"), {"split": "train[:40]", "revision": "abc"})]
    calls.clear()
    load(write(tmp_path / "a.jsonl", CHAT), tokenizer, test="owner/tests", template="chat")
    assert calls == [(("owner/tests", None), {"split": "test", "revision": None})]

    def refuse(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/x' doesn't exist.\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError) as error:
        load("owner/x", tokenizer)
    assert str(error.value) == (
        "data.source 'owner/x' is no local file, and its split 'train' on the hub: Dataset 'owner/x' doesn't exist."
    )


# -- errors, each one line ------------------------------------------------------------------------


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "instruction,response\n", "holds no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "line 3 is no valid JSON: Expecting value"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "line 2 is no valid JSON: Expecting ':' delimiter"),
        ("a.jsonl", '{"a": 1}\n5\n', "row 2 is no object with columns but int"),
        ("a.jsonl", b"\xff\xfe\x00", "is not UTF-8 text: invalid start byte at byte 0"),
        ("a.csv", b"instruction,response\nx,\xe9\xe8\n", "is not UTF-8 text: invalid continuation byte"),
        ("a.csv", 'instruction,response\n"x\nx",y\n\na,b,c\n', "line 5 is no valid CSV: 3 cells under a header of 2"),
        ("a.csv", 'instruction,response\nx,"y\n', "line 2 is no valid CSV: unexpected end of data"),
        ("a.parquet", "no parquet", "cannot be read as Parquet: Parquet magic bytes not found"),
        ("a.tsv", "x", "is of no known kind; allowed: .json .jsonl .csv .parquet"),
        ("a.jsonl", '{"instruction": ["x"], "response": "y"}', "row 1, instruction holds a list, not text"),
        ("a.jsonl", '{"instruction": "x", "response": {"text": "y"}}', "row 1, response holds a dict, not text"),
        ("a.jsonl", '{"ask": "x", "say": "y"}', "name it with data.instruction; columns there: ask, say"),
        ("a.jsonl", '{"instruction": "", "response": "y"}', "none of its 1 rows can be used: 1 without an instruction"),
        ("a.jsonl", '{"messages": "hello"}', "row 1: messages must be a list of {role, content}, not str"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', "row 1: a message has no role"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "row 1: the messages have no assistant turn"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path, tokenizer, name, content, message):
    path = bad(tmp_path, name, content)
    with pytest.raises(ConfigError) as error:
        load(path, tokenizer)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"response": "respnse"}, "data.response = 'respnse' is no column; did you mean 'response'?; columns there: "),
        ({"messages": "talk"}, "data.messages = 'talk' is no column; columns there: instruction, context, response"),
        ({"messages": "context", "response": "response"}, "data.messages takes the place of data.instruction, context"),
        ({"test": 40}, "has 40 usable rows: 40 for the test (data.test) and 0 for the validation"),
        ({"test": 1000}, "has 40 usable rows: 1000 for the test"),
        ({"test": 20, "validation": 20}, "20 for the test (data.test) and 20 for the validation"),
        ({"test": "a.jsonl"}, "all rows left to train on have the prompt of a test or validation row"),
        ({"test": "tset.jsonl"}, "data.test 'tset.jsonl' does not exist; did you mean 'test.jsonl'?"),
        ({"text": "corpus.md"}, "data.text 'corpus.md' does not exist"),
        ({"text": "a.csv"}, "data.text 'a.csv' is of no known kind; allowed: .txt .jsonl"),
        ({"text": "a.jsonl"}, "data.text 'a.jsonl': no column `text`; columns there: instruction, context, response"),
        ({"text": "empty.txt"}, "data.text 'empty.txt' holds no text"),
        ({"source": "folder"}, "data.source 'folder' is a folder; give a file of it (.json .jsonl .csv .parquet)"),
        ({"source": "b.jsonl"}, "data.source 'b.jsonl' does not exist; did you mean 'a.jsonl'?"),
        ({"source": "x" * 300 + ".csv"}, ".csv' is no path that can be used here: File name too long"),
        ({"source": "no/such/folder/here"}, "data.source 'no/such/folder/here' does not exist; give a file"),
    ],
)  # fmt: skip
def test_bad_configurations_are_one_line(tmp_path, tokenizer, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.csv", "test.jsonl"):
        write(tmp_path / name, ROWS)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        load(config.pop("source", "a.jsonl"), tokenizer, **config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_templates_that_cannot_hold_the_data(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", CHAT)
    with pytest.raises(ConfigError, match=r"row 1: 4 turns come before the response.*set data.template = 'chat'$"):
        load(path, tokenizer, test=0)
    tokenizer.chat_template = "{{ raise_exception('no system turns\nhere') }}"
    with pytest.raises(ConfigError, match=r"refuses the turns user, assistant: no system turns$"):
        load(path, tokenizer, test=0, template="chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"a.jsonl, row 1: .* refuses the turns system, user, .*: no system turns$"):
        load(path, tokenizer, test=0, template="chat")
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigError, match=r"^data.template is 'chat', but the tokenizer has no chat template; use 'alp"
    ):
        load(path, tokenizer, test=0, template="chat")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="^the tokenizer has no end-of-text token"):
        load(write(tmp_path / "b.jsonl", ROWS), tokenizer)


# -- plain text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl"])
def test_text_is_packed_with_an_end_after_each_document(tmp_path, tokenizer, name):
    documents = ["The first document.", "A second <|im_end|> one, é 漢字!", "x"]
    path = tmp_path / name
    if name.endswith("txt"):
        path.write_bytes(("\ufeff" + "\r\n\r\n".join(documents) + "\r\n").encode())
    else:
        write(path, [{"text": d} for d in documents] + [{"text": None}])
    blocks = load_text(str(path), tokenizer, 16)
    stream = [i for block in blocks for i in block]
    assert all(len(block) == 16 for block in blocks[:-1]) and 2 <= len(blocks[-1]) <= 16
    end = tokenizer.eos_token_id
    assert stream.count(end) == 3 and stream[-1] == end
    pieces: list[str] = []
    piece: list[int] = []
    for i in stream:
        if i == end:
            pieces.append(tokenizer.decode(piece))
            piece = []
        else:
            piece.append(i)
    assert pieces == documents


def test_a_last_block_of_one_token_is_left_out(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcd")  # four bytes and an end token
    assert [len(b) for b in load_text(str(tmp_path / "a.txt"), tokenizer, 4)] == [4]
    assert [len(b) for b in load_text(str(tmp_path / "a.txt"), tokenizer, 3)] == [3, 2]


# -- the demo's data ------------------------------------------------------------------------------


def demo_rows():
    return [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]


def test_the_demo_has_its_own_test(tokenizer):
    splits = load("demo", tokenizer)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [250, 0, 50]
    rows = demo_rows()
    assert [e.references[0] for e in splits.test] == [r["response"] for r in rows if r["split"] == "test"]
    fewer = load("demo", tokenizer, seed=5, test=8, validation=10)
    assert fewer.test == splits.test[:8] and len(fewer.train) == 240
    assert set(fewer.train) | set(fewer.validation) == set(splits.train)
    assert load("demo", tokenizer, test=500).test == splits.test
    assert load("demo", tokenizer, limit=20, test=3).train == splits.train[:20]


def test_the_demo_test_can_judge_other_data(tmp_path, tokenizer):
    splits = load(write(tmp_path / "a.jsonl", ROWS), tokenizer, test="demo")
    assert splits.test == load("demo", tokenizer).test and len(splits.train) == 40


def test_the_demo_rows_are_whole():
    rows = demo_rows()
    assert len(rows) == 300
    assert all(list(row) == ["instruction", "context", "response", "category", "split"] for row in rows)
    assert all(isinstance(v, str) and v == v.strip() and "  " not in v for row in rows for v in row.values())
    counts = Counter((row["category"], row["split"]) for row in rows)
    assert len(counts) == 16 and Counter(row["split"] for row in rows) == {"train": 250, "test": 50}
    assert all(n in ((6, 7) if split == "test" else (30, 31, 32)) for (_, split), n in counts.items())
    for row in rows:
        assert 6 <= len(f"{row['instruction']} {row['context']}".split()) <= 35, row
        assert 5 <= len(row["response"].split()) <= 35, row
        assert bool(row["context"]) == (row["category"] in ("rewriting", "classification", "reading")), row
    assert len({row["instruction"] for row in rows}) == len({row["response"] for row in rows}) == 300


def test_no_six_words_of_the_demo_test_are_in_its_train_rows():
    grams: dict[str, set[tuple[str, ...]]] = {"train": set(), "test": set()}
    for row in demo_rows():
        words = re.findall(r"[\w']+", f"{row['instruction']} {row['context']} {row['response']}".lower())
        grams[row["split"]] |= {tuple(words[i : i + 6]) for i in range(len(words) - 5)}
    assert len(grams["test"]) > 500
    assert not grams["train"] & grams["test"]
