"""What runs leave on disk as records that are checked: index.json, done.json, evaluations, metrics, responses.

    index = read_record(Index, path)                # Damaged: which file, line and field
    lines, digest = read_lines(Line, path)

Fields that are not named here are left out, so that files of other versions can be read. Numbers are finite and have
bounds far outside of what a run can give: what lies beyond them was damaged.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from mskd.config.problems import WIDTH, shown
from mskd.store.hashes import digest
from mskd.store.reading import Damaged, parsed, read_json, read_text, unsealed, unsealed_lines


def _inside(path: str) -> str:
    if not path or "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("it must be a path below the output folder")
    return path


def _figure(value: Any) -> Any:
    if isinstance(value, bool) or not (value is None or isinstance(value, str | int | float)):
        raise ValueError("it must be a number, a string or null")
    if isinstance(value, int | float) and not -1e50 <= value <= 1e50:
        raise ValueError("it must be a finite number")
    return value


def _of_items(figures: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(figures.get("items"), int):
        raise ValueError("its number of items is missing")
    return figures


def _of_a_model(figures: dict[str, Any]) -> dict[str, Any]:
    if figures.get("model") is None:
        raise ValueError("the model's own are missing")
    return figures


Count = Annotated[int, Field(ge=0, le=10**15)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Number = Annotated[float, Field(ge=-1e50, le=1e50)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Inside = Annotated[str, AfterValidator(_inside)]
Words = Annotated[str, Field(pattern=r"\S")]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Figures = dict[str, Annotated[Any, AfterValidator(_figure)]]


class Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


# -- a run's index --------------------------------------------------------------------------------


class Protocol(Record):
    """The evaluation's settings, as the report says them."""

    protocol: str | None = None
    quick: bool | None = None
    seeds: list[Whole] | None = None
    max_new_tokens: Count | None = None
    sample: bool | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    no_repeat_ngram_size: Count | None = None
    batch_size: Count | None = None
    limit: Count | None = None
    data: list[str] | None = None


class FullProtocol(Protocol):
    protocol: str
    max_new_tokens: Count
    sample: bool
    temperature: Number
    top_p: Number


class Entry(Record):
    """A finished node, as the index has it."""

    kind: Literal["model", "hop"]
    name: str
    dir: Inside
    hash: str | None = None
    parameters: Count | None = None
    seconds: Seconds | None = None
    tokens: Count | None = None
    phases: list[Words] = []
    teacher: str | None = None
    student: str | None = None


class Evaluated(Record):
    """An evaluation of a node. digest: of the file's lines, where the index vouches for them."""

    node: str
    stage: str
    file: Inside
    label: str | None = None
    data: str | None = None
    digest: Hex | None = None


class Set(Record):
    source: str | None = None
    train: Count | None = None
    test: Count | None = None


class Results(Record):
    """What one cell has come to."""

    nodes: dict[str, Entry]
    evals: list[Evaluated] = []
    data: Set | None = None
    protocol: Protocol | None = None


class Cell(Results):
    seed: Whole
    grid: dict[str, JsonValue] = {}
    label: str | None = None


class Index(Results):
    """index.json of a run: of the first cell, and of all of them where it is a sweep."""

    name: Words
    paths: list[Annotated[list[Annotated[str, Field(pattern="^[^>]+$")]], Field(min_length=2, max_length=100)]] = Field(
        min_length=1
    )
    cells: list[Cell] | None = None
    hardware: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    date: str | None = None


# -- nodes, evaluations, metrics ------------------------------------------------------------------


class Done(Record):
    """done.json of a finished node. files: the digests of what lies in its folder, by path."""

    weights: Hex | None = None
    parameters: Count = 0
    source: str = ""
    key: str = ""
    hash: str = ""
    versions: dict[str, str] = {}
    hardware: str = ""
    device: str = ""
    processes: Annotated[int, Field(ge=1, le=10**6)] = 1
    steps: Count = 0
    tokens: Count = 0
    seconds: Seconds = 0.0
    phase_seconds: list[Seconds] = []
    skipped_steps: Count = 0
    files: dict[Inside, Hex] = {}


class Cut(Record):
    """layers.json of a model that was cut: which layers of the one above it, and the digests of the model's files."""

    kept: list[Count]
    files: dict[Inside, Hex] = {}


