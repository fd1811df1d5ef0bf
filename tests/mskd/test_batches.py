"""Forwards of little padding: how sequences are cut and packed, and that losses and gradients stay what they were."""

import random

import pytest
import torch
from families import FAMILY_CONFIGS, PAD, V, build

from mskd import objective
from mskd.config import KdPhase
from mskd.data import SequenceBatch
from mskd.models import Student, Teacher
from mskd.packing import REAL, cut, fill_rows


def lengths_of(kind, n, seed=0):
    draw = random.Random(seed)
    return {
        "even": [37] * n,
        "uniform": [draw.randint(32, 384) for _ in range(n)],
        "one long": [*[draw.randint(8, 16) for _ in range(n - 1)], 500],
        "powers": [2 ** draw.randint(0, 9) for _ in range(n)],
    }[kind]


def share(lengths, forwards):
    padded = sum(len(part) * max(lengths[i] for i in part) for part in forwards)
    return sum(lengths) / padded


@pytest.mark.parametrize("kind", ["even", "uniform", "one long", "powers"])
@pytest.mark.parametrize(("n", "most"), [(1, 8), (7, 3), (64, 16)])
def test_forwards_are_real_to_95_percent_and_hold_each_sequence_once(kind, n, most):
    lengths = lengths_of(kind, n)
    for batching in ("bucket", "pack"):
        forwards = cut(lengths, most, batching)
        assert sorted(i for part in forwards for i in part) == list(range(n))
        assert max(map(len, forwards)) <= most
    assert share(lengths, cut(lengths, most, "bucket")) >= REAL
    for part in cut(lengths, most, "pack"):
        own = [lengths[i] for i in part]
        rows = fill_rows(own)
        assert sorted(i for row in rows for i in row) == list(range(len(own)))
        assert sum(own) >= REAL * len(rows) * max(sum(own[i] for i in row) for row in rows)
    assert len(fill_rows(lengths, most=1)) == 1


def every_cut(lengths, most):
    """All ways to cut lengths, in order of length, into spans of at most `most`."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for bits in range(2 ** (len(order) - 1)):
        spans, start = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or bits >> (end - 1) & 1:
                spans.append(order[start:end])
                start = end
        if max(map(len, spans)) <= most:
            yield spans


@pytest.mark.parametrize("seed", range(4))
def test_of_all_cuts_the_buckets_are_the_fewest_and_then_the_tightest(seed):
    draw = random.Random(seed)
    lengths, most = [draw.randint(1, 60) for _ in range(10)], draw.randint(2, 10)
    good = [(len(c), -share(lengths, c)) for c in every_cut(lengths, most) if share(lengths, c) >= REAL]
    found = cut(lengths, most, "bucket")
    assert (len(found), -share(lengths, found)) == pytest.approx(min(good))


def test_nothing_to_cut():
    assert cut([], 4, "bucket") == cut([], 4, "pack") == fill_rows([]) == []


def sequences(n=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = [(3 + i % 4, 2 + (5 * i) % 11) for i in range(n)]
    ids = [torch.randint(2, V, (p + r,), generator=draw).tolist() for p, r in sizes]
    return [x[:p] for x, (p, _) in zip(ids, sizes, strict=True)], [x[p:] for x, (p, _) in zip(ids, sizes, strict=True)]


def laid_out(prompts, responses, how):
    """Forwards over the sequences, and the order in which their targets come."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    parts = [list(range(len(prompts)))] if how == "padded" else cut(lengths, 4, how.split()[0])
    for part in parts:
        rows = fill_rows([lengths[i] for i in part], most=1 if how == "pack one row" else None)
        yield SequenceBatch.from_sequences(
            [prompts[i] for i in part], [responses[i] for i in part], PAD, rows=rows if "pack" in how else None
        )


def step(student, teacher, how):
    """Loss and gradients of one batch of sequences, all forwards together."""
    prompts, responses = sequences()
    batches = list(laid_out(prompts, responses, how))
    tokens = sum(len(b.targets) for b in batches)
    total = 0.0
    student.zero_grad(set_to_none=True)
    for batch in batches:
        phase = KdPhase(steps=1, kd_ratio=0.5)
        loss = objective.kd_loss(batch, teacher.hidden(batch), teacher.head, phase)
        value, _ = student(batch, loss.over(tokens))
        value.backward()
        total += float(value.detach())
    return total, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_padded_bucketed_and_packed_give_the_same_loss_and_gradients(family, attention):
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 soft-caps its attention scores, which SDPA cannot")
    models_ = build(FAMILY_CONFIGS[family], seed=1), build(FAMILY_CONFIGS[family], seed=2)
    for model in models_:
        model.set_attn_implementation(attention)
    student, teacher = Student(models_[0]).eval(), Teacher(models_[1].requires_grad_(False), "fp32")
    expected, wanted = step(student, teacher, "padded")
    for how in ("bucket", "pack", "pack one row"):
        loss, gradients = step(student, teacher, how)
        assert loss == pytest.approx(expected, rel=2e-6), how
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            scale = wanted[name].abs().max()
            torch.testing.assert_close(
                gradient, wanted[name], rtol=0, atol=float(scale) * 2e-5 + 1e-7, msg=f"{how} {name}"
            )


def test_packed_rows_keep_the_order_of_the_targets():
    prompts, responses = [[5, 6], [7], [8, 9, 10]], [[11], [12, 13], [14]]
    batch = SequenceBatch.from_sequences(prompts, responses, PAD, rows=[[2, 1], [0]])
    assert batch.input_ids.tolist() == [[8, 9, 10, 14, 7, 12, 13], [5, 6, 11, PAD, PAD, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [7, 3]
    assert batch.targets.tolist() == [11, 12, 13, 14]
    assert batch.positions.tolist() == [8, 4, 5, 2]
    assert batch.input_ids.flatten()[batch.positions].tolist() == [6, 7, 12, 10]
    with pytest.raises(ValueError, match="each of the 3 sequences once"):
        SequenceBatch.from_sequences(prompts, responses, PAD, rows=[[0, 1], [1]])
