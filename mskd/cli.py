"""The command line: parse, call, print.

    mskd distill demo --out demo-out
    mskd distill --teacher M --via '{layers = 22}' --student '{layers = 16}' --data FILE
    mskd distill RECIPE --dry-run          mskd plan --teacher M --target 124M --write run.toml
    mskd data FILE --model M               mskd evaluate MODEL --data FILE --tasks hellaswag
    mskd report RUN                        mskd doctor
    mskd --version                         mskd --install-completion          mskd COMMAND --help

Exit codes: 0 done, 1 the run failed, 2 bad input (one line on stderr), 130 and 143 stopped with the state saved.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mskd.config import Config, ConfigError, DataSettings, EvaluateConfig, load, parse, recipes, to_toml, toml_value
from mskd.config.problems import local_path, read_toml, shown
from mskd.config.versions import version_line

# The list of commands shows the first sentence of each docstring, and cuts it where it is over 64 characters.
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
# click's, which typer brings along under a name that depends on its version
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _path(given: str | Path) -> Path:
    if not str(given):
        raise typer.BadParameter("it is empty; give a path, '.' for this folder")
    return Path(given)


Recipe = Annotated[str | None, typer.Argument(help="A recipe's name or a TOML file.", autocompletion=lambda: recipes())]
Out = Annotated[
    Path, typer.Option("--out", parser=_path, metavar="FOLDER", help="Where models, evaluations and runs go.")
]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. phases.minillm.lr=1e-5.")
]


def _version(asked: bool) -> None:
    if asked:
        say(version_line())
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Compress a language model through a chain: teacher, assistants, student."""


@app.command()
def distill(
    recipe: Recipe = None,
    teacher: Annotated[str | None, typer.Option(help="Hub id, folder, GGUF file or known name.")] = None,
    via: Annotated[
        list[str] | None, typer.Option(help="An assistant; repeat for more. '{layers = 22}': cut from the teacher.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="The student, named like an assistant.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Instruction data: hub id, or .json .jsonl .csv .parquet file.")
    ] = None,
    set: Set = [],  # noqa: A002, B006
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Go ahead however many hops there are to train, and however few rows of the data are used."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List hops, cost and memory; fetch and train nothing.")
    ] = False,
    out: Out = Path("out"),
) -> None:
    """Distil through a chain. The same command again goes on where it was stopped."""
    config = (
        from_flags(teacher, via or [], student, data, set)
        if recipe is None
        else from_recipe(recipe, teacher, via, student, data, set)
    )
    if dry_run:
        from mskd.plan.estimate import budget_table

        say("\n".join(budget_table(config)))
        return
    from mskd.run.chain import distill as run

    result = run(config, out, yes=yes, echo=say)
    for path, folder in result.students.items():
        say(f"{path}: {folder}")
    if result.summary:
        say(json.dumps(result.summary))


