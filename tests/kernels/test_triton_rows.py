"""The row kernels beneath the public functions: the plan and all its branches, unaligned rows, long strides."""

import numpy as np
import pytest
import torch
from kernel_cases import logits
from mskd_kernels import _rows, _triton_rows
from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._plan import MOST_PARTS, Chip, Shape, plan
from mskd_kernels._row_op import CENTER, ENTROPY, LOGPROB, TEACHER_LOGPROB, VALUE, Objective, Policy, RowOp, Side

V100, A100, H100 = Chip((7, 0), 80, 6 * 2**20), Chip((8, 0), 108, 40 * 2**20), Chip((9, 0), 132, 50 * 2**20)


def force(monkeypatch, **changes):
    """Makes the plan take a branch."""
    chosen = _triton_rows.plan_for
    monkeypatch.setattr(_triton_rows, "plan_for", lambda *given, **wish: chosen(*given, **wish)._replace(**changes))


def everything(op: RowOp, s, t, objective: Objective, tokens, live=None):
    out = torch.empty_like(s)
    return *_rows.fused(op, s, t, tokens, objective, out, live), out


def case(v: int, dtype=torch.float64, n: int = 4):
    s, t = logits(n, v, dtype=dtype)
    generator = torch.Generator().manual_seed(v)
    old, advantages, weights = torch.randn(3, n, dtype=torch.promote_types(dtype, torch.float32), generator=generator)
    policy = Policy(old - 5, advantages, weights.abs(), 0.2, True, True)
    return s, t, torch.randint(0, v, (n,), generator=generator), policy


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("fused", [None, Shape(256, 2)], ids=["split", "fused"])
def test_every_branch_agrees_with_torch(backend, monkeypatch, name, fused):
    s, t, tokens, policy = case(403)
    live = torch.tensor([True, False, True, True])
    s[1] = torch.nan  # never read
    op = RowOp(DIVERGENCES[name], "torch", 0.7, Side(1.2), Side(1.1, 20.0), entropy=True)
    objective = Objective(0.7, 0.3, policy)
    truth = everything(op, s, t, objective, tokens, live)
    if backend == "torch":
        return
    force(monkeypatch, fused=fused, programs=3, statistics=Shape(128, 1), parts=1 if fused else 3)
    ours = everything(RowOp(op.kind, "triton", 0.7, op.student, op.teacher, True), s, t, objective, tokens, live)
    scalars = [VALUE, LOGPROB, TEACHER_LOGPROB, ENTROPY]
    torch.testing.assert_close(ours[0][:, scalars], truth[0][:, scalars], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours[1], truth[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(ours[2], truth[2]) and (ours[3][1] == 0).all()
    torch.testing.assert_close(ours[3], truth[3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [(True, True), (True, False), (False, True), (False, False)])
def test_the_fused_loss_is_that_of_evaluate(monkeypatch, device, settings):
    s, t, tokens, policy = case(300)
    policy = policy._replace(weight_single_step=settings[0], clip_weighted_ratio=settings[1])
    s[2], t[3, 5] = torch.nan, -torch.inf  # a value of NaN, one of +inf
    divisor = torch.tensor(3.0, dtype=torch.float64, device=device)
    weights = torch.tensor([2.0, 0.5, 1.0, 0.0], dtype=torch.float64, device=device)  # which it leaves to others
    objectives = Objective(0.5, 0.0, policy, divisor), Objective(0.0, 1.0), Objective(1.0, 0.5, None, divisor, weights)
    for objective in objectives:
        op = RowOp(DIVERGENCES["reverse_kl"], "triton", entropy=True)
        plain = everything(op, s, t, objective, tokens)
        with monkeypatch.context() as patch:
            force(patch, fused=Shape(128, 1), programs=2)
            fused = everything(op, s, t, objective, tokens)
        for ours, truth in zip(fused, plain, strict=True):
            torch.testing.assert_close(ours, truth, equal_nan=True, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_scale(device, factor):
    """All of it, beyond the last full tile too; where the factor is 1 nothing is touched."""
    for columns in (1, 2048, 4099):
        x = torch.randn(3, columns, device=device).to(torch.float16)
        wanted, place = (x * factor), x.clone()
        assert _triton_rows.scale(place, torch.tensor(factor, device=device)) is place
        assert torch.equal(place, wanted)
    assert _triton_rows.scale(x[:0], torch.tensor(factor)).numel() == 0


@pytest.mark.parametrize("v", [3, 129, 301])
def test_rows_off_a_boundary_and_in_place(monkeypatch, device, v):
    """Every row of such a vocabulary starts elsewhere in its 16 bytes; the gradient may take the logits' place."""
    s, t, tokens, _ = case(v, torch.float16, n=5)
    op = RowOp(DIVERGENCES["reverse_kl"], "triton")
    assert _triton_rows._wide([s, t, s])
    assert not _triton_rows._wide([s, torch.empty(5 * v + 1, dtype=s.dtype)[1:].view(5, v)])
    assert not _triton_rows._wide([s, t.float()])
    truth = everything(RowOp(op.kind, "torch"), s, t, Objective(1.0, 0.5), tokens)
    for fused in (None, Shape(128, 1)):
        with monkeypatch.context() as patch:
            force(patch, fused=fused, programs=4, gradient=Shape(128, 1))
            place = s.clone()
            *ours, gradient = *_rows.fused(op, place, t, tokens, Objective(1.0, 0.5), place), place
            patch.setattr(_triton_rows, "_wide", lambda tensors: False)
            narrow = everything(op, s, t, Objective(1.0, 0.5), tokens)
        torch.testing.assert_close(ours[1], truth[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, truth[3], rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(gradient, narrow[3], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "parts"), [("jsd", 3), ("reverse_kl", MOST_PARTS)])
def test_split_statistics_are_those_of_one_program_and_repeat(monkeypatch, device, kind, parts):
    s, t, tokens, _ = case(1100, n=2)
    s[0, :500] = t[0, :500] = -torch.inf  # whole parts without mass
    op = RowOp(DIVERGENCES[kind], "triton", entropy=True)
    whole = _rows.statistics(op, s, t, tokens)
    force(monkeypatch, parts=parts, statistics=Shape(128, 1))
    first, second = (_rows.statistics(op, s, t, tokens) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole, rtol=1e-11, atol=1e-13)


def test_offsets_of_rows_beyond_32_bits(monkeypatch, device, tmp_path):
    """Two rows 2^31 + 16 elements apart, in a file with a hole: only the pages that are touched exist."""
    if device.type != "cpu":
        pytest.skip("on a GPU that would be 4 GB of real memory")
    stride, v = 2**31 + 16, 200
    memory = np.memmap(tmp_path / "hole", dtype=np.float16, mode="w+", shape=(stride + v,))
    far = torch.as_strided(torch.from_numpy(memory), (2, v), (stride, 1))
    s, t, tokens, _ = case(v, torch.float16, n=2)
    far.copy_(s)
    op = RowOp(DIVERGENCES["reverse_kl"], "triton")
    for fused in (None, Shape(128, 1)):
        with monkeypatch.context() as patch:
            force(patch, fused=fused, programs=1)
            near = everything(op, s, t, Objective(), tokens)
            place = torch.as_strided(torch.from_numpy(memory), (2, v), (stride, 1)).copy_(s)
            ours = _rows.fused(op, place, t, tokens, Objective(), place)
        assert torch.equal(ours[0], near[0]) and torch.equal(place, near[3])


def test_the_center_is_a_number_where_the_value_is_infinite(device):
    """Of a forward KL it is 0 in every row."""
    s, t, tokens, _ = case(300)
    s[1, 5] = -torch.inf
    stats = _rows.statistics(RowOp(DIVERGENCES["forward_kl"], "triton"), s, t, tokens)
    assert stats[:, VALUE].isinf().tolist() == [False, True, False, False]
    assert (stats[:, CENTER] == 0).all()


def test_the_plan():
    assert plan(4096, 50257, 2, V100).fused is None  # never on a V100 at this size
    assert plan(4096, 50257, 2, A100).fused and plan(4096, 50257, 2, H100).fused
    assert plan(4096, 151936, 2, H100).fused is None and plan(64, 50257, 2, H100).fused is None
    assert plan(4096, 50257, 2, H100).parts == 1 and plan(8, 151936, 2, H100).parts > 8
    for n in (1, 7, 300, 10**6):
        for v in (1, 100, 50257, 262144):
            for chip in (V100, A100, H100, Chip((12, 0), 170, 96 * 2**20)):
                chosen = plan(n, v, 2, chip, heavy=n == 7)
                assert 1 <= chosen.parts <= MOST_PARTS and 1 <= chosen.programs <= max(n, 1)
                shapes = [chosen.statistics, chosen.gradient, *([chosen.fused] if chosen.fused else [])]
                assert all(s.block & (s.block - 1) == 0 and s.block >= 128 and s.warps >= 1 for s in shapes)
