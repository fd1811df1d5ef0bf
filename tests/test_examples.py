"""The examples run as they are printed, offline, on a CPU; their losses and gradients are those of full logits."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> dict:
    """The JSON of the last line."""
    found = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout.splitlines()[-1])


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def full_reverse_kl(student, teacher, ids, mask) -> torch.Tensor:
    """Mean over mask of KL(student || teacher), from the models' own logits."""
    lq, lp = (m(ids).logits.double().log_softmax(-1) for m in (student, teacher))
    return (lq.exp() * (lq - lp)).sum(-1)[mask].mean()


def test_the_plain_loop_learns_and_starts_from_the_loss_of_full_logits():
    got = run("examples/plain_loop.py")
    assert got["steps"] == 40 and got["last"] < 0.7 * got["first"]
    example = load("plain_loop")
    student, teacher = example.tiny(1, 48, seed=1), example.tiny(3, 64, seed=0)
    ids, mask = next(iter(example.random_batches(1, 1000)))
    assert got["first"] == pytest.approx(full_reverse_kl(student, teacher, ids, mask.bool()).item(), rel=1e-4)


def test_the_trainer_learns_and_accumulation_changes_nothing(capsys):
    got = run("examples/trainer.py")
    assert got["steps"] == 30 and got["last"] < 0.7 * got["first"]
    load("trainer").main(["--accumulation", "1", "--batch-size", "8"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(got, rel=1e-4)


@pytest.mark.slow
def test_two_processes_of_the_trainer_change_nothing():
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/trainer.py", "--accumulation", "1")
    assert run(*command) == pytest.approx(run("examples/trainer.py"), rel=1e-4)


def test_the_trainers_loss_and_gradient_are_those_of_full_logits(tmp_path):
    example = load("trainer")
    student, teacher = example.tiny(1, seed=1), example.tiny(3, seed=0)
    settings = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = example.DistillationTrainer(student, settings, teacher=teacher)
    batch = {k: torch.stack([row[k] for row in example.random_texts(3, 1000)]) for k in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    counts = torch.zeros(3, 32, dtype=torch.bool)
    counts[:, 7:-1] = True  # positions whose next token is labelled
    expected = full_reverse_kl(student, teacher, batch["input_ids"], counts)
    expected.backward()
    gradient = {n: p.grad for n, p in student.named_parameters()}
    student.zero_grad()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name], rtol=1e-3, atol=1e-6)
    shared = trainer.compute_loss(student, dict(batch), num_items_in_batch=torch.tensor(300))  # of four such batches
    torch.testing.assert_close(shared * 300, loss * counts.sum(), rtol=1e-5, atol=0)


def test_the_readme_prints_what_the_examples_run():
    """Each block of Python in the README that calls linear_divergence stands in an example, line by line, in order."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    sources = [[line.strip() for line in path.read_text().splitlines()] for path in EXAMPLES.glob("*.py")]
    ours = [block for block in blocks if "linear_divergence(" in block]
    assert ours
    for block in ours:
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        assert any(in_order(lines, source) for source in sources), block


def in_order(lines: list[str], source: list[str]) -> bool:
    rest = iter(source)
    return all(line in rest for line in lines)
