"""bench.rollout: both sides do the same work, and a wrong one gets no figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import rollout
from bench.rollout import Cell, Models, Work, main
from mskd.sampling import draw, slots

ROOT = Path(__file__).parents[2]


def test_smoke_as_a_command(tmp_path):
    command = [sys.executable, "-m", "bench.rollout", "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    document = json.loads(found.stdout.splitlines()[-1])
    providers = [(row["provider"], row["tokens_per_s"] > 0) for row in document["rows"]]
    mixed, alone = ["mskd", "mskd, not lazy", "generate"], ["mskd", "generate"]
    assert providers == [(name, True) for name in mixed + alone]
    assert "greedy tokens are those of generate" in found.stdout and "prompts 2..16, answers 2..32" in found.stdout
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def models():
    return Models("tiny", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("mixed", [False, True])
def test_both_sides_give_the_lengths(models, mixed):
    cell = Cell(2, 5, equal=False, mixed=mixed, shortened=8)
    work = Work(cell, models.vocabulary)
    wanted = [work.answers.lengths[tuple(p)] for p in work.prompts]
    assert len(set(wanted)) > 2 and sum(wanted) == work.tokens
    assert [len(r) for r in models.generate(cell, work)] == wanted
    assert [len(r) for r in models.mskd(cell, work).responses()] == wanted


def test_a_wrong_sampler_gets_no_figure(models, monkeypatch, capsys):
    def off(*args, **kwargs):
        token, old, *rest = draw.draw(*args, **kwargs)
        return token, old + 0.01, *rest

    monkeypatch.setattr(slots, "draw", off)
    monkeypatch.setattr(rollout, "SMOKE", (Cell(2, 2, equal=True, mixed=False, shortened=8),))
    assert main(["--smoke", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG, no figure" in out and "off those of a plain forward" in out
