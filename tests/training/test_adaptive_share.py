"""DistiLLM's adaptive share and replay buffer: the rule, whose responses a round holds, a killed run going on."""

import contextlib
import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_mixture import DATA, Killed, dying_at, mixture

from mskd.config.phases import AdaptiveShare, DistillmPhase, GkdPhase, Replay
from mskd.data.instructions import Example
from mskd.sampling.draw import uniforms
from mskd.store.hashes import digest, stream_seed
from mskd.training import hop
from mskd.training.work.adaptive_share import RisingShare
from mskd.training.work.data_parallel import lanes
from mskd.training.work.replay import ReplayBuffer

# Loss, and by hand the share then in force and the reference: margin 0.25, step 0.25, from 0.5.
SCHEDULE = [
    (2.0, 0.5, 2.0),  # before the first step
    (2.125, 0.5, 2.0),  # risen by less than the margin
    (2.25, 0.75, 2.25),  # by the margin itself: the share rises, and this is the reference
    (2.375, 0.75, 2.25),
    (1.0, 0.75, 2.25),  # a fall changes neither
    (2.0, 0.75, 2.25),  # nor does a rise that stays below the reference
    (float("nan"), 0.75, 2.25),
    (3.0, 1.0, 3.0),
    (4.0, 1.0, 4.0),  # 1 is the most
]


def test_the_share_rises_as_computed_by_hand_and_goes_on_from_its_state():
    rule = AdaptiveShare(step=0.25, margin=0.25)
    share = RisingShare(rule, 0.5)
    assert share.state() == {}
    for loss, value, reference in SCHEDULE:
        again = RisingShare(rule, 0.5)
        again.restore(share.state())
        for each in (share, again):
            each.observe(loss)
            assert (each.value, each.reference) == (value, reference)


def test_ten_steps_of_a_tenth_are_the_whole():
    share = RisingShare(AdaptiveShare(margin=0.0), 0.0)
    found = [share.observe(float(loss)) or share.value for loss in range(12)]
    assert found == [n / 10 for n in range(11)] + [1.0]


def example(n):
    return Example("", (n, n + 1), (n,) * (n % 3), ())  # a response may be empty


def test_the_buffer_keeps_the_newest_and_gives_each_at_most_once():
    buffer = ReplayBuffer(Replay(capacity=4), steps=8, seed=1)
    buffer.put([example(n) for n in range(3)])
    assert buffer.fresh(0) == buffer.fresh(7) == 1.0  # not full yet
    buffer.put([example(n) for n in range(3, 6)])
    assert list(buffer.kept) == [example(n) for n in range(2, 6)]
    assert [buffer.fresh(step) for step in (0, 3, 7)] == [7 / 8, 1 / 2, 0.0]
    again = ReplayBuffer(Replay(capacity=4), steps=8, seed=1)
    again.restore(buffer.state())
    assert again.kept == buffer.kept
    seen = [0] * 6
    for number in range(300):
        drawn = buffer.draw(number, [1, 5, 6])
        assert drawn == again.draw(number, [1, 5, 6]) and list(drawn) == [1, 5, 6]
        assert len(set(drawn.values())) == 3
        for e in drawn.values():
            seen[e.prompt_ids[0]] += 1
    assert seen[:2] == [0, 0] and all(count == pytest.approx(225, abs=40) for count in seen[2:])


@pytest.mark.parametrize(("fresh", "first", "last"), [("constant", 0.5, 0.5), ("increasing", 0.25, 1.0)])
def test_how_much_is_drawn_anew(fresh, first, last):
    buffer = ReplayBuffer(Replay(capacity=1, fresh=fresh), steps=4, seed=1)
    buffer.put([example(1)])
    assert (buffer.fresh(0), buffer.fresh(3)) == (first, last)


# -- rounds ----------------------------------------------------------------------------------------

REPLAYED = {"student_share": 0.75, "replay": {"capacity": 10, "fresh": "decreasing"}, "steps": 16}


