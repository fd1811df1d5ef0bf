"""The HTML page: the same content as the Markdown, nothing from elsewhere; and as a browser shows it (slow)."""

import json
import re
from html.parser import HTMLParser

import pytest
from browser import Browser, chromium
from chain_setup import config, write_rows
from stored_run import ALL_PATHS, CHAIN, DIRECT, change_index, file_of, make_run, make_sweep, metrics

from mskd.cli import _run
from mskd.config import ConfigError
from mskd.report.document import Attachment, Code, Heading, Items, Table, Text, markdown
from mskd.report.page import inline, page
from mskd.report.report import write_report
from mskd.run.chain import distill

NASTY = "</pre><script src='http://example.org/x.js'></script> & <img src=//example.org/y.png>"


class Reader(HTMLParser):
    """What a page consists of: its tags with their attributes, the texts of its cells, whether the tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run with its report, for tests that only read."""
    return write_report(make_run(tmp_path_factory.mktemp("written"))).parent


@pytest.fixture
def html(written):
    return (written / "report.html").read_text(encoding="utf-8")


def test_the_page_has_the_cells_of_the_markdown(written, html):
    reader = Reader(html)
    assert reader.open == []
    lines = [line for line in (written / "report.md").read_text().splitlines() if line.startswith("|")]
    cells = [c.strip() for line in lines for c in re.split(r"(?<!\\)\|", line.strip("|")) if not c.startswith("---")]
    assert reader.cells == [re.sub(r"[`*]", "", c).replace("\\|", "|") for c in cells] and len(cells) > 100


def test_the_page_asks_for_nothing(html):
    tags = Reader(html).tags
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name, "#")
            assert value.startswith("data:image/png;base64,") or value.startswith("#"), (tag, name, value[:80])
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert sum(tag == "img" for tag, _ in tags) == 3 and sum(tag == "svg" for tag, _ in tags) == 1
    assert "url(" not in html and "@import" not in html


def test_the_configuration_is_in_the_page(html):
    assert "<summary>All settings: config.toml</summary>" in html and "include_current = false" in html


def test_texts_of_others_stay_texts(tmp_path):
    blocks = [Heading(1, "x"), Code(NASTY), Text(NASTY), Items([NASTY]), Table(["a", NASTY], [[NASTY, "b"]])]
    reader = Reader(page(NASTY, [*blocks, Attachment("config.toml", NASTY)], tmp_path))
    assert reader.open == [] and {t for t, _ in reader.tags} == {
        "html", "head", "meta", "title", "style", "body", "main", "nav", "h1", "pre", "p", "ul", "li", "div", "table",
        "thead", "tbody", "tr", "th", "td", "span", "details", "summary",
    }  # fmt: skip
    assert NASTY in reader.cells


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("`a > b` is **better**", "<code>a &gt; b</code> is <strong>better</strong>"),
        ("From *after kd* on", "From <em>after kd</em> on"),
        (r"a\_b \*c\* \<d\> \[e\] \`f\`", "a_b *c* &lt;d&gt; [e] `f`"),
        ("**`x`** < 2 * 3", "<strong><code>x</code></strong> &lt; 2 * 3"),
        (r"`a\b`", r"<code>a\b</code>"),
    ],
)
def test_inline_markdown_becomes_html(text, html):
    assert inline(text) == html


def test_intervals_stand_small_and_cells_know_their_labels(tmp_path):
    html = page("x", [Heading(1, "x"), Table(["Path", "KL"], [["a", "**1.0** ▲ [0.5, 1.5]"]])], tmp_path)
    assert (
        '<td class="figure" data-label="KL"><span><strong>1.0</strong> ▲ <small>[0.5, 1.5]</small></span></td>' in html
    )


def test_markdown_of_every_block():
    blocks = [Heading(2, "H"), Text("t"), Items(["a", "b"]), Table(["n", "m", "v"], [["x", "y", "1"]], left=2)]
    expected = "## H\n\nt\n\n- a\n- b\n\n| n | m | v |\n|---|---|---:|\n| x | y | 1 |\n\n```text\nc\n```\n"
    assert markdown([*blocks, Code("c")]) == expected