@app.command()
def plan(
    recipe: Recipe = None,
    teacher: Annotated[
        str | None, typer.Option(help="A known hub id; with --layers or --remove also a folder.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The student's size: 124M, 1.5B or a known hub id.")] = None,
    family: Annotated[str | None, typer.Option(help="Where assistants come from; default: the teacher's.")] = None,
    layers: Annotated[int | None, typer.Option(help="Cut the student from the teacher: layers kept.")] = None,
    remove: Annotated[int | None, typer.Option(help="Cut the student from the teacher: layers removed.")] = None,
    data: Annotated[str | None, typer.Option(help="Instruction data of the runs planned; default: demo.")] = None,
    set: Set = [],  # noqa: A002, B006
    write: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE", help="Write the TOML that mskd distill takes to this new file."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Choose by short trial hops, kept under OUT/plan.")
    ] = False,
    out: Out = Path("out"),
) -> None:
    """Propose chains from teacher to student, with what each costs.

    Give a recipe or file whose models are to be arranged, or --teacher and one of --target, --layers and --remove.
    """
    from mskd.plan import proposals as planner
    from mskd.plan.estimate import proposals_table

    if write is not None:
        _write_new(write, "")
        write.unlink()  # it is written when all else has gone well; trials take hours
    if recipe is not None:
        for flag, value in (("target", target), ("family", family), ("layers", layers), ("remove", remove)):
            if value is not None:
                raise ConfigError(f"--{flag} goes with --teacher; {shown(recipe)} names its models itself")
        config = from_recipe(recipe, teacher, None, None, data, set)
        question = planner.from_config(config)
        proposals = question.proposals()
        chosen = planner.with_paths(config, [p.path for p in proposals])
    else:
        question = planner.from_flags(teacher, target, family, layers, remove)
        proposals = question.proposals()
        chosen = config = parse(question.tree("demo" if data is None else data), set, where="flags")
    say("\n".join(proposals_table(proposals, question.models, config)))
    if measure:
        from mskd.plan.trials import measure as run_trials
        from mskd.plan.trials import ranking_table

        found = run_trials(config, out, say)
        say("\n".join(ranking_table(found)))
        chosen = planner.with_paths(found.config, [t.path for t in found.ranking[:1]])
    if write is not None:
        _write_new(write, to_toml(chosen, "Proposed by mskd plan"))
        say(f"{write}: mskd distill {write}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file or known name.")],
    data: Annotated[
        list[str], typer.Option(help="Instruction data, repeat for more: all its rows, or set data.test for a split.")
    ] = [],  # noqa: B006
    tasks: Annotated[
        list[str], typer.Option(help="Zero-shot tasks through lm-eval: names or .yaml files; commas, or repeat.")
    ] = [],  # noqa: B006
    teacher: Annotated[str | None, typer.Option(help="Also agreement with, and reverse KL to, this model.")] = None,
    set: Set = [],  # noqa: A002, B006
    out: Out = Path("out"),
) -> None:
    """Measure a model: ROUGE-L and perplexity, accuracy on tasks. The last line is JSON.

    The first two on each data set, with their 95 % intervals. Without --data and --tasks: on the demo's data.
    """
    from mskd.evaluation.evaluate_model import evaluate_model

    given = {"data": {"source": data[0]}} if data else {}
    settings = parse(given, set, where="flags", kind=EvaluateConfig)
    figures = evaluate_model(model, settings, data=data, tasks=tasks, teacher=teacher, out=out, echo=say)
    say(json.dumps(figures))


@app.command()
def data(
    file: Annotated[str, typer.Argument(help="Instruction data: hub id, or .json .jsonl .csv .parquet file.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template: hub id, folder or known name.")],
    items: Annotated[int, typer.Option(min=0, help="Items shown.")] = 3,
    set: Set = [],  # noqa: A002, B006
) -> None:
    """See what of a data set is trained on. The last line is JSON.

    Shown are counts and the first items, as the model gets them.

    Set template, columns and the rest as for a run: --set data.template=chat --set data.turns=all.
    """
    from mskd import models
    from mskd.data.show import look

    settings = parse({"data": {"source": file}}, set, where="flags", kind=DataSettings)
    tokenizer = models.load_tokenizer(models.resolve_source(model))
    shown = look(settings.data, tokenizer, seed=settings.seed, items=items)
    shown.print()
    say(json.dumps(shown.document()))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(parser=_path, metavar="RUN", help="A run's folder: OUT/runs/NAME.")],
) -> None:
    """Write a run's report again from what is stored."""
    from mskd.report.report import write_report

    say(str(write_report(local_path(run, "the run"))))