def ids_of(examples):
    return [(e.prompt_ids, e.response_ids) for e in examples]


def kept_of(source):
    return ids_of(source.replay.kept)


def test_a_round_is_new_responses_repeated_ones_and_the_datas():
    """Every place of eight rounds against the rule written out, the buffer against a plain list of all responses."""
    source, _ = mixture("distillm", **REPLAYED)
    newest, kinds = deque(maxlen=10), {"new": 0, "repeated": 0, "data": 0}
    for number in range(8):
        full, new, repeated = len(newest) == 10, [], []
        ids = torch.arange(8 * number, 8 * number + 8)
        u = uniforms(stream_seed(5, "student_share"), ids, torch.tensor(0)).tolist()
        source.work(2 * number)
        examples = source._examples(number)
        for i in range(8):
            found = (source.sequences[i].prompt_ids, source.sequences[i].response_ids)
            step = 2 * number + i // 4  # of 16
            if u[i] < 0.75 * (1 - (step + 1) / 16 if full else 1):
                alone = source.sampler([examples[i].prompt_ids], [8 * number + i], temperature=1.0).responses()
                assert found == (examples[i].prompt_ids, tuple(alone[0]))
                new.append(found)
            elif u[i] < 0.75:
                assert found in newest
                repeated.append(found)
            else:
                assert found == (examples[i].prompt_ids, DATA)
        assert len(set(repeated)) == len(repeated) and kept_of(source) == list(newest)
        source.work(2 * number + 1)
        newest.extend(new)
        assert kept_of(source) == list(newest)
        for kind, count in zip(kinds, (len(new), len(repeated), 8 - len(new) - len(repeated)), strict=True):
            kinds[kind] += count
    assert min(kinds.values()) > 8


def test_rounds_with_a_buffer_go_on_from_the_state_of_every_step():
    source, job = mixture("distillm", **REPLAYED, adaptive_share={"margin": 0.0}, eval_every=2)
    source.share.observe(1.0)
    for step in range(16):
        again, _ = mixture("distillm", **REPLAYED, adaptive_share={"margin": 0.0}, eval_every=2)
        again.restore(step, source.state(step))
        if step % 2:
            again.sampler = None  # within a round nothing is drawn anew
        for each in (source, again):
            each.work(step)
            if step % 2:
                each.share.observe(float(step))
        assert ids_of(again.sequences.values()) == ids_of(source.sequences.values())
        assert kept_of(again) == kept_of(source) and again.student_share == source.student_share
        states = again.state(step + 1), source.state(step + 1)
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert source.student_share == 1.0  # 0.75, 0.85, 0.95, 1


