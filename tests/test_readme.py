"""The Python that the READMEs print runs as it stands. What a block plainly needs of its reader is put in its reach."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "kernels/README.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


BLOCKS = [(page, i) for page in PAGES for i in range(len(blocks(page)))]


def run(page: str, number: int, **given) -> dict:
    """The block's names after it ran; `given` are there before."""
    names = {"__name__": f"{page}, block {number}", **given}
    exec(compile(blocks(page)[number], f"{page}, block {number}", "exec"), names)
    return names


@pytest.fixture
def readers():
    """What a reader brings: a student, a teacher straight from its constructor (trainable, as from_pretrained leaves
    it), and batches with padding. Also the reverse KL of full logits on the first batch."""
    spec = importlib.util.spec_from_file_location("plain_loop", ROOT / "examples" / "plain_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    student, teacher = example.tiny(1, 48, seed=1), example.tiny(3, 64, seed=0)
    batches = list(example.random_batches(1, 1000)) * 3
    ids, mask = batches[0]
    with torch.no_grad():
        lq, lp = (m(ids, attention_mask=mask).logits.double().log_softmax(-1) for m in (student, teacher))
    truth = (lq.exp() * (lq - lp)).sum(-1)[mask == 1].mean()
    return {"student": student, "teacher": teacher, "batches": batches}, truth


def test_there_are_blocks():
    assert {page for page, _ in BLOCKS} == set(PAGES)


@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_a_block_runs_as_it_stands(page, number, readers, tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block, (given, truth) = blocks(page)[number], readers
    for folder in re.findall(r'from_pretrained\("(.*?)"\)', block):
        shutil.copytree(tiny_llama_folder, tmp_path / folder)
    if "batches" not in block:
        run(page, number)
        return
    before = [p.detach().clone() for p in given["student"].parameters()]
    one = run(page, number, **{**given, "batches": given["batches"][:1]})
    torch.testing.assert_close(one["loss"].double(), truth, rtol=1e-4, atol=0)
    assert all(not torch.equal(p, q) for p, q in zip(given["student"].parameters(), before, strict=True))
    assert run(page, number, **given)["loss"] < one["loss"]
