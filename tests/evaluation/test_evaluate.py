"""evaluate: every figure against logits of single, unpadded sequences in float64; answers against an uncached loop."""

import copy
import json
import math

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tiny import build_llama, build_tokenizer

from mskd.config import ConfigError, EvalConfig
from mskd.data.instructions import Example
from mskd.evaluation.evaluate import evaluate, file_name, generate, rouge_l, summarize
from mskd.models import Teacher
from mskd.sampling.draw import uniforms
from mskd.store.hashes import stream_seed

# The models are fp64, but a Llama's norms and rotary embedding compute in fp32, where other batches may differ by 1e-7.
# A token too few, or the teacher's padding if it counted, is off by 8e-3 and more.
NEAR = 1e-5

TEXTS = [
    ("Write a task.", ["A task that completes the request."]),
    ("Below is an instruction that describes a task, paired with an input.", ["Write a response.", "An input."]),
    ("Hi", ["Hello there."]),
    ("Response:", ["further context"]),
    ("### Input:\n", ["provides"]),
]


def settings(**values) -> EvalConfig:
    return EvalConfig.model_validate({"protocol": "quick", "max_new_tokens": 12, "batch_size": 3, **values})


def example(tokenizer, prompt, references) -> Example:
    response = tokenizer(references[0])["input_ids"] + [tokenizer.eos_token_id] if references else []
    return Example(prompt, tuple(tokenizer(prompt)["input_ids"]), tuple(response), tuple(references))


@pytest.fixture(scope="module")
def examples():
    tokenizer = build_tokenizer()
    return [example(tokenizer, *text) for text in TEXTS]


@pytest.fixture(scope="module")
def model():
    """Its EOS is likely enough that some answers end by themselves."""
    tokenizer = build_tokenizer()
    model = build_llama(tokenizer, layers=2, seed=0).double()
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[tokenizer.eos_token_id] = 2 * rows[3]
    return model


@pytest.fixture(scope="module")
def teacher():
    """A teacher with 64 more rows in its vocabulary, padding that no comparison may see."""
    model = build_llama(build_tokenizer(), layers=3, seed=1).double()
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight[-64:], std=3.0)
    return Teacher(model.requires_grad_(False), "fp32")


def frozen(model) -> Teacher:
    return Teacher(copy.deepcopy(model).eval().requires_grad_(False), "fp32")


def answer(model, examples, config, seed):
    t = build_tokenizer()
    prompts = [e.prompt_ids for e in examples]
    return generate(model, prompts, config, seed, eos_id=t.eos_token_id, pad_id=t.pad_token_id)


def read(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def logits_of(model, prompt, response):
    """Logits [tokens of the response, V] from one forward of this one sequence."""
    return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]


def run(tmp_path, model, examples, config, **options):
    out = tmp_path / "evals" / "x" / "test-quick.jsonl"
    figures = evaluate(model, build_tokenizer(), examples, config, out=out, **options)
    return figures, read(out)


# -- figures --------------------------------------------------------------------------------------


