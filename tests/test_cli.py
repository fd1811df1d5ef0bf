"""The command line: plain flags, exit codes, and one line on stderr for every mistake; nothing is written over."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import mskd_kernels
import pytest
import torch
from chain_setup import environment, mskd, tree, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mskd.cli import from_flags
from mskd.config import hardware, load, parse, to_toml
from mskd.store.files import output_folder

SMALL = [
    "--set", "phases.kd.epochs=0.5", "--set", "phases.kd.batch_size=4", "--set", "phases.minillm.rollouts=4",
    "--set", "phases.minillm.batch_size=4", "--set", "phases.minillm.steps=2",
    "--set", "phases.minillm.max_new_tokens=4",
    "--set", "evaluation.max_new_tokens=4", "--set", "run.device=cpu",
]  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def test_plain_flags_on_a_local_file(run, rows, tiny_llama_folder, tmp_path):
    flags = ["--teacher", tiny_llama_folder, "--via", "{layers = 3}", "--student", "{layers = 2}", "--data", rows]
    code, out, _ = run("distill", *flags, "--out", tmp_path / "out", *SMALL)
    assert code == 0
    summary = json.loads(out[-1])
    assert list(summary["paths"]) == ["teacher>ta>student"]
    shown = next(line for line in out if line.startswith("teacher > ta > student: "))
    questions = tmp_path / "vicuna.jsonl"
    questions.write_text('{"question_id": 1, "turns": ["request response"]}\n')
    asked = ["evaluate", shown.split(": ")[1], "--data", rows, "--data", questions, "--out", tmp_path / "out"]
    code, out, _ = run(*asked, "--teacher", tiny_llama_folder, *SMALL[-4:])
    found = json.loads(out[-1])
    own, other = found["data"][str(rows)], found["data"][str(questions)]
    assert code == 0 and own["perplexity"]["mean"] > 1
    assert len(open(own["file"]).readlines()) == own["items"] == 24  # all rows of the file
    assert other["items"] == 1 and other["rouge_l"] is None and list(other["reverse_kl"]) == [tiny_llama_folder.name]
    lines = {line.split(": ")[0]: line for line in out[1:-1]}
    assert f"Perplexity {own['perplexity']['mean']:,.0f}"[:14] in lines[str(rows)]
    assert "no reference responses" in lines[str(questions)] and "Reverse KL" in lines[str(questions)]
    code, again, _ = run(*asked, "--teacher", tiny_llama_folder, *SMALL[-4:])
    assert json.loads(again[-1]) == found and sum("evaluated before" in line for line in again) == 2
    code, _, err = run(*asked, "--set", f"data.test='{rows}'")
    assert code == 2 and "data.test is a file, and 2 data sets are given" in err[0]
    open(other["file"], "w").write("{")
    code, _, err = run(*asked, "--teacher", tiny_llama_folder, *SMALL[-4:])
    assert code == 2 and "line 1 is no JSON" in err[0] and err[0].endswith("; delete it and run the same command")
    code, out, _ = run("report", tmp_path / "out" / "runs" / "run")
    assert code == 0 and out[-1].endswith("report.md")


@pytest.mark.parametrize("out", ["~nosuchuser/x", "x" * 3000, "/proc/x"])
def test_an_output_folder_that_cannot_be_is_one_line(run, rows, tiny_llama_folder, out):
    flags = ["--teacher", tiny_llama_folder, "--student", "{layers = 2}", "--data", rows, "--out", out, *SMALL]
    code, _, err = run("distill", *flags)
    assert code == 2 and len(err) == 1 and "the output folder" in err[0] and len(err[0]) < 300


def test_an_output_folder_below_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("~/out") == tmp_path / "out" and (tmp_path / "out").is_dir()


@pytest.mark.parametrize("place", ["evals", "models", "runs"])
def test_a_file_in_a_folders_place_is_one_line(run, rows, tiny_llama_folder, tmp_path, place):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("a file")
    flags = ["--teacher", tiny_llama_folder, "--student", "{layers = 2}", "--data", rows, "--out", tmp_path / "out"]
    code, _, err = run("distill", *flags, *SMALL)
    said = [line for line in err if line.startswith("mskd: ")]
    assert code == 2 and len(said) == 1 and str(path) in said[0] and path.read_text() == "a file"


def test_flags_stand_for_a_path_with_a_warm_up_where_a_model_is_cut():
    cut = from_flags("big", ["{layers = 3}", "mid"], "{layers = 2}", "d", [])
    assert cut.chain.paths == (("teacher", "ta1", "ta2", "student"),)
    assert cut.models["ta1"].from_ == cut.models["student"].from_ == "teacher" and cut.models["ta2"].source == "mid"
    assert [p.objective for p in cut.phases] == ["kd", "minillm"]
    assert [p.objective for p in from_flags("big", [], "small", "d", []).phases] == ["minillm"]
    precise = from_flags("{source = 'big', precision = 'fp32'}", [], "small", "d", [])
    assert precise.models["teacher"].precision == "fp32"


def test_doctor_says_what_and_why(run):
    code, out, _ = run("doctor")
    text = "\n".join(out)
    assert code == 0
    for word in ("torch", "transformers", "attention", "int8", "losses"):
        assert word in text
    if not torch.cuda.is_available():
        assert re.search(r"a product of matrices in bf16 (was|took) .*\d\.\d times", text)


def test_help_is_whole_in_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, shown, _ = run("--help")
    commands = [line.split()[0] for line in shown[shown.index("Commands:") + 1 :]]
    assert {"distill", "plan", "evaluate", "report", "doctor"} <= set(commands)
    for command in [[], *([name] for name in commands)]:
        code, shown, err = run(*command, "--help")
        assert (code, err) == (0, []) and shown[0].startswith(" ".join(["Usage: mskd", *command]))
        for line in shown:
            assert len(line) <= 80 and "..." not in line.replace("[ARGS]...", ""), line


def test_version_is_one_line_and_light():
    code = "import sys; sys.argv = ['mskd', '--version']; from mskd.cli import main\n"
    code += "try: main()\nexcept SystemExit as e: print(e.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    line, end = shown.stdout.splitlines()
    assert re.fullmatch(r"mskd \S+ \(torch \S+, transformers \S+, Python 3\.\S+\)", line) and torch.__version__ in line
    assert end == "0 []"


def test_completion_for_a_shell(tmp_path):
    """What the shell's script asks of the command, and that it is installed."""

    def asked(words, **more):
        where = {
            "_MSKD_COMPLETE": "complete_bash",
            "COMP_WORDS": f"mskd {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        return mskd(env=where | more, check=True).stdout.split()

    assert asked("dis") == ["distill"] and "--dry-run" in asked("distill --dry")
    assert asked("distill dol") == ["dolly-smollm2", "dolly-smollm2-cpu"]
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "_MSKD_COMPLETE=complete_bash" in mskd("--show-completion", "bash", env=home, check=True).stdout
    mskd("--install-completion", "bash", env=home, check=True)
    (script,) = tmp_path.glob(".bash_completions/mskd.sh")
    assert "complete" in script.read_text() and str(script) in (tmp_path / ".bashrc").read_text()


def test_plan_writes_what_distill_takes_and_nothing_before(run, tmp_path):
    file = tmp_path / "run.toml"
    question = ["plan", "--teacher", "gpt2-xl", "--target", "124M", "--write", file]
    code, _, _ = run(*question, "--set", "seed=x")
    assert code == 2 and not file.exists()
    code, _, _ = run(*question, "--data", "é😀\x7f.jsonl")
    assert code == 0 and load(file).data.source == "é😀\x7f.jsonl"
    code, _, err = run(*question)
    assert code == 2 and "exists and is not written over" in err[0]
    code, shown, _ = run("plan", file, "--data", '"odd" é😀.jsonl')
    assert code == 0 and shown


def test_doctor_proves_the_kernels_anew_where_there_is_a_gpu(run, monkeypatch):
    proven, given = [], mskd_kernels.backend_for
    monkeypatch.setattr(mskd_kernels, "prove", proven.append)
    monkeypatch.setattr(mskd_kernels, "backend_for", lambda device: ("triton", f"proven on {device.type}"))
    assert "triton: proven on cpu" in "\n".join(run("doctor", "--prove")[1]) and not proven
    gpu = replace(hardware.detect("cpu"), device=torch.device("cuda", 0))
    monkeypatch.setattr(hardware, "detect", lambda: gpu)
    assert "triton: proven on cuda" in "\n".join(run("doctor")[1]) and not proven
    assert run("doctor", "--prove")[0] == 0 and proven == [gpu.device]
    monkeypatch.setattr(mskd_kernels, "backend_for", given)
    monkeypatch.setenv("MSKD_KERNELS", "fast")
    code, _, err = run("doctor")
    assert code == 2 and "MSKD_KERNELS='fast' is not known; allowed: auto, torch, triton, retest" in "".join(err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["distill", "dmeo"], "did you mean 'demo'"),
        (["distill"], "without a recipe --teacher is needed"),
        (["distill", "--teacher", "x", "--data", "y"], "--student is needed"),
        (["distill", "demo", "--teacher", "x"], "--set models.teacher="),
        (["distill", "--techer", "x"], "--techer"),
        (["distill", "demo", "--set", "phases.minillm.lrr=1"], "did you mean 'lr'"),
        (["distill", "demo", "--set", "seed=x"], "seed is 'x'"),
        (["distill", "demo", "--set", "chain.paths=[['teacher','tb']]"], "names 'tb', which is no model"),
        (["distill", "--teacher", "{layers", "--student", "s", "--data", "d"], "no inline table"),
        (["distill", "--teacher", "./nowhere", "--student", "s", "--data", "d"], "nowhere"),
        (["evaluate", "./nowhere"], "nowhere"),
        (["report", "./nowhere"], "nowhere"),
        (["distil"], "distil"),
        (["distill", "demo", "--data", ""], "data.source is ''"),
        (["distill", "demo", "--teacher", ""], "--teacher goes without a recipe"),
        (["distill", "--teacher", "", "--student", "s", "--data", "d"], "models.teacher.source is ''"),
        (["distill", "--teacher", "x", "--student", "{layers = 1}\na = 2", "--data", "d"], "goes on after its inline"),
        (["distill", "--teacher", "{a = " + "[" * 5000, "--student", "s", "--data", "d"], "nested too deep"),
        (["distill", "demo", "--set", "models.teacher.source=" + "x" * 3000], "File name too long"),
        (["distill", "demo", "--set", "models.teacher.source=~nosuchuser/x"], "Could not determine home directory"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "~nosuchuser/x"], "home directory"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "x" * 3000], "File name too long"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "ROWS/"], "but is a file"),
        (["distill", "demo", "--dry-run", "--set", "data.source=" + "x" * 3000], "File name too long"),
        (["distill", "run\udcff.toml"], "no recipe or file 'run\\udcff.toml'"),
        (["evaluate", ""], "the model is empty"),
        (["evaluate", "MODEL", "--data", ""], "data.source is ''"),
        (["report", ""], "it is empty"),
        (["report", "~nosuchuser/x"], "Could not determine home directory"),
        (["report", "x" * 3000], "File name too long"),
        (["plan", "--teacher", "gpt2-xl", "--target", "124M", "--data", ""], "data.source is ''"),
        (["plan", "--teacher", "gpt2-xl", "--target", "9" * 400], "is no size; give a number like 124M"),
        (["plan", "--teacher", "gpt2-xl", "--target", "124M", "--write", ""], "it is empty"),
        (["plan", "--teacher", "gpt2-xl", "--target", "124M", "--write", "/proc/x.toml"], "cannot be written"),
        (["plan", "--teacher", "gpt2-xl", "--target", "124M", "--write", "x" * 3000], "File name too long"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 9}", "--data", "ROWS"], "give at most 4"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "EMPTY"], "empty"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "BROKEN"], "broken.jsonl"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "COLUMNS"], "column"),
        (["distill", "--teacher", "MODEL", "--student", "{layers = 2}", "--data", "ROWS",
          "--set", "run.trackers=['x']"], "no tracker"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_and_exit_code_2(run, rows, tiny_llama_folder, tmp_path, arguments, says):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"instruction": ')
    (tmp_path / "columns.jsonl").write_text('{"foo": "a", "bar": "b"}\n')
    places = {
        "MODEL": tiny_llama_folder, "ROWS": rows, "EMPTY": tmp_path / "empty.jsonl",
        "BROKEN": tmp_path / "broken.jsonl", "COLUMNS": tmp_path / "columns.jsonl",
    }  # fmt: skip
    out = ["--out", tmp_path / "out"] if arguments[0] in ("distill", "evaluate") else []
    places["ROWS/"] = f"{rows}/"
    code, _, err = run(*[places.get(a, a) for a in arguments], *out)
    assert code == 2
    assert len(err) == 1 and err[0].startswith("mskd: ") and says in err[0], err
    assert not list(tmp_path.glob("out/**/*.safetensors"))


FLAGS = {
    "distill": ["--teacher", "--via", "--student", "--data", "--set", "--out"],
    "plan": ["--teacher", "--target", "--family", "--layers", "--remove", "--data", "--set", "--write", "--out"],
    "evaluate": ["--data", "--teacher", "--set", "--out"],
}
VALUES = [
    "", ".", "..", "/", "/dev/zero", "/dev/null", "~nosuchuser/x", "x" * 3000, "no/such/file.jsonl", "demo", "gpt2-xl",
    "smollm2-135m", "124M", "0", "-1", "1e400", "9" * 400, "9" * 5000, "nan", "{", "{}", "{layers = 3}",
    "{layers = true}", "{a = {b = 1}}", "[" * 3000, "\udcff", "é\n\x1b", "²", "--", "--x", "=", "seed=1", "seed=x",
    "name=..", "data.test=true", "phases=1", "phases=[]", "models.x.from=1", "chain.paths=all", "grid.x=[1]",
    "seeds=[1, 2]", "phases.kd.epochs=1e6", "phases.kd.steps=1e9", "phases.minillm.rollouts=1048576",
    "data.max_tokens=1048576", "models.student.layers=1e4",
]  # fmt: skip


@st.composite
def commands(draw):
    name = draw(st.sampled_from(list(FLAGS)))
    flags = st.lists(st.tuples(st.sampled_from(FLAGS[name]), st.sampled_from(VALUES) | st.text(max_size=5)), max_size=4)
    given = [draw(st.sampled_from(["demo", "paper-gpt2", *VALUES]))] if draw(st.booleans()) else []
    return [
        name,
        *(["--dry-run"] if name == "distill" else []),
        *given,
        *(word for pair in draw(flags) for word in pair),
    ]


@settings(
    max_examples=150, deadline=20_000, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(commands())
def test_any_arguments_are_done_or_one_line(run, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code in (0, 2) and len(err) == (1 if code else 0), (arguments, err)


def test_the_real_command_has_no_traceback_and_one_line(tiny_llama_folder, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(parse(tree(tiny_llama_folder, tmp_path / "gone.jsonl"))))
    result = mskd("distill", file, "--out", tmp_path / "out")
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and "gone.jsonl" in result.stderr
