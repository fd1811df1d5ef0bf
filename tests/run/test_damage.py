"""Whatever is damaged of what a run left: one line or made again, never a traceback, never other figures unsaid."""

import contextlib
import hashlib
import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from chain_setup import config, write_rows
from damage import damages, restore

from mskd.config import load, to_toml
from mskd.evaluation import statistics
from mskd.run.chain import distill

SECONDS = 60  # for any command on this run, on a busy machine; it takes one or two
OUTPUTS = {"report.md", "report.html", "lock"}  # what a command writes anew, as it does pictures
READ = ("index.json", "done.json", "config.toml", "metrics.jsonl")  # by a report, besides evaluations


@pytest.fixture(scope="module")
def setting(tiny_llama_folder, tmp_path_factory):
    """A configuration file, the OUT of its run, and a copy that tests damage."""
    folder = tmp_path_factory.mktemp("damage")
    phases = [
        {"objective": "kd", "steps": 2, "batch_size": 4, "micro_batch_size": 4, "keep": "best", "eval_every": 1},
        {"objective": "minillm", "steps": 2, "rollouts": 2, "batch_size": 2, "max_new_tokens": 4},
    ]
    evaluation = {"protocol": "quick", "max_new_tokens": 4, "limit": 2}
    given = config(
        tiny_llama_folder, write_rows(folder / "rows.jsonl"), chain={"paths": [["teacher", "student"]]}, phases=phases,
        evaluation=evaluation,
    )  # fmt: skip
    (folder / "tiny.toml").write_text(to_toml(given))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        distill(load(folder / "tiny.toml"), folder / "whole", echo=lambda line: None)
    shutil.copytree(folder / "whole", folder / "out")
    return folder


def quicken(patch):
    """Fewer resamples, and pictures that are a digest of what would be drawn: a report takes a tenth of the time."""
    from matplotlib.figure import Figure

    def drawn(figure, path, format):
        texts = [[axes.get_title(), axes.get_ylabel(), *(t.get_text() for t in axes.texts)] for axes in figure.axes]
        curves = [[line.get_label(), line.get_xydata().tolist()] for axes in figure.axes for line in axes.lines]
        Path(path).write_text(hashlib.sha256(repr((texts, curves)).encode()).hexdigest())

    patch.setattr(statistics, "RESAMPLES", 500)
    patch.setattr(Figure, "savefig", drawn)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


# -- what a command may do ------------------------------------------------------------------------


class Late(BaseException):
    """No Exception: the command must not take it for an error of its own."""


@contextlib.contextmanager
def limited():
    """Late after SECONDS, also where a read of a pipe waits."""

    def late(*arguments):
        raise Late(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def report(setting):
    return ["report", setting / "out" / "runs" / "tiny"]


def again(setting):
    return ["distill", setting / "tiny.toml", "--out", setting / "out"]


def wrong(run, setting, command, file, damage, whole="whole"):
    """What a command did wrong on a damaged file, "" where all is well."""
    restore(setting / whole, setting / "out")
    damage.apply(setting / "out" / file)
    done = [path.relative_to(setting / whole) for path in (setting / whole).rglob("done.json")]
    lost = not all((setting / "out" / path).exists() for path in done)
    try:
        with limited():
            code, out, err = run(*command(setting))
    except (Exception, Late) as e:
        return repr(e)
    said = [line for line in err if line.startswith("mskd: ")]
    if code == 2:
        return "" if len(said) == len(err) == 1 else f"{len(err)} lines: {err}"
    if code != 0 or said:
        return f"exit {code}, {err}"
    return unsaid(setting, command, file, out, lost) if whole == "whole" else ""


def unsaid(setting, command, file, out, lost):
    """What differs after a command that ended well, without a word. lost: whether a node had to be made again."""
    reports = [(setting / folder / "runs" / "tiny" / "report.md").read_text() for folder in ("whole", "out")]
    pages = [(setting / folder / "runs" / "tiny" / "report.html").read_text() for folder in ("whole", "out")]
    weights = [
        {p.relative_to(setting / folder): p.read_bytes() for p in (setting / folder).rglob("*.safetensors")}
        for folder in ("whole", "out")
    ]
    if command is again and weights[0] != weights[1]:
        return "other weights"
    if command is again and lost:
        return ""  # the same weights, trained at another time
    absent = reports[1].partition("## Absent")[2]
    if not absent and undated(pages[0]) != undated(pages[1]):
        return "another report"
    told = "\n".join([*out, absent.replace("\\", "")])
    if command is again and not made_again(setting, file) and file.name not in told:
        return "the damage is still there"
    return ""


def undated(text):
    return re.sub(r"\d{4}-\d\d-\d\d( \d\d:\d\d)?", "", text)


def made_again(setting, file):
    """Whether a file is what it was."""
    if file.name in OUTPUTS or file.suffix == ".png" or (setting / "whole" / file).is_dir():
        return True
    return content(setting / "whole" / file) == content(setting / "out" / file)


def content(file):
    """A file's content, without the day of the command."""
    if not file.is_file():
        return None
    data = file.read_bytes()
    if file.name == "index.json":
        return {k: v for k, v in json.loads(data).items() if k not in ("date", "digest")}
    return [line for line in data.splitlines() if not line.startswith(b"#")] if file.name == "config.toml" else data


# -- damage of every kind -------------------------------------------------------------------------


def cases(setting, each, share=1.0, wanted=lambda file: True, whole="whole"):
    """`each` damages of a share of the run's files and folders, drawn."""
    generator = random.Random(0)
    for path in sorted((setting / whole).rglob("*")):
        file = path.relative_to(setting / whole)
        if wanted(file) and generator.random() < share:
            found = list(damages(path, generator))
            yield from ((file, damage) for damage in generator.sample(found, min(each, len(found))))


def check(run, setting, command, drawn, whole="whole"):
    found = {f"{file}: {damage.name}": wrong(run, setting, command, file, damage, whole) for file, damage in drawn}
    assert found and not {case: what for case, what in found.items() if what}


def in_report(file):
    return file.name in READ or file.suffix == ".jsonl"


def test_a_report_of_damaged_files(run, setting):
    check(run, setting, report, cases(setting, 4, wanted=in_report))


def test_the_same_command_on_damaged_files(run, setting):
    check(run, setting, again, cases(setting, 1, share=0.3))


def restored(setting):
    restore(setting / "whole", setting / "out")
    return setting / "out", *(setting / "out").glob("hops/*")


def test_a_state_that_a_kill_left_behind_goes_with_the_next_command(run, setting):
    _, hop = restored(setting)
    (hop / "state").mkdir()
    (hop / "state" / "00000001-x.safetensors").write_text("weights and optimizer")
    assert run(*again(setting))[0] == 0 and not (hop / "state").exists()


def test_a_cut_that_was_damaged_before_its_node_was_finished_is_made_again(run, setting):
    out, _ = restored(setting)
    (node,) = out.glob("models/student-*")
    (node / "done.json").unlink()
    for name in ("model.safetensors", "config.json"):
        file = node / "model" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + b"xx")
        code, lines, _ = run(*again(setting))
        assert code == 0 and file.read_bytes() == whole and any("keeps layers" in line for line in lines)
        (node / "done.json").unlink()
    assert run(*again(setting))[0] == 0