# -- what can be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.md", "report.html", "loss.png", "graph.png"])
def test_a_report_that_cannot_be_written_is_one_clear_line(run, name, monkeypatch, capsys):
    (run / name).mkdir()
    with pytest.raises(ConfigError, match=f"cannot write the report to .*{name}: Is a directory; .* mskd report "):
        write_report(run)
    monkeypatch.setattr("sys.argv", ["mskd", "report", str(run)])
    assert _run() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mskd: cannot write the report") and not list(run.glob(".tmp*"))


def test_missing_references_are_named(run):
    for stage in ("after kd", "final"):
        for path in (CHAIN, DIRECT):
            file = file_of(run, path, stage)
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            bare = [x | {"rouge_l": None, "nll": None, "tokens": 0, "agreement": {"teacher": None}} for x in lines]
            file.write_text("".join(json.dumps(x) + "\n" for x in bare))
    report = write_report(run).read_text()
    assert "references of the test items, which ROUGE-L, perplexity and agreement need" in report.split("## Absent")[1]
    assert (
        "| Reverse KL | -0." in report and "| Perplexity |" not in report.split("## Paths compared")[1].split("##")[0]
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null\n3\n", '{"step": "x"}\n{"step": 1, "train/loss": "nan"}'])
def test_damaged_metrics_leave_the_rest_of_the_report(run, text):
    for folder in run.parent.parent.glob("hops/*"):
        (folder / "metrics.jsonl").write_text(text)
    assert "No metrics are stored." in write_report(run).read_text()


@pytest.mark.parametrize("change", [{"nodes": []}, {"nodes": {"teacher": None}}, {"evals": [1]}, {"paths": [[1]]}])
def test_a_damaged_index_is_one_clear_line(run, change):
    change_index(run, lambda index: index.update(change))
    with pytest.raises(ConfigError, match="damaged: .*index.json: field "):
        write_report(run)


# -- curves ---------------------------------------------------------------------------------------


def test_validation_curves_are_drawn_where_they_are_stored(run):
    assert "validation.png" not in write_report(run).read_text() and not (run / "validation.png").exists()
    folder = run.parent.parent / "hops" / "s-3"
    lines = ['{"step": 12, "phase_step": 12, "objective": "kd", "eval/loss": 1.5}', '{"step": 24, "eval/loss": 1.25}']
    whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]  # without the line that a kill tore
    (folder / "metrics.jsonl").write_text("\n".join([whole, *lines]) + "\n")
    assert "![Validation during the training](validation.png)" in write_report(run).read_text()
    assert (run / "validation.png").stat().st_size > 5000


def test_pictures_show_the_same_paths_as_the_table(tmp_path):
    import matplotlib.image

    run = make_sweep(tmp_path, seeds=(0,))
    for path in run.parent.parent.glob("hops/*"):
        (path / "done.json").rename(path.with_suffix(".json"))
        path.rmdir()
        metrics(path, 1.0)
        path.with_suffix(".json").rename(path / "done.json")
    write_report(run)
    for name, height in (("graph.png", 500), ("gain.png", 600), ("loss.png", 400)):
        picture = matplotlib.image.imread(run / name)
        assert picture.shape[0] > height and picture[..., :3].std() > 0.03, name


# -- in a browser ---------------------------------------------------------------------------------


SLOW = pytest.mark.slow
BROWSER = pytest.mark.skipif(
    chromium() is None, reason="no chromium or google-chrome is installed (apt install chromium)"
)
VISIBLE = "[...document.querySelectorAll('{0}')].every(e => {{ const r = e.getBoundingClientRect(); return !!({1}) }})"
LIGHTNESS = (
    "(c => c.match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0))(getComputedStyle(document.body).{0})"
)
CELLS = "[...document.querySelectorAll('table')[0].rows].map(r => [...r.cells].map(c => c.innerText))"


