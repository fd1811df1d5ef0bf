"""The examples run as they are printed, offline, on a CPU; their losses and gradients are those of full logits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, TrainingArguments

from mskd.config import ConfigError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> dict:
    """The JSON of the last line."""
    found = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout.splitlines()[-1])


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def full_reverse_kl(student, teacher, ids, mask, cut=False) -> torch.Tensor:
    """Mean over mask of KL(student || teacher), from the models' own logits; with `cut` but for the last token."""
    lq, lp = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (student, teacher))
    values = (lq.exp() * (lq - lp)).sum(-1)
    return (values[:, :-1] if cut else values)[mask].mean()


def test_the_plain_loop_learns_and_starts_from_the_loss_of_full_logits():
    got = run("examples/plain_loop.py")
    assert got["steps"] == 40 and got["last"] < 0.7 * got["first"]
    example = load("plain_loop")
    student, teacher = example.tiny(1, 48, seed=1), example.tiny(3, 64, seed=0)
    ids, mask = next(iter(example.random_batches(1, 1000)))
    assert got["first"] == pytest.approx(full_reverse_kl(student, teacher, ids, mask.bool()).item(), rel=1e-4)


@pytest.mark.slow
def test_two_processes_of_the_plain_loop_change_nothing():
    """Their rows differ in length, so that the mean of their means would be another loss."""
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/plain_loop.py")
    assert run(*command) == pytest.approx(run("examples/plain_loop.py"), rel=1e-6)


def test_the_trainer_learns_and_accumulation_changes_nothing(capsys):
    got = run("examples/trainer.py")
    assert got["steps"] == 30 and got["last"] < 0.7 * got["first"]
    load("trainer").main(["--accumulation", "1", "--batch-size", "8"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(got, rel=1e-4)


@pytest.mark.slow
def test_two_processes_of_the_trainer_change_nothing():
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/trainer.py", "--accumulation", "1")
    assert run(*command) == pytest.approx(run("examples/trainer.py"), rel=1e-4)


@pytest.fixture
def setting(tmp_path):
    """The example, its trainer of two tiny models, and both models."""
    example = load("trainer")
    student, teacher = example.tiny(1, seed=1), example.tiny(3, seed=0)
    settings = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    return example, example.DistillationTrainer(student, settings, teacher=teacher), student, teacher


def test_the_trainers_loss_and_gradient_are_those_of_full_logits(setting):
    example, trainer, student, teacher = setting
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


def labelled(ids: torch.Tensor) -> torch.Tensor:
    """Labels of one sequence: its first token has no one to predict it."""
    labels = ids.clone()
    labels[:, 0] = -100
    return labels


def test_the_trainer_takes_rows_without_mask_and_left_padding_and_packed_ones(setting):
    """All against each sequence alone."""
    _, trainer, student, teacher = setting
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(1000, (1, n), generator=generator) for n in (20, 12))
    sums = [full_reverse_kl(student, teacher, ids, labelled(ids)[:, 1:] != -100, cut=True) for ids in (long, short)]
    wanted = (19 * sums[0] + 11 * sums[1]) / 30
    pad = torch.zeros(1, 8, dtype=torch.int64)
    padded = {
        "input_ids": torch.cat([long, torch.cat([pad, short], 1)]),
        "attention_mask": torch.cat([torch.ones_like(long), torch.cat([pad, torch.ones_like(short)], 1)]),
        "labels": torch.cat([labelled(long), torch.cat([pad - 100, labelled(short)], 1)]),
    }
    packed = {
        "input_ids": torch.cat([long, short], 1),
        "labels": torch.cat([labelled(long), labelled(short)], 1),
        "position_ids": torch.cat([torch.arange(20), torch.arange(12)])[None],
    }
    for rows in (padded, packed):
        torch.testing.assert_close(trainer.compute_loss(student, dict(rows)).double(), wanted, rtol=1e-4, atol=0)
    alone = trainer.compute_loss(student, {"input_ids": long, "labels": labelled(long)})
    torch.testing.assert_close(alone.double(), sums[0], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="several sequences .*, and its attention_mask mixes them: leave it out"):
        trainer.compute_loss(student, {**packed, "attention_mask": torch.ones_like(packed["input_ids"])})


def test_the_trainer_refuses_packed_rows_of_a_model_that_would_mix_them(setting):
    example, *_ = setting
    opt = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, ffn_dim=16))
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    example.check_packed({"position_ids": positions[:, :3]}, opt)
    with pytest.raises(ValueError, match="several sequences .*, and OPTForCausalLM mixes them"):
        example.check_packed({"position_ids": positions}, opt)


@pytest.mark.parametrize("wrapped", ["torch.compile", "peft", "stand-in"])
def test_the_trainer_takes_a_wrapped_student(tmp_path, wrapped):
    """Three steps; what they start from is the loss of the wrapped model's own logits."""
    example = load("trainer")
    student, teacher = example.tiny(1, seed=1), example.tiny(3, seed=0)
    rows = example.random_texts(12, 1000)
    batch = {k: torch.stack([row[k] for row in rows[:4]]) for k in ("input_ids", "labels")}
    own = {"torch_compile": True, "torch_compile_backend": "eager"} if wrapped == "torch.compile" else {}
    trained = student
    if wrapped == "peft":
        peft = pytest.importorskip("peft")
        trained = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    elif wrapped == "stand-in":
        trained = Wrapped(student)
    counts = torch.zeros(4, 32, dtype=torch.bool)
    counts[:, 7:-1] = True
    settings = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=3, per_device_train_batch_size=4,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True, remove_unused_columns=False, **own,
    )  # fmt: skip
    trainer = example.DistillationTrainer(trained, settings, train_dataset=rows, teacher=teacher)
    first = trainer.compute_loss(trained, dict(batch))
    expected = full_reverse_kl(trained, teacher, batch["input_ids"], counts)
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=0)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    trainer.train()
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in trained.named_parameters() if p.requires_grad}
    assert trainer.compute_loss(trained, dict(batch)) < first


class Wrapped(torch.nn.Module):
    """Stands in for a PeftModel: passes calls on, and gives the model beneath."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_the_trainer_refuses_an_adapter_on_the_lm_head(setting):
    example, trainer, student, _ = setting
    batch = {k: torch.stack([row[k] for row in example.random_texts(2, 1000)]) for k in ("input_ids", "labels")}

    class Linear(torch.nn.Linear):
        """As peft's: a linear layer by name."""

    with torch.no_grad():
        head = Linear(*reversed(student.lm_head.weight.shape), bias=False)
        head.weight = student.lm_head.weight
    student.lm_head = head
    with pytest.raises(ConfigError, match="lm_head of this Gemma2ForCausalLM is a test_examples.*Linear, not a plain"):
        trainer.compute_loss(Wrapped(student), dict(batch))
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(example.tiny(1, seed=1), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="is a peft.tuners.lora.layer.Linear, not a plain nn.Linear; merge"):
        trainer.compute_loss(adapted, dict(batch))
