"""The store on disk: nothing half-written is ever read, what is damaged is found, one process owns a folder."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from mskd.config import ConfigError
from mskd.store import checkpoint
from mskd.store.done import changed_since, digests, read_done, write_done
from mskd.store.files import new_folder, write_json, write_text
from mskd.store.hashes import digest, stream_seed, weights_digest
from mskd.store.locks import lock


def test_digest_and_streams_depend_on_content_alone():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    seeds = {stream_seed(s, name, i) for s in range(3) for name in ("rollout", "lane") for i in range(3)}
    assert len(seeds) == 18 and all(0 <= s < 2**62 for s in seeds)


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    write_text(path, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["a"]
    with new_folder(tmp_path / "model") as folder:
        (folder / "c").write_text("3")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["c"]


def test_the_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from mskd.store.locks import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        (tmp_path / ".tmp-live").write_text("half")
        with pytest.raises(ConfigError, match=f"process {other.pid}"), lock(tmp_path):
            pass
        assert (tmp_path / ".tmp-live").exists()  # the refused one removes nothing of the owner's
    finally:
        other.kill()
        other.wait()
    with lock(tmp_path):
        assert not (tmp_path / ".tmp-live").exists()


def test_states_replace_each_other_and_bring_everything_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    tensors, plain = checkpoint.pack_optimizer(optimizer)
    checkpoint.save_state(tmp_path, {"step": 2}, tensors)
    checkpoint.save_state(tmp_path, {"step": 3, "plain": plain}, tensors)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".tmp-1").write_bytes(b"half")  # what a kill leaves: never read
    state = checkpoint.load_state(tmp_path)
    assert state.meta["step"] == 3
    fresh = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoint.unpack_optimizer(fresh, state.tensors, state.meta["plain"])
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    after = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    fresh.step()
    assert all(torch.equal(p, a) for p, a in zip(model.parameters(), after, strict=True))


def test_a_damaged_state_is_found(tmp_path):
    checkpoint.save_state(tmp_path / "state", {}, {"w": torch.arange(100.0)})
    (path,) = (tmp_path / "state").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged.*delete the folder"):
        checkpoint.load_state(tmp_path / "state")
    assert checkpoint.load_state(tmp_path / "empty") is None


def finish(folder, earlier=False):
    """A finished node; earlier: as versions left it whose done.json had no digest but that of the weights."""
    from safetensors.torch import save_file

    with new_folder(folder / "model") as model:
        save_file({"w": torch.arange(10.0)}, model / "model.safetensors")
        (model / "tokenizer.json").write_text("{}")
        (model / "README.md").write_text("a card")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    done = {"weights": weights_digest(folder / "model"), "parameters": 10, "versions": {}, "hardware": "CPU"}
    if earlier:
        write_json(folder / "done.json", done)
    else:
        write_done(folder, done)


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda node: (node / "model" / "model.safetensors").write_bytes(b"other"), "model"),
        (lambda node: (node / "model").rename(node / "elsewhere"), "model"),
        (lambda node: (node / "model" / "more.safetensors").write_bytes(b"x"), "model: its weights"),
        (lambda node: (node / "done.json").write_text("{"), "done.json: is no JSON"),
        (lambda node: (node / "done.json").write_text("{}"), "done.json: field weights is missing"),
        (lambda node: rewrite(node / "done.json", parameters="10"), "done.json: field parameters is '10'"),
        (lambda node: rewrite(node / "done.json", parameters=10**400), "done.json: field parameters is 1000"),
        (lambda node: ((node / "done.json").unlink(), os.mkfifo(node / "done.json")), "done.json: it is no regular"),
    ],
)
def test_a_damaged_node_is_found(tmp_path, harm, said, earlier):
    finish(tmp_path, earlier)
    assert read_done(tmp_path)["parameters"] == 10
    harm(tmp_path)
    with pytest.raises(ConfigError, match=f"^damaged: {tmp_path}/{said}.*; delete the folder {tmp_path} and run"):
        read_done(tmp_path)


def test_done_vouches_for_every_file_and_for_itself(tmp_path):
    finish(tmp_path)
    for name, harm in (
        ("model/tokenizer.json", lambda file: file.write_text("[]")),
        ("model/tokenizer.json", lambda file: file.unlink()),
        ("model/tokenizer.json", lambda file: (file.unlink(), file.mkdir())),
        ("model/tokenizer.json", lambda file: (file.unlink(), file.symlink_to(file))),
        ("model/tokenizer.json", lambda file: (file.unlink(), file.symlink_to("/dev/zero"))),
        ("done.json", lambda file: rewrite(file, parameters=11)),
    ):
        node = tmp_path / f"node-{len(list(tmp_path.iterdir()))}"
        finish(node)
        harm(node / name)
        with pytest.raises(ConfigError, match=f"^damaged: {node / name}: .*; delete the folder {node} and run"):
            read_done(node)


def test_a_file_that_was_damaged_before_its_node_was_finished_is_found(tmp_path):
    """A snapshot's digest is taken when it is written: what a kill and a disk do until the node's end is seen."""
    snapshot = tmp_path / "phases" / "0-kd" / "config.json"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_text("{}")
    taken = digests(tmp_path, "phases/0-kd")
    assert list(taken) == ["phases/0-kd/config.json"]
    snapshot.write_text("[]")
    write_done(tmp_path, {"weights": None, "parameters": 10, "versions": {}, "hardware": "CPU", "files": taken})
    with pytest.raises(ConfigError, match=f"^damaged: {snapshot}: it is not what was written"):
        read_done(tmp_path)


def test_the_record_of_another_node_is_not_taken(tmp_path):
    done = {"weights": None, "parameters": 10, "versions": {}, "hardware": "CPU", "hash": "one"}
    write_done(tmp_path, done)
    assert read_done(tmp_path, node="one")["parameters"] == 10
    with pytest.raises(ConfigError, match="^damaged: .*done.json: it is that of another node; delete the folder"):
        read_done(tmp_path, node="another")


def test_what_only_informs_may_change_and_is_said_to_have(tmp_path):
    finish(tmp_path)
    (tmp_path / "model" / "README.md").write_text("another card")
    done = read_done(tmp_path)
    assert changed_since(tmp_path, done) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    assert read_done(tmp_path) == done and changed_since(tmp_path, done) == ["metrics.jsonl"]


def test_no_done_file_means_not_done(tmp_path):
    assert read_done(tmp_path) is None


def test_what_a_killed_writer_left_of_a_file_goes_with_the_next_write(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living = (tmp_path / f".tmp-a.jsonl-{pid}" for pid in (dead.pid, os.getppid()))
    other = tmp_path / f".tmp-b.jsonl-{dead.pid}"
    for path in (left, living, other):
        path.write_text("half")
    write_text(tmp_path / "a.jsonl", "whole")
    assert (tmp_path / "a.jsonl").read_text() == "whole"
    assert not left.exists() and living.exists() and other.exists()
