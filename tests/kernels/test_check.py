"""The cases of a proof: right kernels pass under the interpreter; wrong ones are named, with what they did."""

import json
import warnings

import pytest
import torch
from mskd_kernels import _triton_rows
from mskd_kernels._kinds import DIVERGENCES
from mskd_kernels._row_op import RowOp, Side
from mskd_kernels._triton_rows import Launch
from mskd_kernels.proof import measure, prover, trial
from mskd_kernels.proof.cases import BF16, CORE, F32, SUBJECTS, Case, cases, subject_of
from mskd_kernels.proof.check import Wrong, check
from mskd_kernels.proof.timings import SIZES, Size, Timing, fastest, timing_of

SPLIT = Case("reverse_kl", "plain", "split", F32, F32, 300, 5, masked=True)
FUSED = SPLIT._replace(way="fused")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # numpy's, of -inf - -inf
        yield


def spoil(monkeypatch, kernel: str, before=lambda arguments: {}, after=lambda arguments: None):
    """Changes the arguments of a kernel's launches, or what they wrote."""
    run = Launch.run

    def wrong(launch):
        if kernel not in launch.kernel.__name__:
            return run(launch)
        changed = before(launch.arguments)
        run(launch._replace(arguments=launch.arguments | changed))
        return after(launch.arguments)

    monkeypatch.setattr(Launch, "run", wrong)


def gradient_of(arguments) -> torch.Tensor:
    return arguments["out_ptr"]


# The faults that a kernel may have ------------------------------------------------------------------------------------


def last_tile_unwritten(monkeypatch, kernel):
    """The tile's memory is what it was before."""
    kept = {}
    spoil(
        monkeypatch, kernel,
        lambda a: kept.update(tile=gradient_of(a)[:, 256:].clone()) or {},
        lambda a: gradient_of(a)[:, 256:].copy_(kept["tile"]),
    )  # fmt: skip


def gradient_times_101(monkeypatch, kernel):
    spoil(monkeypatch, kernel, after=lambda a: gradient_of(a).mul_(1.01))


def mask_ignored(monkeypatch, kernel):
    spoil(monkeypatch, "fused" if kernel == "fused" else "statistics", lambda a: {"HAS_LIVE": False})


def a_store_past_the_row(monkeypatch, kernel):
    def store(arguments):
        out = gradient_of(arguments)
        torch.as_strided(out, (out.shape[0], out.shape[1] + 1), out.stride(), out.storage_offset())[2, -1] = 0.0

    spoil(monkeypatch, kernel, after=store)


def other_bits(monkeypatch, kernel):
    """A race: the second run is right too, but not the same."""
    runs = []

    def shake(arguments):
        runs.append(None)
        row = gradient_of(arguments)[0]
        row.copy_(torch.nextafter(row, row + len(runs) - 1))

    spoil(monkeypatch, kernel, after=shake)


def does_not_compile(monkeypatch, kernel):
    def fail(arguments):
        raise RuntimeError("PTXAS error: out of registers\nand more")

    spoil(monkeypatch, kernel, before=fail)


FAULTS = {
    last_tile_unwritten: "the gradient of row 0, column 256 was not written",
    gradient_times_101: "the gradient of row 0, column 0 is .* and should be",
    mask_ignored: "the masked row 4 was not left alone",
    a_store_past_the_row: "it wrote beyond the end of row 2",
    other_bits: "gradient: a second run gave other bits",
    does_not_compile: "RuntimeError: PTXAS error: out of registers$",
}


