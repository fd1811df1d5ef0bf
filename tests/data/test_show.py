"""`mskd data`: what is trained on, for a user to see; plain in a pipe, bold on a terminal, JSON in the last line."""

import json

import pytest
from tiny import build_llama, build_tokenizer

from mskd.data import rendering
from mskd.data.show import visible

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Ask <|im_end|>?"},
    {"role": "assistant", "content": "Reply.\x1b[2J"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "    Two\nlines."},
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [{"messages": TURNS, "id": i} for i in range(3)] + [{"messages": TURNS[:4], "id": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_counts_items_and_a_document(run, rows, tiny_llama_folder):
    given = ["data", rows, "--model", tiny_llama_folder, "--set", "data.template=chat", "--set", "data.test=0"]
    code, out, err = run(*given, "--items", "1")
    assert code == 0 and not err
    assert out[:-1] == [
        f"{rows}: 3 of 4 rows used (train 3)",
        "  columns: messages; not read: id",
        f"  dropped: 1 without a response; the first: {rows}, row 4: it ends with a user turn",
        "  dropped, but prompts for minillm and evaluation: 1",
        "  earlier assistant turns that are not trained on: 3 (data.turns = 'last')",
        "  prompts that occur more than once: 1, in 3 rows",
        out[6],
        out[7],
        "",
        f"item 1 (row 1, train): {out[9].split(': ')[1]}",
        "prompt  | <|im_start|>system",
        "        | Be brief.<|im_end|>",
        "        | <|im_start|>user",
        "        | Ask <|im_end|>?<|im_end|>",
        "        | <|im_start|>assistant",
        "        | Reply.\\x1b[2J<|im_end|>",
        "        | <|im_start|>user",
        "        | And?<|im_end|>",
        "        | <|im_start|>assistant",
        "        | ",
        "trained |     Two",
        "        | lines.<|im_end|>",
        "written in the data, so text and no token: <|im_end|>",
    ]
    document = json.loads(out[-1])
    (item,) = document["items"]
    ids = item["prompt_ids"], item["response_ids"]
    assert (document["rows"], document["used"], document["dropped"]) == (4, 3, {"without a response": 1})
    long, short = map(len, ids)
    assert out[6] == f"  prompt tokens: {long} to {long} (5 % {long}, median {long}, 95 % {long})"
    assert out[9].endswith(f"{long} prompt tokens, {short} trained")
    assert item["response"] == "    Two\nlines.<|im_end|>" and item["split"] == "train" and item["row"] == 1
    tokenizer = build_tokenizer()
    assert [tokenizer.decode(part) for part in ids] == [item["prompt"], item["response"]]
    code, out, _ = run(*given, "--items", "0", "--set", "data.turns=all")
    assert json.loads(out[-1])["turns"] == 7 and json.loads(out[-1])["items"] == [] and json.loads(out[-1])["used"] == 4


def test_on_a_terminal_what_is_trained_on_is_bold(run, rows, tiny_llama_folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    given = ["data", rows, "--model", tiny_llama_folder, "--set", "data.template=chat", "--set", "data.test=0"]
    code, out, _ = run(*given, "--items", "1")
    text = "\n".join(out[:-1])
    assert code == 0 and json.loads(out[-1])["used"] == 3
    assert "\x1b[1m    Two\x1b[0m\n\x1b[1mlines.\x1b[0m" in text and "\x1b[1;36m<|im_end|>\x1b[0m" in text  # trained
    assert "\x1b[2;36m<|im_start|>\x1b[0m" in text and "\x1b[2;36m<|im_end|>\x1b[0m" in text  # the template's
    assert "\x1b[2m<|im_end|>\x1b[0m" in text  # what looks like it, and is text
    assert "\x1b[2J" not in text and "\\x1b[2J" in text  # the data does not steer the terminal


def test_prompts_alone_and_what_a_run_would_stop_at(run, tmp_path, tiny_llama_folder):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Say something."}) + "\n" for _ in range(4)))
    code, out, err = run("data", path, "--model", tiny_llama_folder)
    assert code == 0 and not err and "no responses: read as prompts alone, as minillm and evaluation do" in out
    assert any(line.startswith("a run would stop here: ") and "data.test = 0" in line for line in out)
    document = json.loads(out[-1])
    assert (
        document["used"] == 1 and document["prompts_in_train_and_test"] == 3 and "data.test = 0" in document["problem"]
    )


def test_an_answer_that_is_cut_is_shown_cut(run, rows, tiny_llama_folder):
    given = ["data", rows, "--model", tiny_llama_folder, "--set", "data.template=chat", "--items", "1"]
    _, out, _ = run(*given)
    whole = json.loads(out[-1])["items"][0]
    room = len(whole["prompt_ids"]) + 3
    _, out, _ = run(*given, "--set", f"data.max_tokens={room}")
    cut = json.loads(out[-1])["items"][0]
    assert cut["response_ids"] == whole["response_ids"][:3] and whole["response"].startswith(cut["response"])
    assert len(cut["response"]) < len(whole["response"]) and json.loads(out[-1])["cut"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data"], "Missing argument 'file'"),
        (["data", "ROWS"], "--model"),
        (["data", "nowhere.jsonl", "--model", "MODEL"], "'nowhere.jsonl' does not exist"),
        (["data", "", "--model", "MODEL"], "data.source"),
        (["data", "ROWS", "--model", "./nowhere"], "nowhere"),
        (["data", "ROWS", "--model", "MODEL", "--items", "-1"], "'--items'"),
        (["data", "ROWS", "--model", "MODEL", "--set", "data.turn=all"], "did you mean 'turns'"),
        (["data", "ROWS", "--model", "MODEL"], "set data.template = 'chat'"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", ""], "data.source"),
        (["distill", "demo", "--data", ""], "data.source"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line(run, rows, tiny_llama_folder, arguments, says):
    places = {"ROWS": rows, "MODEL": tiny_llama_folder}
    code, _, err = run(*[places.get(a, a) for a in arguments])
    assert code == 2 and len(err) == 1 and err[0].startswith("mskd: ") and says in err[0], err


def test_a_template_that_loops_ends_the_command(run, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}"
    )
    tokenizer.chat_template += "{% endfor %}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    build_llama(tokenizer, layers=1).save_pretrained(tmp_path)
    capsys.readouterr()
    code, _, err = run("data", rows, "--model", tmp_path, "--set", "data.template=chat")
    assert code == 2 and len(err) == 1 and "did not end within 0.5 s" in err[0]


def test_what_would_hide_or_steer_is_written_as_its_code():
    assert visible("a\tb\x00\u202e漢👩\u200d🚀\n\ue000") == "a\\x09b\\x00\\u{202e}漢👩\u200d🚀\n\\u{e000}"