def test_changed_metrics_are_said_to_be_and_their_curves_left_out(run, setting):
    out, hop = restored(setting)
    metrics = hop / "metrics.jsonl"
    metrics.write_text(re.sub(r'"train/loss": \d', '"train/loss": 7', metrics.read_text(), count=1))
    code, lines, _ = run(*again(setting))
    assert code == 0 and "teacher>student: metrics.jsonl was changed after the training; nothing uses it now" in lines
    text = (out / "runs" / "tiny" / "report.md").read_text()
    assert "No metrics are stored." in text and "metrics.jsonl is damaged" in text.split("## Absent")[1]


def test_the_evaluation_of_another_model_is_not_taken(run, setting):
    out, _ = restored(setting)
    one, other, *_ = sorted(out.glob("evals/*/*.jsonl"))
    shutil.copyfile(other, one)
    code, _, err = run(*report(setting))
    assert code == 2 and err == [
        f"mskd: damaged: {one}: it is not the evaluation that index.json names; delete it and run the same command"
    ]
    one.unlink()
    assert run(*again(setting))[0] == 0 and one.read_bytes() == (setting / "whole" / one.relative_to(out)).read_bytes()


def test_an_emptied_configuration_is_not_another_one(run, setting):
    out, _ = restored(setting)
    (out / "runs" / "tiny" / "config.toml").write_text("")
    assert run(*report(setting))[0] == 0
    absent = (out / "runs" / "tiny" / "report.md").read_text().split("## Absent")[1]
    assert "config.toml, the configuration of the run" in absent
    code, _, err = run(*again(setting))
    assert code == 2 and len(err) == 1 and "config.toml is no configuration" in err[0] and "delete it and run" in err[0]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "each", "wanted"), [(report, 400, in_report), (again, 30, lambda file: True)])
def test_many_more_damages_of_every_file(run, setting, command, each, wanted):
    check(run, setting, command, cases(setting, each, wanted=wanted))


# -- files of earlier versions, which vouch for nothing -------------------------------------------


@pytest.fixture(scope="module")
def earlier(setting):
    """The same OUT as versions left it that had no digests."""
    shutil.copytree(setting / "whole", setting / "earlier")
    for path in (p for p in (setting / "earlier").rglob("*") if p.suffix in (".json", ".jsonl", ".toml")):
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(without(line)) + "\n" for line in lines))
        elif path.suffix == ".toml":
            path.write_text(path.read_text().partition("\n")[2])
        elif path.name in ("done.json", "evaluations.json", "index.json"):
            path.write_text(json.dumps(without(json.loads(path.read_text())), indent=2))
    return setting


def without(record):
    kept = {k: v for k, v in record.items() if k not in ("digest", "files")}
    return kept | ({"evals": [without(e) for e in kept["evals"]]} if "evals" in kept else {})


def test_a_run_of_an_earlier_version_is_read_and_goes_on(run, earlier):
    restore(earlier / "earlier", earlier / "out")
    assert run(*report(earlier))[0] == 0
    pages = [(earlier / folder / "runs" / "tiny" / "report.html").read_text() for folder in ("whole", "out")]
    assert undated(pages[0]) == undated(pages[1])
    code, out, err = run(*again(earlier))
    assert code == 0 and not err and sum("done before" in line for line in out) == 3
    assert not [line for line in out if "damaged" in line or "changed" in line or "evaluating" in line]
    (done,) = (earlier / "out").glob("hops/*/done.json")
    assert "files" not in json.loads(done.read_text())  # nobody knows what it would vouch for


def test_damaged_files_of_an_earlier_version(run, earlier):
    check(run, earlier, report, cases(earlier, 4, wanted=in_report, whole="earlier"), "earlier")
    check(run, earlier, again, cases(earlier, 1, share=0.1, whole="earlier"), "earlier")


@pytest.mark.slow
def test_many_more_damaged_files_of_an_earlier_version(run, earlier):
    check(run, earlier, report, cases(earlier, 200, wanted=in_report, whole="earlier"), "earlier")
    check(run, earlier, again, cases(earlier, 10, whole="earlier"), "earlier")