@pytest.mark.parametrize("case", [SPLIT, FUSED], ids=["split", "fused"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(monkeypatch, device, fault, case):
    kernel = "fused" if case.way == "fused" else "gradient"
    fault(monkeypatch, kernel)
    with pytest.raises(Wrong, match=FAULTS[fault]) as error:
        check(case, device)
    assert error.value.kernel == ("statistics" if fault is mask_ignored and kernel == "gradient" else kernel)
    assert "\n" not in error.value.what


@pytest.mark.parametrize(
    ("kernel", "case", "pointer", "said"),
    [
        ("statistics", SPLIT, "stats_ptr", "divergence"),
        ("combine", SPLIT._replace(way="parts"), "stats_ptr", "divergence"),
        ("terms", SPLIT._replace(kind="jsd"), "partials_ptr", "divergence"),
    ],
)
def test_the_kernel_that_wrote_a_wrong_value_is_named(monkeypatch, device, kernel, case, pointer, said):
    spoil(monkeypatch, kernel, after=lambda a: a[pointer].select(-1, 0).mul_(1.001))
    with pytest.raises(Wrong, match=said) as error:
        check(case, device)
    assert error.value.kernel == kernel


def test_a_value_that_should_be_infinite_is_missed(monkeypatch, device):
    """The tolerance of an infinite value is no infinite tolerance."""
    spoil(monkeypatch, "statistics", after=lambda a: a["stats_ptr"][2, 0].fill_(1.0))
    with pytest.raises(Wrong, match="the divergence of row 2 is 1 and should be inf; 1 are wrong"):
        check(SPLIT._replace(infinite=True), device)


@pytest.mark.parametrize(("factor", "said"), [(1.01, "product of row"), (torch.nan, "was not written")])
def test_a_wrong_scale_is_named(monkeypatch, device, factor, said):
    spoil(monkeypatch, "scale", after=lambda a: gradient_of(a)[-1:].mul_(factor))
    with pytest.raises(Wrong, match=said) as error:
        check(Case(None, "plain", "scale", F32, F32, 700, 3), device)
    assert error.value.kernel == "scale"


def test_right_kernels_pass(device):
    every = [case for case in cases(quick=True) if case.way != "parts" or case.kind == "reverse_kl"]  # those are slow
    for case in every:
        check(case, device)
    assert {case.way for case in every} == {"split", "parts", "fused", "scale"}


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS[1:])
def test_right_kernels_of_the_other_subjects_pass(device, subject):
    for case in cases(subject, quick=True):
        check(case, device)


def test_a_trial_says_the_case_and_the_proof_repeats_it(monkeypatch, device, capsys):
    """From the kernel's fault to the sentence that the user reads."""
    monkeypatch.setattr(trial, "cases", lambda *given: [FUSED])
    assert trial.trial(device, CORE, timed=False) == 0
    out = capsys.readouterr().out
    assert [json.loads(line).get("kernel") for line in out.splitlines()] == [None, "fused", "fused", None]
    proof, keep = prover.judged(out, "", 0, None, 1.0)
    assert proof.passed and keep and "1 cases against float64" in proof.why
    gradient_times_101(monkeypatch, "fused")
    assert trial.trial(device, CORE, timed=False) == 1
    proof, keep = prover.judged(capsys.readouterr().out, "", 1, None, 1.0)
    assert not proof.passed and keep
    assert proof.why.startswith(
        f"the fused kernel is wrong in the case {FUSED.name}: the gradient of row 0, column 0 is"
    )


def test_no_compiler_is_not_the_kernels_fault(monkeypatch, device, capsys, tmp_path):
    """Triton's own call for a compiler, where none is installed."""
    from triton.runtime.build import compile_module_from_src

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spoil(monkeypatch, "statistics", before=lambda a: compile_module_from_src("int x;", "nothing"))
    monkeypatch.setattr(trial, "cases", lambda *given: [SPLIT])
    assert trial.trial(device, CORE, timed=False) == 2
    proof, keep = prover.judged(capsys.readouterr().out, "", 2, None, 1.0)
    assert not proof.passed and not keep and "Failed to find C compiler" in proof.why


# The list -------------------------------------------------------------------------------------------------------------


def test_cases_go_through_all_that_decides_which_code_runs():
    every = cases()
    assert len({case.name for case in every}) == len(every)
    assert {case.vocabulary for case in every} == {300, 4099, 50257} and {case.tokens for case in every} == {37, 3}
    for way in ("split", "parts", "fused"):
        some = [case for case in every if case.way == way]
        for flag in ("masked", "infinite", "in_place", "close"):
            assert {getattr(case, flag) for case in some} == {True, False}, (way, flag)
        assert {case.layout for case in some} == {"aligned", "odd", "apart"}
        assert {case.kind for case in some} == {"reverse_kl", "forward_kl", "jsd", None}
        dtypes = {(case.logits, case.gradient) for case in some}
        assert len(dtypes) == (3 if way == "parts" else 6), way
    volta = cases(capability=(7, 0))
    assert volta and not [case for case in volta if BF16 in (case.logits, case.gradient)]
    with pytest.raises(ValueError, match="subject='kl' is not known; allowed: core, skew_kl"):
        cases("kl")


def test_every_op_has_its_subject():
    s = torch.zeros(2, 3)
    found = {subject_of(RowOp(kind, "auto"), s, s) for kind in (*DIVERGENCES.values(), None)}
    capped = {subject_of(RowOp(k, "auto", teacher=Side(1.0, 30.0)), s, s) for k in DIVERGENCES.values()}
    capped.add(subject_of(RowOp(None, "auto", student=Side(1.0, 30.0)), s, None))
    assert found | capped == set(SUBJECTS)
    assert subject_of(RowOp(DIVERGENCES["jsd"], "auto"), s, None) == CORE
    op = RowOp(DIVERGENCES["tvd"], "auto")
    assert subject_of(op, s, s.half()) is None and subject_of(op, s.double(), s.double()) is None


# What was measured ----------------------------------------------------------------------------------------------------


def test_the_fastest_must_be_faster_by_three_percent():
    size = Size(2, 1, 50257, 4096)
    table = [Timing(size, 1000.0, 98.0, 100.0), Timing(size._replace(tokens=64), 10.0, 11.0, None)]
    ways = ("fused", "split", "torch")
    assert fastest(table, size, "fused", ways) == "fused"  # 2 % are noise
    assert fastest([Timing(size, 1000.0, 96.0, 100.0)], size, "fused", ways) == "split"
    assert fastest(table, Size(2, 1, 49152, 100), "split", ways) == "torch"  # of few tokens
    assert fastest(table, Size(2, 1, 49152, 100), "split", ("split", "torch")) == "torch"
    assert fastest(table, Size(4, 1, 50257, 4096), "fused", ways) == "fused"  # not measured: the plan's own
    assert fastest(table, Size(2, 2, 50257, 4096), "split", ways) == "split"


def test_a_timing_survives_json():
    timing = Timing(SIZES[0], 3.0, 2.0, None)
    assert timing_of(timing.row()) == timing
    for bad in (
        [2, 1, 3, 4, 1.0, 1.0],
        [2, 1, 3, 4, -1.0, 1.0, 1.0],
        [2, 1, 3, 4, None, 1.0, 1.0],
        [2, 1, "x", 4, 1, 1, 1],
    ):
        with pytest.raises((TypeError, ValueError)):
            timing_of(bad)


def test_ways_are_timed_and_must_agree(monkeypatch, device):
    size = Size(4, 1, 300, 2)
    (timing,) = measure.measured(device, [size, size])  # the second is known already
    assert timing.size == size and min(timing.torch, timing.split, timing.of("fused")) > 0
    plain = _triton_rows.fused
    monkeypatch.setattr(_triton_rows, "fused", lambda *given: (lambda x: (x[0], x[1] * 1.01, x[2]))(plain(*given)))
    with pytest.raises(Wrong, match="loss at 2 x 300"):
        measure.measured(device, [size])


def test_nothing_is_timed_beyond_the_time_for_it(monkeypatch, device):
    monkeypatch.setattr(measure, "_times", lambda *given: iter([1.5]))
    sizes = [Size(4, 1, 300, n) for n in (1, 2, 3)]
    assert [timing.size for timing in measure.measured(device, sizes)] == sizes[:1]
