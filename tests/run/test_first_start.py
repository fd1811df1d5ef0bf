"""A run keeps the date of its first start; it says what became of its rows, and stops where most are not used."""

import datetime
import json

import pytest
from chain_setup import tree, weights, write_rows
from transformers import AutoTokenizer

from mskd.config import ConfigError, load, parse
from mskd.config.hardware import detect
from mskd.data.conversations import Columns
from mskd.data.counts import Counts
from mskd.run import first_start
from mskd.run.chain import Sweep, distill
from mskd.run.nodes import Graph
from mskd.run.stop import Stop
from mskd.store.run_config import SEAL

SMALL = {"objective": "kd", "steps": 1, "batch_size": 2, "micro_batch_size": 2}


@pytest.fixture
def dated(tiny_llama_folder, tmp_path):
    """The tiny model with a template that tells the date."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama_folder.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + tokenizer.chat_template
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def a_day(monkeypatch, day):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.fromisoformat(day)

    monkeypatch.setattr(first_start, "date", Day)


def a_run(model, data, **changes):
    given = tree(model, data, phases=[SMALL], chain={"paths": [["teacher", "student"]]})
    given["data"] |= {"template": "chat", "validation": 0, **changes}
    given["evaluation"] |= {"limit": 1, "max_new_tokens": 2}
    return given


def test_a_run_that_goes_on_a_day_later_is_the_same_run(dated, tmp_path, monkeypatch):
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    said: list[str] = []
    a_day(monkeypatch, "2026-11-25")
    distill(parse(a_run(dated, data)), out, echo=said.append)
    before = weights(out)
    assert load(out / "runs" / "tiny" / "config.toml").data.date == "2026-11-25"
    assert f"{data}: 24 of 24 rows used (train 20, test 4)" in said and "  columns: instruction, response" in said
    a_day(monkeypatch, "2026-11-26")
    said.clear()
    distill(parse(a_run(dated, data)), out, echo=said.append)
    assert weights(out) == before and sum("done before" in line for line in said) == 3
    items = next((out / "evals").rglob("*.jsonl")).read_text()
    assert "Today is 25 Nov 2026." in items
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        distill(parse(a_run(dated, data, date="2026-11-26")), out, echo=said.append)
    assert any(_hash(dated, data, tmp_path, "2026-11-25")[:12] in name for name in before)
    assert _hash(dated, data, tmp_path, "2026-11-25") != _hash(dated, data, tmp_path, "2026-11-26")

    file = out / "runs" / "tiny" / "config.toml"  # of before the date was kept
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith(("date", SEAL))))
    Sweep(parse(a_run(dated, data)), out, Stop(), said.append, yes=False)._write_config()
    assert 'date = "2026-11-26"' in file.read_text()


def _hash(model, data, tmp_path, day):
    """Of the hop, with that day given."""
    config = parse(a_run(model, data, date=day))
    return Graph(config, tmp_path, detect("cpu"), lambda line: None).nodes["teacher>student"].hash


def test_runs_without_conversations_keep_no_date(tmp_path):
    config = parse({"models": {"a": {"source": "x"}, "b": {"source": "y"}}, "chain": {"paths": [["a", "b"]]},
                    "phases": [SMALL]})  # fmt: skip
    assert first_start.keep_date(config, tmp_path / "config.toml") is config


def test_a_run_stops_where_fewer_than_half_of_the_rows_are_used(tiny_llama_folder, tmp_path):
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    data = tmp_path / "half.jsonl"
    data.write_text("".join(json.dumps(row if i < 11 else row | {"response": ""}) + "\n" for i, row in enumerate(rows)))
    said: list[str] = []
    config = parse(a_run(tiny_llama_folder, data))
    with pytest.raises(ConfigError) as error:
        distill(config, tmp_path / "out", echo=said.append)
    message = str(error.value)
    assert f"only 11 of 24 rows can be used: 13 without a response; the first: {data}, row 12: it has no" in message
    assert message.endswith("look with mskd data, or go ahead with --yes") and "\n" not in message
    assert f"{data}: 11 of 24 rows used (train 7, test 4)" in said
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    assert Sweep(config, tmp_path / "out", Stop(), said.append, yes=True).chains


def test_half_of_the_rows_is_enough():
    counts = Counts("a.jsonl", 24, Columns({}, ()))
    counts.dropped["without a response"] = 12
    counts.check_half(yes=False)
    counts.dropped["without a response"] = 13
    counts.check_half(yes=True)
    with pytest.raises(ConfigError, match="only 11 of 24 rows can be used: 13 without a response"):
        counts.check_half(yes=False)