def test_every_figure_agrees_with_logits_of_single_sequences(tmp_path, model, teacher, examples, tokenizer):
    config = settings(seeds=[10, 20], temperature=0.7)
    figures, lines = run(tmp_path, model, examples, config, teachers={"big": teacher})
    assert [(x["item"], x["seed"]) for x in lines] == [(i, s) for s in (10, 20) for i in range(5)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for line in lines:
        e = examples[line["item"]]
        logprobs = logits_of(model, e.prompt_ids, e.response_ids).log_softmax(-1)
        nll = -sum(logprobs[t, token] for t, token in enumerate(e.response_ids)).item()
        assert line["tokens"] == len(e.response_ids) and e.response_ids[-1] == tokenizer.eos_token_id
        assert line["nll"] == pytest.approx(nll, rel=NEAR)
        theirs = logits_of(teacher.model, e.prompt_ids, e.response_ids)[:, : logprobs.shape[1]]
        same = (logprobs.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        assert line["agreement"]["big"] == pytest.approx(same, abs=1e-12)

        own = answer(model, examples, config, line["seed"])[line["item"]]
        assert line["answer"] == tokenizer.decode(own, skip_special_tokens=True)
        assert line["answer_tokens"] == len(own)
        q = logits_of(model, e.prompt_ids, own).log_softmax(-1)
        p = logits_of(teacher.model, e.prompt_ids, own)[:, : q.shape[1]].log_softmax(-1)
        assert line["reverse_kl"]["big"] == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=NEAR)
        expected = max(scorer.score(r, line["answer"])["rougeL"].fmeasure for r in e.references)
        assert line["rouge_l"] == pytest.approx(100 * expected)
        assert ("prompt" in line) == (line["seed"] == 10)
    assert lines[1]["prompt"] == TEXTS[1][0] and lines[1]["references"] == TEXTS[1][1]
    total = sum(x["nll"] for x in lines) / sum(x["tokens"] for x in lines)
    assert figures["perplexity"]["mean"] == pytest.approx(math.exp(total))


def test_a_model_is_in_full_agreement_with_itself(tmp_path, model, examples):
    _, lines = run(tmp_path, model, examples, settings(), teachers={"self": frozen(model)})
    assert all(x["agreement"]["self"] == 1 and abs(x["reverse_kl"]["self"]) < 1e-9 for x in lines)


def test_a_teacher_reads_the_references_once_for_all_models(tmp_path, model, teacher, examples, monkeypatch):
    above, reads = frozen(teacher.model), []
    hidden = Teacher.hidden
    monkeypatch.setattr(Teacher, "hidden", lambda self, batch: reads.append(batch) or hidden(self, batch))
    first, _ = run(tmp_path, model, examples, settings(), teachers={"t": above})
    once = len(reads)
    again, _ = run(tmp_path, model, examples, settings(), teachers={"t": above})
    assert again == first and len(reads) - once == 2 < once  # the second time only the answers, in two batches
    other, _ = run(tmp_path, model, examples[1:], settings(), teachers={"t": above})
    fresh, _ = run(tmp_path, model, examples[1:], settings(), teachers={"t": frozen(teacher.model)})
    assert other == fresh


def test_it_tells_how_far_it_is(tmp_path, model, examples, tokenizer):
    told: list[tuple[int, int]] = []
    asked = [*examples, example(tokenizer, "No answer here.", [])]
    run(tmp_path, model, asked, settings(seeds=[10, 20]), tick=lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {5 + 2 * 6} and told[-1][0] == 17  # references, answers of two seeds
    assert [done for done, _ in told] == sorted({done for done, _ in told}) and len(told) > 4


def test_rouge_l_is_the_best_over_references():
    references = ["The cat sat on the mat.", "Dogs were running quickly"]
    direct = RougeScorer(["rougeL"], use_stemmer=True).score(references[1], "a dog runs")["rougeL"].fmeasure
    assert direct > 0  # the stemmer is on
    assert rouge_l("a dog runs", references) == pytest.approx(100 * direct)
    assert rouge_l("anything", []) is None


def test_items_without_a_reference_are_null_and_left_out(tmp_path, model, teacher, examples, tokenizer):
    mixed = [examples[0], example(tokenizer, "No answer here.", []), examples[2]]
    figures, lines = run(tmp_path, model, mixed, settings(), teachers={"t": teacher}, need_references=True)
    assert [lines[1][k] for k in ("rouge_l", "nll", "tokens", "agreement")] == [None, None, 0, {"t": None}]
    assert lines[1]["reverse_kl"]["t"] > 0
    assert figures["rouge_l"]["items"] == figures["perplexity"]["items"] == figures["agreement"]["t"]["items"] == 2
    assert figures["reverse_kl"]["t"]["items"] == figures["items"] == 3
    none = [mixed[1]]
    figures, _ = run(tmp_path, model, none, settings())
    assert figures["rouge_l"] is None and figures["perplexity"] is None and figures["answer_tokens"]["items"] == 1
    with pytest.raises(ConfigError, match="none of the 1 items has a reference"):
        run(tmp_path, model, none, settings(), need_references=True)
    with pytest.raises(ConfigError, match="no item to evaluate"):
        run(tmp_path, model, [], settings())


def test_limit_takes_the_first_items(tmp_path, model, examples):
    full, few = settings(), settings(limit=2)
    _, all_lines = run(tmp_path, model, examples, full)
    _, lines = run(tmp_path, model, examples, few)
    assert [x["answer"] for x in lines] == [x["answer"] for x in all_lines[:2]]


# -- answers --------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model, prompt, item, seed, config, eos):
    """The answer without cache, padding or batch, token by token from the definition of sampling."""
    numbers = uniforms(stream_seed(seed, "evaluate"), torch.tensor([item]), torch.arange(config.max_new_tokens))
    tokens: list[int] = []
    for u in numbers.tolist():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        if config.sample:
            p = (logits.float() / config.temperature).softmax(-1).double()
            ranked = p.sort(descending=True)
            keep = ranked.indices[ranked.values.cumsum(0) - ranked.values < config.top_p]
            kept = torch.zeros_like(p).index_put((keep,), p[keep])
            token = int((kept.cumsum(0) > u * kept.sum()).nonzero()[0])
        else:
            token = int(logits.argmax())
        tokens.append(token)
        if token == eos:
            break
    return tokens


@pytest.mark.parametrize("protocol", ["quick", "greedy"])
def test_any_of_several_end_tokens_ends_an_answer(tmp_path, model, examples, tokenizer, protocol):
    config = settings(protocol=protocol, max_new_tokens=25)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = [e.prompt_ids for e in examples * 2]
    endless = generate(model, prompts, config, 7, eos_id=-1, pad_id=pad)
    word = endless[0][3]  # an ordinary token of the vocabulary
    ends = (eos, word)
    expected = [a[: next((i for i, t in enumerate(a) if t in ends), 24) + 1] for a in endless]
    assert expected != [a[: a.index(eos) + 1] if eos in a else a for a in endless]
    assert generate(model, prompts, config, 7, eos_id=ends, pad_id=pad) == expected
    evaluate(model, tokenizer, examples * 2, config, out=tmp_path / "x.jsonl", eos_id=ends)
    for line, ids in zip(read(tmp_path / "x.jsonl"), expected if protocol == "greedy" else [], strict=False):
        said = ids[:-1] if ids[-1] in ends else ids  # what ends an answer is no part of its text
        assert line["answer"] == tokenizer.decode(said, skip_special_tokens=True)
        assert line["answer_tokens"] == len(ids)


@pytest.mark.parametrize("values", [{}, {"temperature": 0.6, "top_p": 0.8}, {"protocol": "greedy"}])
def test_answers_are_what_the_definition_gives(model, examples, tokenizer, values):
    config = settings(**{"max_new_tokens": 25, **values})
    prompts = examples * 2
    answers = answer(model, prompts, config, 7)
    eos = tokenizer.eos_token_id
    assert answers == [decode(model, e.prompt_ids, i, 7, config, eos) for i, e in enumerate(prompts)]
    if values == {}:
        assert {a[-1] == eos for a in answers} == {True, False}  # some end by themselves, some at the limit
    if config.sample:
        assert answer(model, prompts, config, 8) != answers


def test_answers_do_not_depend_on_the_batch_size(model, examples):
    answers = [answer(model, examples, settings(batch_size=b), 3) for b in (1, 2, 16)]
    assert answers[0] == answers[1] == answers[2]


def test_first_tokens_follow_the_distribution(model, examples):
    prompt = examples[0].prompt_ids
    n = 4000
    tokens = torch.tensor(answer(model, [examples[0]] * n, settings(max_new_tokens=1, batch_size=1000), 1))[:, 0]
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(tokens, minlength=len(p)) / n
    z = (frequency - p).abs() / (p * (1 - p) / n).sqrt()
    assert z[p > 0.002].max() < 4.5
    assert (p > 0.002).sum() > 20


def test_no_ngram_comes_twice(model, examples):
    config = settings(max_new_tokens=60, no_repeat_ngram_size=2)
    answers = answer(model, examples, config, 5)
    free = answer(model, examples, settings(max_new_tokens=60), 5)
    for e, own in zip(examples, answers, strict=True):
        pairs = list(zip([*e.prompt_ids, *own], [*e.prompt_ids, *own][1:], strict=False))
        before = len(e.prompt_ids) - 1
        assert len(set(pairs[before:])) == len(pairs[before:]) and not set(pairs[before:]) & set(pairs[:before])
    assert answers != free


def test_the_models_own_generation_config_has_no_say(model, examples):
    from transformers import GenerationConfig

    plain = answer(model, examples, settings(), 3)
    own = model.generation_config
    mine = GenerationConfig(
        repetition_penalty=5.0, temperature=0.1, top_k=1, do_sample=True, eos_token_id=[5, 6, 7], min_new_tokens=3
    )
    model.generation_config = mine
    try:
        assert answer(model, examples, settings(), 3) == plain
        assert model.generation_config is mine
    finally:
        model.generation_config = own


# -- what is left behind --------------------------------------------------------------------------


def test_evaluation_leaves_random_state_mode_and_gradients_alone(tmp_path, examples):
    model = build_llama(build_tokenizer(), layers=1).train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    run(tmp_path, model, examples, settings(), teachers={"self": frozen(model)})
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training and torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_model_gives_the_same_bytes(tmp_path, model, teacher, examples):
    files = []
    for n in range(2):
        torch.manual_seed(n)
        run(tmp_path / str(n), model, examples, settings(seeds=[1, 2]), teachers={"t": teacher})
        files.append((tmp_path / str(n) / "evals/x/test-quick.jsonl").read_bytes())
    assert files[0] == files[1]


def test_a_model_that_diverged_is_an_error_and_writes_nothing(tmp_path, examples):
    model = build_llama(build_tokenizer(), layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        answer(model, examples, settings(), 1)
    out = tmp_path / "old.jsonl"
    out.write_text("old")
    with pytest.raises(FloatingPointError, match="diverged"):
        evaluate(model, build_tokenizer(), examples, settings(), out=out)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_an_unwritable_place_is_an_os_error(tmp_path, model, examples):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        evaluate(model, build_tokenizer(), examples, settings(limit=1), out=tmp_path / "file" / "x.jsonl")


def test_answers_of_any_characters_stay_one_line_each(tmp_path, model, examples):
    """The random model answers with arbitrary bytes; U+2028 and the like must not break a line in two."""
    figures, lines = run(tmp_path, model, examples * 8, settings(max_new_tokens=30, batch_size=40))
    assert len(lines) == 40 and figures == summarize(lines)
    assert figures == summarize(tmp_path / "evals/x/test-quick.jsonl")


def test_file_names_tell_evaluations_apart():
    name = file_name("dolly", "f", settings(), {"t": "1"})
    assert name.startswith("dolly-quick-") and name.endswith(".jsonl")
    assert file_name("dolly", "f", settings(batch_size=9), {"t": "1"}) == name
    assert file_name("dolly", "f", settings(), {"t": "1"}, [2]) == name
    others = [("g", settings(), {"t": "1"}), ("f", settings(top_p=0.5), {"t": "1"}), ("f", settings(), {"t": "2"})]
    others.append(("f", settings(), {"t": "1"}, [2, 7]))
    assert len({name, *(file_name("dolly", *other) for other in others)}) == 5
    assert name.startswith("dolly-quick-")
    for data in ("x" * 250, "é" * 120, "\udcff" * 250):  # as long as a file's name may be
        long = file_name(data, "f", settings(), {"t": "1"})
        assert len(long.encode()) in (239, 240) and long.endswith(name.removeprefix("dolly"))
