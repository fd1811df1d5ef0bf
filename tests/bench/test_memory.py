"""python -m bench.memory --smoke: rows that say what a lever saves, and none for a lever that changes the loss."""

import json

import pytest
import torch

from bench import memory


@pytest.fixture(scope="module", autouse=True)
def this_process_as_it_is():
    """What keep_freed_memory does is for good; other tests of this process measure its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "keep_freed_memory", lambda: True)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory, this_process_as_it_is):
    folder = tmp_path_factory.mktemp("results")
    assert memory.main(["--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    (file,) = folder.iterdir()
    return {row["provider"]: row for row in json.loads(file.read_text())["rows"]}


def test_every_lever_has_a_row(rows):
    assert set(rows) == {*memory.LEVERS, memory.GIVEN_BACK}
    assert all(row["ms_p50"] > 0 and row["bytes"] > 0 and row["base"] == "default" for row in rows.values())


def test_levers_save_what_they_are_for(rows):
    default = rows["default"]["bytes"]
    student = memory.Case("tiny", 4, torch.device("cpu")).student
    in_8_bits = sum(p.numel() for p in student.parameters() if p.numel() >= 4096)
    assert default - rows["optimizer = adamw_8bit"]["bytes"] == pytest.approx(6 * in_8_bits, rel=0.25)
    assert rows["train.gradient_checkpointing = true"]["bytes"] < default
    assert rows["all four"]["bytes"] < 0.7 * default


def test_a_lever_that_changes_the_loss_has_no_figure(monkeypatch):
    monkeypatch.setattr(memory, "LEVERS", {"default": ({}, {}), "longer": ({}, {"lr": 1.0})})
    found = {row["provider"]: row for row in memory.measure(memory.Case("tiny", 4, torch.device("cpu")), rounds=1)}
    assert "loss" in found["longer"]["wrong"] and "bytes" not in found["longer"]
    assert found["default"]["bytes"] > 0
