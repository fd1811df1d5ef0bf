"""Cards of finished models: what they say, parsed; where the licence comes from; what writing one leaves alone."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from chain_setup import tree, write_rows
from huggingface_hub import ModelCard
from tiny import build_llama, build_tokenizer

from mskd.config import DataConfig, parse
from mskd.config.hardware import detect
from mskd.config.phases import OBJECTIVES
from mskd.data.instructions import load_items
from mskd.evaluation.columns import FORM, figure
from mskd.evaluation.statistics import read_lines, summarize
from mskd.models import content_hash
from mskd.run import card, licence
from mskd.run import card_figures as scores
from mskd.run.chain import distill
from mskd.run.nodes import Graph
from mskd.store.done import read_done
from mskd.store.hashes import weights_digest

STUDENT = "teacher>ta>student"
APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
CARD = "---\nlicense: Apache-2.0\nlanguage: [en, no]\n---\n# big\n"
FIELDS = ("perplexity", "rouge_l", "agreement", "reverse_kl")


def values(model, data, **changes):
    base = tree(model, data, chain={"paths": [["teacher", "ta", "student"]]}, **changes)
    base["data"]["template"] = "chat"
    return base


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run whose names are awkward: its configuration, its OUT, the graph, done.json of every node."""
    root = tmp_path_factory.mktemp("card")
    model, tokenizer = root / 'big: "model" #1 | `x`', build_tokenizer()
    build_llama(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (model / "README.md").write_text(CARD)
    data = write_rows(root / "- rows: [1] | *2*.jsonl")
    given = values(model, data)
    run = distill(parse(given), root / "out", echo=lambda line: None)
    return given, root / "out", *read(given, root / "out"), run


def read(given, out):
    graph = Graph(parse(given), out, detect("cpu"), lambda line: None)
    return graph, {key: read_done(node.directory) for key, node in graph.nodes.items()}


def facts_of(graph, done, key=STUDENT):
    return card.Facts(graph.nodes[key], graph, done, scores.recorded(graph.nodes[key]))


def index(run):
    return json.loads((run.directory / "index.json").read_text())


def cells(text, title):
    """The cells of the table's row that begins with the title."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {title}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_the_front_matter_is_what_the_hub_expects(world):
    _, _, graph, _, run = world
    data = ModelCard.load(run.students["teacher > ta > student"] / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["mskd", "distillation", "knowledge-distillation"]
    assert (data.license, data.license_name, data.language) == ("apache-2.0", None, ["en"])  # YAML reads `no` as false
    assert data.base_model is None and data.datasets is None  # a folder and a file have no id on the hub
    assert ModelCard.load(graph.nodes["student"].folder / "README.md").data.tags == ["mskd"]


def test_the_figures_are_those_of_the_evaluation_files(world):
    _, out, graph, _, run = world
    files = {e["node"]: e["file"] for e in index(run)["evals"] if e["stage"] in ("initial", "final")}
    found = {key: summarize(read_lines(out / file)) for key, file in files.items()}
    columns = {STUDENT: [STUDENT, "teacher", "student"], "student": ["student", "teacher"]}
    for key, models in columns.items():
        loaded = ModelCard.load(graph.nodes[key].folder / "README.md")
        results = {r.metric_type: r for r in loaded.data.eval_results}
        own = found[key]
        means = [own["perplexity"], own["rouge_l"], own["agreement"]["teacher"], own["reverse_kl"]["teacher"]]
        assert [results[m].metric_value for m in ("perplexity", "rouge", "agreement", "reverse_kl")] == [
            x["mean"] for x in means
        ]
        assert {(r.dataset_name, r.dataset_split) for r in results.values()} == {
            ("- rows: [1] | *2*.jsonl", "held-out")
        }
        for field, title in zip(FIELDS, ("Perplexity", "ROUGE-L", "Agreement with", "Reverse KL to"), strict=True):
            shown = [figure(found[m], field, "teacher", FORM[field]) for m in models]
            assert cells(loaded.text, title)[2:] == shown
        assert "4 items held out of the training data, the `quick` protocol: 1 seed" in loaded.text


def test_it_says_how_the_model_was_made(world):
    _, _, graph, done, run = world
    text = ModelCard.load(run.students["teacher > ta > student"] / "README.md").text
    for name in ("ta", "student"):
        kept = json.loads((graph.nodes[name].folder / "layers.json").read_text())["kept"]
        row = cells(text, f"`{name}`")
        assert row[1] == f"layers {', '.join(map(str, kept))} of `teacher`" and row[3] == str(len(kept))
    assert cells(text, "`teacher`")[1].replace("\\", "") == 'big: "model" #1 | `x`'
    for key, teacher in (("teacher>ta", "teacher"), (STUDENT, "ta")):
        start = text.index(f"### `{' > '.join(key.split('>'))}`, against `{teacher}` in int8")
        section = text[start : text.index("###", start + 3)]
        assert "- kd: `steps = 4`, `batch_size = 4`" in section and "`lr = 0.003`" in section
        assert "`kd_ratio = 1`" in section and "`mix_alpha = 0.2`" in section  # main values, though defaults
        assert "weight_decay" not in section  # a default
        assert f"11 steps on {done[key]['tokens']:,} tokens" in section
    tokens = done["teacher>ta"]["tokens"] + done[STUDENT]["tokens"]
    assert f"Together: {tokens:,} training tokens" in text and "17 for training, 3 for validation" in text
    assert graph.nodes[STUDENT].hash in text and f"torch {done[STUDENT]['versions']['torch']}" in text
    assert "Seed 3" in text
    assert "Seed" not in (graph.nodes["student"].folder / "README.md").read_text()  # a cut is every seed's
    assert str(graph.out.parent) not in text


def test_the_values_of_a_phase():
    phase = OBJECTIVES["seqkd"](steps=5, betas=(0.9, 0.99), teacher_responses={"top_k": 1})
    shown = card.settings(phase)
    assert shown["betas"] == [0.9, 0.99] and shown["teacher_responses.top_k"] == 1 and "eps" not in shown
    lmops = OBJECTIVES["lmops"]
    preset = card.settings(lmops(objective="lmops"))
    assert preset["kd_ratio"] == 0.5 and "gamma" not in preset
    assert card.settings(lmops(objective="lmops", gamma=1.0))["gamma"] == 1.0


@pytest.mark.parametrize(
    "own",
    [{"template": "chat"}, {"template": "alpaca"},
     {"template": "chat", "template_kwargs": {"enable_thinking": False}, "turns": "all"}],
)  # fmt: skip
def test_its_code_runs_on_the_folder_and_prompts_as_in_training(world, own, tmp_path, monkeypatch, capsys):
    given, _, graph, done, run = world
    folder = run.students["teacher > ta > student"]
    text = (folder / "README.md").read_text()
    if own != {"template": "chat"}:
        changed = copy.copy(graph)
        changed.config = parse({**given, "data": {**given["data"], **own}})
        text = card.card(facts_of(changed, done))
    assert ("tokenize=False, enable_thinking=False)" in text) == ("template_kwargs" in own)
    assert ("template `chat`, every assistant turn" in text) == ("turns" in own)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    space: dict = {}
    exec(code, space)
    assert space["answer"].shape[1] > space["ids"].shape[1] and capsys.readouterr().out.strip()
    (tmp_path / "one.jsonl").write_text(json.dumps({"instruction": card.QUESTION, "response": "x"}))
    config = DataConfig(source=str(tmp_path / "one.jsonl"), **own)
    (item,), _ = load_items(config, graph.tokenizer)
    assert space["ids"][0].tolist() == list(item.prompt_ids)


def test_an_end_that_the_folder_does_not_declare_is_given_to_generate(world):
    _, _, graph, done, _ = world
    assert "eos_token_id" not in card.card(facts_of(graph, done))
    changed = copy.copy(graph)
    changed.ends = (7, 2)  # the folder, of an older mskd, says 2 alone
    assert "max_new_tokens=64, eos_token_id=7)" in card.card(facts_of(changed, done))


def test_what_comes_from_the_hub_is_named_by_its_id(world):
    given, _, graph, done, _ = world
    changed = copy.copy(graph)
    models = {**given["models"], "teacher": {"source": "some-body/Some_Model", "revision": "v1"}}
    changed.config = parse({**given, "models": models, "data": {**given["data"], "source": "some-body/data:part"}})
    found = ModelCard(card.card(facts_of(changed, done)))
    assert (found.data.base_model, found.data["base_model_relation"]) == ("some-body/Some_Model", "finetune")
    assert found.data.datasets == ["some-body/data"]
    assert "[some-body/Some_Model](https://huggingface.co/some-body/Some_Model), revision v1" in found.text
    assert ModelCard(card.card(facts_of(changed, done, "student"))).data.datasets is None  # nothing was trained


def test_a_pipe_in_the_place_of_a_sources_card_says_no_licence(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert licence.front_matter(tmp_path) == {}


# -- what writing leaves alone ---------------------------------------------------------------------


def state(out):
    names = ("README.md", "done.json", "evaluations.json")
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for name in names for p in out.rglob(name)}


def test_the_same_run_again_changes_no_byte_and_another_protocol_adds_its_table(world):
    given, out, graph, done, run = world
    before = state(out)
    assert len([p for p in before if p.name == "README.md"]) == 4  # two cuts, two hops; none in the source's folder
    distill(parse(given), out, echo=lambda line: None)
    assert state(out) == before
    assert (Path(given["models"]["teacher"]["source"]) / "README.md").read_text() == CARD
    hashes = {node.folder: content_hash(node.folder) for node in graph.nodes.values()}
    other = {**given, "name": "other", "evaluation": {"protocol": "greedy", "max_new_tokens": 5, "batch_size": 4}}
    distill(parse(other), out, echo=lambda line: None)
    after = state(out)
    assert {p: v for p, v in after.items() if p.name == "done.json"} == {
        p: v for p, v in before.items() if p.name == "done.json"
    }
    text = (graph.nodes[STUDENT].folder / "README.md").read_text()
    assert "`quick` protocol: 1 seed, answers of at most 8 tokens sampled at temperature 1" in text
    assert "`greedy` protocol: 1 seed, answers of at most 5 tokens decoded greedily" in text
    assert len(ModelCard(text).data.eval_results) == 8
    distill(parse(given), out, echo=lambda line: None)
    assert state(out) == after  # the card is the node's, whichever run comes last
    for key, node in graph.nodes.items():
        assert content_hash(node.folder) == hashes[node.folder]  # so a run that takes it as a source has the same nodes
        assert done[key]["weights"] in (None, weights_digest(node.folder))


@pytest.fixture
def copied(world, tmp_path):
    """A copy of the run's OUT, to be changed."""
    given, out, *_ = world
    shutil.copytree(out, tmp_path / "out")
    graph, done = read(given, tmp_path / "out")
    return graph, done, graph.nodes[STUDENT]


def test_a_card_changed_by_hand_is_left_alone(copied):
    graph, done, node = copied
    path, lines = node.folder / "README.md", []
    path.write_text(path.read_text().replace("apache-2.0", "mit", 1))
    changed = path.read_bytes()
    card.write(node, graph, done, lines.append)
    assert path.read_bytes() == changed and "changed by hand" in lines[0] and len(lines) == 1
    path.write_bytes(b"\xff no text")
    card.write(node, graph, done, lines.append)
    assert path.read_bytes() == b"\xff no text"


def test_a_kill_while_it_is_written_leaves_the_old_one(copied, monkeypatch):
    graph, done, node = copied
    path = node.folder / "README.md"
    old = path.read_bytes()
    (node.directory / "evaluations.json").write_text('{"x.jsonl": {}}')  # no evaluation

    def killed(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("mskd.store.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            card.write(node, graph, done)
    assert path.read_bytes() == old
    card.write(node, graph, done)
    assert "It was not evaluated." in path.read_text() and ModelCard.load(path).data.eval_results is None


def test_a_run_stopped_while_it_evaluates_leaves_a_card(world, tmp_path, monkeypatch):
    given, *_ = world

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("mskd.run.chain.evaluate.evaluate", killed)
        changed = {**given, "models": {**given["models"], "teacher": {**given["models"]["teacher"], "layers": 3}}}
        with pytest.raises(KeyboardInterrupt):
            distill(parse(changed), tmp_path / "out", echo=lambda line: None)
    (path,) = (tmp_path / "out").glob("*/*/model/README.md")
    found = ModelCard.load(path)
    assert "It was not evaluated." in found.text and "## Evaluation" not in found.text
    source = Path(given["models"]["teacher"]["source"]).name
    assert re.search(r"layers \d, \d, \d of ", found.text) and source in found.text.replace("\\", "")


# -- licences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"README.md": "# no front matter"}, None),
        ({"README.md": "---\nlicense: [\n---\n"}, None),
        ({"README.md": "---\n- a list\n---\n"}, None),
        ({"README.md": "---\nlicense: unknown\n---\n"}, None),
        ({"README.md": "---\nlicense: other\n---\n"}, None),
        ({"README.md": "---\nlicense: MIT\n---\n", "LICENSE": APACHE}, ("mit", None, None)),
        ({"README.md": "---\nlicense: [mit]\n---\n"}, ("mit", None, None)),
        ({"README.md": "---\ntags: x\nlicense: other\n---\n", "LICENSE": APACHE}, ("apache-2.0", None, None)),
        (
            {"README.md": "---\nlicense: other\nlicense_name: My (licence)\nlicense_link: https://x.org/l\n---\n"},
            ("other", "my-licence", "https://x.org/l"),
        ),
        ({"README.md": "---\nlicense: other\nlicense_name: a\nlicense_link: LICENSE\n---\n"}, ("other", "a", None)),
        ({"LICENSE.txt": APACHE}, ("apache-2.0", None, None)),
        ({"LICENCE": "# MIT License\n\nCopyright (c) 2024\n"}, ("mit", None, None)),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"}, ("llama3.1", None, None)),
        ({"LICENSE": "\nCopyright 2024 X\n\nX Research Licence 1.0\n"}, ("other", "x-research-licence-1.0", None)),
        ({"LICENSE": "This is not under the MIT License, " * 3}, ("other", "see-the-license-file", None)),
        ({"LICENSE": ""}, None),
    ],
)
def test_where_a_licence_is_found(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = licence.licence_of(str(tmp_path), tmp_path)
    assert (found and (found.id, found.name, found.link)) == expected


def test_the_licence_of_a_known_name_and_of_the_hub(tmp_path):
    assert licence.licence_of("smollm2-135m", tmp_path).id == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: a\nlicense_link: LICENSE\n---\n")
    assert licence.licence_of("a/b", tmp_path).link == "https://huggingface.co/a/b/blob/main/LICENSE"


def test_a_model_of_several_claims_a_licence_only_where_all_have_it():
    mit, apache = licence.Licence("mit", where="x"), licence.Licence("apache-2.0")
    assert licence.together([mit, licence.Licence("mit")]).id == "mit"
    several, unknown = licence.together([mit, apache]), licence.together([mit, None])
    assert (several.id, several.name) == ("other", "apache-2.0-and-mit")
    assert (unknown.id, unknown.name) == ("other", "see-the-teacher")
    assert licence.together([None]) == unknown