def check(browser, html, width, dark, nodes):
    """A report is whole, legible and quiet in a window of this width."""
    browser.open(html, width=width, dark=dark)
    assert browser.messages == [] and browser.requests[0] == html.as_uri()
    assert all(url.startswith("data:image/png;base64,") for url in browser.requests[1:])
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.querySelectorAll('table').length") == html.read_text().count("<table>") >= 6
    assert browser.ask(VISIBLE.format("td", "e.innerText.trim() && r.width > 4 && r.height > 8")) is True
    assert browser.ask(VISIBLE.format("svg g", "r.width >= 160 && r.height >= 80")) is True
    assert browser.ask("document.querySelectorAll('svg g').length") == nodes
    assert browser.ask(VISIBLE.format("img", "e.complete && e.naturalWidth > 300 && r.width > 200")) is True
    ink, paper = (browser.ask(LIGHTNESS.format(name)) for name in ("color", "backgroundColor"))
    assert (ink > 600 > 150 > paper) if dark else (paper > 600 > 150 > ink)


@SLOW
@BROWSER
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_a_browser_shows_the_report_and_asks_for_nothing_else(tmp_path, width, dark):
    html = write_report(make_sweep(tmp_path)).parent / "report.html"
    with Browser(chromium(), tmp_path / "profile") as browser:
        check(browser, html, width, dark, nodes=8)
        assert browser.ask("document.querySelector('svg g.student text.best').textContent")[0].isdigit()
        cells = browser.ask(CELLS)
    assert [row[1:3] for row in cells[1:]].count(["–", "student"]) == 1
    path = next(row for row in cells if row[1] == "big > small")
    assert "▲" in path[7] and len(cells) == 1 + len({tuple(p[:n]) for p in ALL_PATHS for n in range(1, len(p) + 1)})


@SLOW
@BROWSER
def test_a_sweep_that_was_really_trained_is_shown_in_a_browser(tiny_llama_folder, tmp_path):
    """All paths over two assistants, two seeds, on the tiny model: its report lacks nothing."""
    models = {"teacher": {"source": str(tiny_llama_folder)}}
    models |= {name: {"from": "teacher", "layers": n} for name, n in (("big", 3), ("small", 2), ("student", 1))}
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = config(tiny_llama_folder, rows, models=models, chain={"paths": "all"}, seeds=[1, 2])
    run = distill(settings, tmp_path / "out", echo=lambda line: None)
    done = [json.loads(p.read_text()) for p in (tmp_path / "out" / "hops").glob("*/done.json")]
    assert len(done) == 14 and {(d["device"], d["processes"]) for d in done} == {("cpu", 1)}
    html = run.directory / "report.html"
    with Browser(chromium(), tmp_path / "profile") as browser:
        check(browser, html, 1280, False, nodes=8)
        cells, sections = browser.ask(CELLS), browser.ask("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert len(cells) == 9 and not any("–" in row[4:9] for row in cells)
    assert "Over the students" in sections and "Absent" not in sections
    assert {p.name for p in run.directory.glob("*.png")} == {
        "loss.png", "reverse_kl.png", "validation.png", "graph.png", "gain.png",
    }  # fmt: skip


@SLOW
@BROWSER
def test_the_browser_does_see_requests_and_refusals(tmp_path):
    """The check above can fail: a page that asks for more is seen doing so, and under our policy it is refused."""
    html = tmp_path / "x.html"
    html.write_text("<img src='http://127.0.0.1:9/a.png'><p>text")
    with Browser(chromium(), tmp_path / "profile") as browser:
        browser.open(html)
        assert "http://127.0.0.1:9/a.png" in browser.requests
        policy = re.search(r"<meta http-equiv[^>]*>", page("x", [Heading(1, "x")], tmp_path))[0]
        html.write_text(policy + html.read_text())
        browser.open(html)
        assert any("Content Security Policy" in message for message in browser.messages)