def test_rounds_with_a_buffer_do_not_depend_on_the_number_of_processes(monkeypatch):
    whole, job = mixture("distillm", **REPLAYED)
    rounds, brought = [], []
    for step in range(16):
        monkeypatch.setattr("mskd.training.work.on_mixture.gathered", lambda job, items: brought.append(items) or items)
        whole.work(step)
        if step % 2:
            rounds.append(dict(whole.sequences))
    assert len(brought) == 8
    found = [{} for _ in rounds]
    for rank in range(2):
        part, _ = mixture("distillm", **REPLAYED)
        acc = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        part.job = part.sampler.job = replace(job, accelerator=acc)
        mine = set(lanes(part.job, part.phase))
        for step in range(16):

            def gathered(job, items, everything=brought[step // 2], mine=mine):
                assert items == [pair for pair in everything if pair[0] in mine]
                other = [pair for pair in everything if pair[0] not in mine]
                return other + items  # in the order of ranks, not of places

            monkeypatch.setattr("mskd.training.work.on_mixture.gathered", gathered)
            part.work(step)
            if step % 2:
                found[step // 2] |= part.sequences
    assert found == rounds


def test_off_they_change_neither_hash_nor_rounds():
    for phase in (GkdPhase(steps=1), DistillmPhase(steps=1)):
        assert not {"adaptive_share", "replay"} & phase.identity().keys()
    digests = [digest(phase(steps=1).identity()) for phase in (GkdPhase, DistillmPhase)]
    assert [d[:16] for d in digests] == ["b5c970da9220649d", "26bdc96e6fc777d4"]  # of before there were these fields
    on = DistillmPhase(steps=1, eval_every=1, adaptive_share={}, replay={}).identity()
    assert on["adaptive_share"] == {"step": 0.1, "margin": 0.1}
    assert on["replay"] == {"capacity": 1000, "fresh": "decreasing"}
    source, _ = mixture()
    assert [source.own(n) for n in range(4)] == [[2, 3, 5], [0, 1, 4, 5, 7], [0, 4, 5, 6], [1, 6]]
    source.work(0)
    assert list(source.state(1)) == ["0.ids", "0.lengths"] and source.state(2) == {}


# -- in a hop --------------------------------------------------------------------------------------

ADAPTIVE = {"steps": 12, "student_share": 0.25, "eval_every": 2, "adaptive_share": {"step": 0.25, "margin": 0.0},
            "replay": {"capacity": 8, "fresh": "constant"}, "lr": 0.01}  # fmt: skip


def hop_of(folder):
    """A hop whose validation loss rises: the answers there are those of the untrained student. It saves every step."""
    _, job = mixture("distillm", **ADAPTIVE)
    validation = tuple(replace(e, response_ids=likeliest(job.student, e.prompt_ids)) for e in job.data.train[:3])
    return replace(job, directory=folder, data=replace(job.data, validation=validation))


def likeliest(student, prompt_ids):
    with torch.no_grad():
        return (int(student(torch.tensor([prompt_ids])).logits[0, -1].argmax()),)


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The hop without a kill: its folder and what done.json says of its weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, hop.train(hop_of(folder))["weights"]


@pytest.mark.parametrize(
    ("name", "call", "least"),
    [("training.hop.backward", 2, 11), ("sampling.slots.draw", 13, 2), ("training.hop.validation_nll", 2, 5)],
)
def test_killed_again_and_again_a_hop_ends_with_the_same_bits(name, call, least, whole, tmp_path, monkeypatch):
    """At every step, in samplings and in validations: always at that call since it went on."""
    kills, done = 0, None
    while done is None and kills < 20:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(f"mskd.{name}", dying_at(f"mskd.{name}", call))
            done = hop.train(hop_of(tmp_path))
        kills += done is None
    assert kills >= least and done is not None
    assert done["weights"] == whole[1] and lines_of(tmp_path) == lines_of(whole[0])


def test_the_shares_of_the_metrics_are_those_that_the_validation_losses_ask_for(whole):
    lines = lines_of(whole[0])
    steps = [line for line in lines if "train/loss" in line]
    losses = {line["step"]: line["eval/nll"] for line in lines if "eval/nll" in line}
    assert len(steps) == 12 and list(losses) == [2, 4, 6, 8, 10, 12]
    share, reference = 0.25, steps[0]["train/share_reference"]
    assert reference == pytest.approx(nll_before(), rel=1e-4)
    for line in steps:
        assert (line["train/student_share"], line["train/share_reference"]) == (share, reference)
        if losses.get(line["step"], -1.0) >= reference:
            share, reference = min(share + 0.25, 1.0), losses[line["step"]]
    assert len({line["train/student_share"] for line in steps}) > 2


def nll_before():
    """Cross-entropy of the validation responses before the first step, from full logits."""
    job = hop_of(Path())
    total = 0.0
    for e in job.data.validation:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        logits = job.student.eval()(ids).logits[0, len(e.prompt_ids) - 1 : -1].detach().double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(e.prompt_ids) :], reduction="sum"))
    return total / sum(len(e.response_ids) for e in job.data.validation)
