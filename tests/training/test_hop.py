"""The loop's parts: what a step trains on, gradients over forwards and processes, best weights, schedules."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from families import apart
from tiny import build_llama, build_tokenizer

from mskd.config import ConfigError
from mskd.config.phases import KdPhase, MinillmPhase, SftPhase, resolve_steps
from mskd.data.instructions import order
from mskd.models import Student, Teacher
from mskd.models.batch import SequenceBatch
from mskd.sampling.rollout import Rollout
from mskd.store import checkpoint
from mskd.training import objective
from mskd.training.hop import backward
from mskd.training.optim import check_optimizer, learning_rate, make_optimizer
from mskd.training.work import data_parallel as shares
from mskd.training.work.on_policy import OnPolicy


def sequences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [], []
    for i in range(count):
        p, r = 3 + i % 4, 2 + (3 * i) % 7
        prompts.append(torch.randint(4, 320, (p,), generator=generator).tolist())
        responses.append([*torch.randint(4, 320, (r - 1,), generator=generator).tolist(), 2])
    return prompts, responses


def micros_of(kind, student, teacher, chosen, size):
    """Forwards over the chosen of 8 fixed sequences, `size` at a time."""
    prompts, responses = sequences(8, 0)
    made = []
    for part in shares.chunks(chosen, size):
        batch = SequenceBatch.from_sequences([prompts[i] for i in part], [responses[i] for i in part], 2)
        hidden = teacher.hidden(batch)
        if kind == "kd":
            phase = KdPhase(steps=1, kd_ratio=0.5, temperature=2.0)
            made.append((batch, objective.kd_loss(batch, hidden, teacher.head, phase)))
        else:
            phase = MinillmPhase.model_validate({"objective": "minillm"})
            generator = torch.Generator().manual_seed(1)
            values = torch.rand(3, sum(map(len, responses)), generator=generator)
            lengths = torch.tensor([len(r) for r in responses])
            ends = lengths.cumsum(0)
            flat = torch.cat([torch.arange(ends[i] - lengths[i], ends[i]) for i in part])
            tokens = torch.tensor([t for i in part for t in (*prompts[i], *responses[i])])
            full = torch.tensor([0, *[len(prompts[i]) + len(responses[i]) for i in part]]).cumsum(0)
            rollout = Rollout(
                tokens, full, torch.tensor([len(prompts[i]) for i in part]), -6 + values[0, flat], -6 + values[1, flat],
                -6 + values[2, flat], torch.tensor(320),
            )  # fmt: skip
            made.append((batch, objective.minillm_loss(rollout, values[0, flat] - 0.5, hidden, teacher.head, phase)))
    return made


KINDS = ("kd", "minillm")


def gradients(accelerator, kind, size):
    """Statistics and gradient of one optimizer batch of 8 sequences, `size` at a time, over the processes."""
    student = Student(build_llama(build_tokenizer(), layers=2, seed=1))
    teacher = Teacher(build_llama(build_tokenizer(), layers=3, seed=2).requires_grad_(False), "fp32")
    prepared = accelerator.prepare(student)
    micros = micros_of(kind, student, teacher, shares.deal(list(range(8)), accelerator), size)
    stats = backward(accelerator, prepared, micros)
    return stats, {n: p.grad.tolist() for n, p in student.model.named_parameters()}


def one_of_two(rank, port, queue):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    job = SimpleNamespace(accelerator=accelerator)
    assert shares.gathered(job, [(rank, "a"), (rank, "b")]) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    results = [gradients(accelerator, kind, 2 - rank) for kind in KINDS]  # 2 forwards beside 4
    accelerator.free_memory()  # the wrappers go before the process group: after it, torch can deadlock on the GIL
    if rank == 0:
        queue.put(results)
    accelerator.end_training()


def test_two_processes_give_the_gradient_of_one():
    from accelerate import Accelerator

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, port, queue)) for rank in range(2)]
    for p in processes:
        p.start()
    two = queue.get(timeout=300)
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    accelerator = Accelerator(cpu=True)
    for kind, shared in zip(KINDS, two, strict=True):
        stats, expected = gradients(accelerator, kind, 8)
        for other_stats, other in (shared, gradients(accelerator, kind, 3)):
            assert other_stats == pytest.approx(stats, rel=1e-4)
            for name, gradient in expected.items():
                assert apart(torch.tensor(other[name]), torch.tensor(gradient)) < 1e-4, name


def test_a_step_divides_by_the_tokens_of_the_whole_batch():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    student = Student(build_llama(build_tokenizer(), layers=2, seed=1))
    prompts, responses = sequences(5, 3)
    batch = SequenceBatch.from_sequences(prompts, responses, 2)
    logits = student.model(batch.input_ids).logits.flatten(0, 1)[batch.positions]
    expected = torch.nn.functional.cross_entropy(logits.double(), batch.targets)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in student.model.named_parameters()}
    student.zero_grad(set_to_none=True)
    parts = [SequenceBatch.from_sequences(prompts[i : i + 2], responses[i : i + 2], 2) for i in (0, 2, 4)]
    stats = backward(accelerator, student, [(p, objective.sft_loss(p)) for p in parts])
    assert stats["loss"] == pytest.approx(float(expected.detach()), rel=1e-5) and stats["tokens"] == len(batch.targets)
    for name, parameter in student.model.named_parameters():
        assert apart(parameter.grad, wanted[name]) < 1e-4, name


def test_the_stream_leaves_nothing_out_and_draws_each_epoch_anew():
    items = list(range(10))
    seen = [i for b in range(5) for i in shares.stream(items, b, 4, seed=1)]
    assert sorted(seen[:10]) == items and sorted(seen[10:]) == items and seen[:10] != seen[10:]
    assert seen[:10] == order(10, 0, 1)
    few = [i for b in range(2) for i in shares.stream(items[:3], b, 8, seed=1)]
    assert [few.count(i) for i in range(3)] == [6, 5, 5] or sorted(few.count(i) for i in range(3)) == [5, 5, 6]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_of_a_round_do_not_depend_on_the_number_of_processes(world):
    phase = MinillmPhase.model_validate({"objective": "minillm", "rollouts": 16, "batch_size": 4, "ppo_epochs": 3})
    seen = {}
    for rank in range(world):
        job = SimpleNamespace(
            accelerator=SimpleNamespace(num_processes=world, process_index=rank), teacher=object(), config=None
        )
        source = OnPolicy(job, phase, seed=9)
        mine = source.mine()
        source.rollout = SimpleNamespace(offsets=torch.arange(len(mine) + 1))
        for epoch in range(3):
            for number in range(4):
                seen.setdefault((epoch, number), []).extend(mine[i] for i in source._batch(0, epoch, number))
    reference = {}
    source = OnPolicy(
        SimpleNamespace(accelerator=SimpleNamespace(num_processes=1, process_index=0), teacher=object()), phase, seed=9
    )
    source.rollout = SimpleNamespace(offsets=torch.arange(17))
    for epoch in range(3):
        for number in range(4):
            reference[epoch, number] = sorted(source._batch(0, epoch, number))
        assert sorted(i for number in range(4) for i in reference[epoch, number]) == list(range(16))
    assert {k: sorted(v) for k, v in seen.items()} == reference
    assert [reference[0, n] for n in range(4)] != [reference[1, n] for n in range(4)]


def test_steps_and_epochs_whichever_comes_first():
    assert resolve_steps(SftPhase(epochs=2, batch_size=8), 100) == 25
    assert resolve_steps(SftPhase(steps=7, epochs=2, batch_size=8), 100) == 7
    assert resolve_steps(SftPhase(steps=7), 1) == 7
    on_policy = MinillmPhase.model_validate({"epochs": 1, "rollouts": 64, "batch_size": 32, "ppo_epochs": 4})
    assert resolve_steps(on_policy, 256) == 32


def test_learning_rates():
    constant = SftPhase(steps=10, lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, s, 10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = SftPhase(steps=10, lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 1.0 and learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    linear = SftPhase(steps=10, lr=1.0, warmup_steps=2, schedule="linear")
    assert learning_rate(linear, 6, 10) == pytest.approx(0.5)


def train_some(model, optimizer, steps):
    for step in range(*steps):
        batch = SequenceBatch.from_sequences(*sequences(6, step), 2)
        value, _ = Student(model)(batch, objective.sft_loss(batch).over(len(batch.targets)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_an_optimizer_that_was_saved_goes_on_with_the_same_bits(kind, tmp_path):
    phase = SftPhase(steps=6, lr=1e-2, optimizer=kind)
    whole = build_llama(build_tokenizer(), layers=2, seed=1)
    train_some(whole, make_optimizer(whole, phase), (0, 6))
    model = build_llama(build_tokenizer(), layers=2, seed=1)
    optimizer = make_optimizer(model, phase)
    train_some(model, optimizer, (0, 3))
    tensors, plain = checkpoint.pack_optimizer(optimizer)
    checkpoint.save_state(tmp_path, {"optimizer": plain}, tensors)
    saved = checkpoint.load_state(tmp_path)
    resumed = make_optimizer(model, phase)
    checkpoint.unpack_optimizer(resumed, saved.tensors, saved.meta["optimizer"])
    train_some(model, resumed, (3, 6))
    for (name, expected), parameter in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    in_8_bits = sum(t.numel() for t in tensors.values() if t.dtype == torch.uint8)
    embedding = model.get_input_embeddings().weight.numel()  # alone of this model's tensors it has 4096 values
    assert in_8_bits == (2 * embedding if kind == "adamw_8bit" else 0)


def test_without_bitsandbytes_the_8_bit_optimizer_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="'adamw_8bit' needs bitsandbytes, .*pip install bitsandbytes.*'adamw'"):
        check_optimizer(SftPhase(steps=1, optimizer="adamw_8bit"))
    check_optimizer(SftPhase(steps=1))


def test_weight_decay_leaves_norms_and_biases_alone():
    model = build_llama(build_tokenizer(), layers=1)
    optimizer = make_optimizer(model, SftPhase(steps=1, weight_decay=0.1))
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0.0 and all(p.ndim == 1 for p in rest["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