class Finished(Done):
    """What a run needs to know of a finished node."""

    weights: Hex | None
    parameters: Count
    versions: dict[str, str]
    hardware: str


class FinishedTraining(Finished):
    """What it needs to know of one that was trained."""

    steps: Count
    tokens: Count
    seconds: Seconds


class Line(Record):
    """A line of an evaluation: one item and seed (evaluate.evaluate)."""

    item: Count
    seed: Whole
    prompt: str | None = None
    references: list[str] | None = None
    answer: str
    rouge_l: Number | None
    nll: Number | None
    tokens: Count
    answer_tokens: Count
    reverse_kl: dict[str, Number]
    agreement: dict[str, Number | None]

    @model_validator(mode="after")
    def _scored(self) -> Line:
        if not self.tokens and any(score is not None for score in (self.nll, *self.agreement.values())):
            raise ValueError("a reference of 0 tokens has no nll and no agreement")
        return self


class Interval(Record):
    """A figure with its interval; of a model that has diverged a perplexity may be infinite."""

    mean: Annotated[float, Field(allow_inf_nan=True)]
    low: Annotated[float, Field(allow_inf_nan=True)]
    high: Annotated[float, Field(allow_inf_nan=True)]
    items: Count


class Summary(Record):
    """The figures of one evaluation (statistics.summarize)."""

    items: Count
    seeds: Count
    rouge_l: Interval | None
    perplexity: Interval | None
    answer_tokens: Interval | None
    reverse_kl: dict[str, Interval | None]
    agreement: dict[str, Interval | None]


class CardFigures(Record):
    """What a model's card says of one evaluation (card_figures.record)."""

    data: str
    hub: str | None
    held_out: bool
    trained_on: Count
    protocol: FullProtocol
    top: str
    precision: str
    figures: Annotated[dict[str, Summary | None], AfterValidator(_of_a_model)]


class Card(Record):
    """evaluations.json of a node, by evaluation file."""

    evaluations: dict[str, CardFigures]


class Asked(Record):
    """A file of figures of zero-shot tasks (zero_shot.run_tasks)."""

    lm_eval: str
    num_fewshot: Count
    limit: Count | None
    tasks: dict[str, Annotated[Figures, AfterValidator(_of_items)]]
    lines: dict[str, list[dict[str, Any]]]


class Response(Record):
    """A line of the teacher's responses (teacher_responses.answered)."""

    example: Count
    by: Literal["data", "teacher"]
    response: str
    ids: list[Count]


class Step(Record):
    """A line of metrics.jsonl: an optimizer step, its figures under their names."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_figure)]] = Field(init=False)

    step: Count
    phase_step: Count | None = None
    objective: str | None = None


# -- reading --------------------------------------------------------------------------------------


def read_record(kind: type[Record], path: Path) -> dict[str, Any]:
    """A record that is a file of its own. Raises FileNotFoundError, Damaged."""
    tree = read_json(path)
    record = checked(kind, tree, path)
    unsealed(path, tree)
    return record


def read_lines(kind: type[Record], path: Path) -> tuple[list[dict[str, Any]], str]:
    """Records that are the lines of a file, and the digest of them all. Raises FileNotFoundError, Damaged."""
    texts = read_text(path).removesuffix("\n").split("\n")
    trees = [parsed(text, path, number) for number, text in enumerate(texts, 1)]
    records = [checked(kind, tree, path, number) for number, tree in enumerate(trees, 1)]
    try:
        return records, digest(unsealed_lines(path, trees))
    except RecursionError:  # in a field that no version of ours has
        raise Damaged(path, "it is nested too deep") from None


def checked(kind: type[Record], tree: Any, path: Path, line: int | None = None) -> dict[str, Any]:
    """The plain values of a record that was read from a file, or a line of it. Raises Damaged.

    Only what is there and known: a field that is absent has no default put in.
    """
    try:
        return kind.model_validate(tree).model_dump(exclude_unset=True)
    except ValidationError as e:
        raise Damaged(path, f"{'' if line is None else f'line {line}, '}{_first(e)}") from None


def _first(error: ValidationError) -> str:
    """The first problem of a pydantic error in words."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(map(str, problem["loc"]))
    field = field if len(field) <= WIDTH else f"{field[:WIDTH]}..."
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "missing":
        return f"field {field} is missing"
    return f"{f'field {field}' if field else 'it'} is {shown(problem['input'])}: {message}"