@app.command()
def doctor(
    prove: Annotated[bool, typer.Option("--prove", help="Prove and time the losses' kernels on the GPU anew.")] = False,
) -> None:
    """What this machine will use, and why. On a GPU the losses' kernels are proven first, once."""
    import warnings

    import mskd_kernels

    from mskd.config.hardware import detect
    from mskd.config.versions import versions

    hardware = detect()
    say(f"{hardware.name}: {hardware.memory_bytes / 2**30:.1f} GiB")
    for choice, reason in hardware.reasons.items():
        say(f"{choice:>10}  {reason}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # why they stay off is said below
            if prove and hardware.device.type == "cuda":
                mskd_kernels.prove(hardware.device)
            backend, why = mskd_kernels.backend_for(hardware.device)
    except ValueError as e:  # of MSKD_KERNELS
        raise ConfigError(str(e)) from None
    say(f"{'losses':>10}  {backend}: {why}")
    for package, version in versions().items():
        say(f"{package:>14} {version}")


def say(line: str) -> None:
    """One line on stdout, at once."""
    print(line, flush=True)


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not be there. Raises ConfigError."""
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not written over; give --write a new file") from None
    except (OSError, ValueError) as e:
        if not os.path.isdir(path.parent):
            raise ConfigError(f"--write {shown(str(path))} is in no folder that exists; give another file") from None
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"--write {shown(str(path))} cannot be written: {why}; give another file") from None


# -- flags to a configuration ---------------------------------------------------------------------


def from_recipe(
    recipe: str, teacher: str | None, via: list[str] | None, student: str | None, data: str | None, overrides: list[str]
) -> Config:
    """A recipe names its models itself; only its data may be changed by flag."""
    for flag, value in (("--teacher", teacher), ("--via", via), ("--student", student)):
        if value not in (None, []):
            raise ConfigError(f"{flag} goes without a recipe; with {shown(recipe)} use --set models.{flag[2:]}=...")
    given = [] if data is None else [f"data.source={toml_value(data)}"]
    return load(recipe, [*given, *overrides])


def from_flags(
    teacher: str | None, via: list[str], student: str | None, data: str | None, overrides: list[str]
) -> Config:
    """What plain flags stand for: one path, a forward-KL warm-up where a model is cut, then minillm."""
    for flag, value in (("--teacher", teacher), ("--student", student), ("--data", data)):
        if value is None:
            raise ConfigError(
                f"without a recipe {flag} is needed; give a recipe's name, or --teacher, --student and --data"
            )
    assistants = ["ta"] if len(via) == 1 else [f"ta{i}" for i in range(1, len(via) + 1)]
    names = ["teacher", *assistants, "student"]
    tables = [
        model_table(m, flag)
        for m, flag in zip([teacher, *via, student], ["--teacher", *["--via"] * len(via), "--student"], strict=True)
    ]
    phases: list[dict[str, Any]] = [{"objective": "minillm"}]
    if any("layers" in t for t in tables):
        phases.insert(0, {"objective": "kd", "epochs": 3, "lr": 3e-4, "warmup_steps": 10, "schedule": "cosine"})
    tree = {
        "name": "run",
        "models": dict(zip(names, tables, strict=True)),
        "chain": {"paths": [names]},
        "data": {"source": data},
        "phases": phases,
    }
    return parse(tree, overrides, where="flags")


def model_table(given: str | None, flag: str) -> dict[str, Any]:
    """A model flag's value: a source, or an inline table; a table without an origin is cut from the teacher."""
    assert given is not None
    if not given.lstrip().startswith("{"):
        return {"source": given}
    try:
        tree = read_toml(f"m = {given}", "the table")
    except ConfigError as e:
        raise ConfigError(f"{flag} {shown(given)} is no inline table like '{{layers = 16}}': {e}") from None
    table = tree.pop("m")
    if tree:
        raise ConfigError(f"{flag} {shown(given)} goes on after its inline table; give one table, in one line")
    return table if "source" in table or "from" in table or flag == "--teacher" else {"from": "teacher", **table}


# -- errors ---------------------------------------------------------------------------------------


def main() -> None:
    """Entry point: runs the app; what a user can mend becomes one line on stderr and exit code 2."""
    # Before torch is imported: threads that spin long at barriers make a shared CPU five times slower (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
    sys.exit(_run())


def _run() -> int:
    try:
        return app(prog_name="mskd", standalone_mode=False) or 0
    except ConfigError as e:
        return _fail(str(e))
    except UsageError as e:
        return _fail(e.format_message() + "; mskd --help lists what there is")
    except OSError as e:
        return _fail(_disk(e))
    except FloatingPointError as e:
        return _fail(str(e), 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except Exception as e:
        from mskd.sampling.rollout import Interrupted

        if isinstance(e, Interrupted):
            return _fail(
                "stopped, the state is saved; the same command goes on from here", 143 if e.args == (15,) else 130
            )
        raise


def _disk(error: OSError) -> str:
    """What the system refused, in words, and what to do."""
    where = error.filename2 or error.filename
    what = f"{error.strerror or error}{f' ({where})' if where else ''}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{what}; what was saved is kept: make room or choose another --out, go on"
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
        return f"{what}: something else is in the place of a file or folder; delete that and run the same command"
    return f"{what}; mend that and run the same command"


def _fail(message: str, code: int = 2) -> int:
    print(f"mskd: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
