"""The planner: sizes against transformers, chains and costs by hand, the TOML it writes, one line for every mistake."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from chain_setup import config, write_rows

from mskd.config import load, parse, recipes
from mskd.plan.budget import Budget, Work, forward, head, hours, measured, num_rows, num_steps, shapes_of, source_shape
from mskd.plan.proposals import GAP, from_config, from_flags, from_layers, from_sizes, law, midpoint
from mskd.plan.sizes import FAMILIES, GPUS, Shape, shape_of

TINY = Shape("tiny", 2, 4, 10, 2, 4, 100, 50)  # layers, hidden, vocabulary, KV width, attention width, parameters


def published(shape, layers):
    """The configuration of a model of the table, as its makers publish it but for the number of layers."""
    hub, h, L, V = shape.hub, shape.hidden, layers, shape.vocabulary
    if "gpt2" in hub:
        return transformers.GPT2Config(n_layer=L, n_embd=h, n_head=h // 64)
    if "opt" in hub:
        own = {"word_embed_proj_dim": 512, "do_layer_norm_before": False} if "350m" in hub else {}
        own["word_embed_proj_dim"] = own.get("word_embed_proj_dim", h)
        return transformers.OPTConfig(num_hidden_layers=L, hidden_size=h, ffn_dim=4 * h, num_attention_heads=8, **own)
    if "pythia" in hub:
        return transformers.GPTNeoXConfig(
            num_hidden_layers=L, hidden_size=h, intermediate_size=4 * h, num_attention_heads=8, vocab_size=V
        )
    # inner width, size of an attention head, tied
    inner, size, tied = {
        "Qwen2.5-0.5B": (4864, 64, True), "Qwen2.5-1.5B": (8960, 128, True), "Qwen2.5-3B": (11008, 128, True),
        "Qwen2.5-7B": (18944, 128, False), "Qwen2.5-14B": (13824, 128, False), "Qwen2.5-32B": (27648, 128, False),
        "Qwen2.5-72B": (29568, 128, False), "Llama-3.2-1B": (8192, 64, True), "Llama-3.2-3B": (8192, 128, True),
        "Llama-3.1-8B": (14336, 128, False), "Llama-3.1-70B": (28672, 128, False),
        "Llama-3.1-405B": (53248, 128, False), "SmolLM2-135M": (1536, 64, True), "SmolLM2-360M": (2560, 64, True),
        "SmolLM2-1.7B": (8192, 64, True),
    }[hub.split("/")[1]]  # fmt: skip
    kind = transformers.Qwen2Config if "Qwen" in hub else transformers.LlamaConfig
    return kind(
        num_hidden_layers=L, hidden_size=h, intermediate_size=inner, num_attention_heads=shape.attention_width // size,
        num_key_value_heads=shape.kv_width // size, vocab_size=V, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [s for sizes in FAMILIES.values() for s in sizes], ids=lambda s: s.hub)
def test_sizes_are_those_of_the_models_on_the_meta_device(shape):
    """One layer and two of them: what a layer has, and what all but the layers have, without building 126 layers."""
    counts = []
    for layers in (1, 2):
        settings = published(shape, layers)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
        counts.append(sum(p.numel() for p in model.parameters()))
    per_layer = counts[1] - counts[0]
    assert (per_layer, counts[0] - per_layer) == (shape.per_layer, shape.outside)


def test_sizes_as_published():
    sizes = {"openai-community/gpt2-xl": 1557611200, "EleutherAI/pythia-12b": 11846072320,
             "meta-llama/Llama-3.1-8B": 8030261248, "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1711376384,
             "smollm2-135m": 134515008, "MiniLLM/SFT-gpt2-760M": 774030080}  # fmt: skip
    assert {name: shape_of(name).parameters for name in sizes} == sizes
    assert shape_of("nobody/knows-this") is None and shape_of("2") is None


def test_sizes_of_the_rules_by_hand():
    assert midpoint(1558, 124) == pytest.approx(439.5, abs=0.1)  # sqrt(1558 x 124)
    assert law(1558, 124) == pytest.approx([623.2, 249.28])  # 1558 / 2.5 / 2.5; another hop would be under 124
    assert law(250, 100) == [] and GAP == 2.5


def test_chains_of_gpt2():
    question = from_sizes("openai-community/gpt2-xl", "124M")
    chains = {p.rules: p.path for p in question.proposals()}
    assert chains == {
        ("midpoint",): ("teacher", "gpt2-medium", "student"),  # 355M is nearer to 440M by ratio than 774M
        ("law",): ("teacher", "gpt2-large", "gpt2-medium", "student"),
        ("direct",): ("teacher", "student"),
    }


def test_chains_of_a_cut_teacher():
    question = from_layers("smollm2-135m", 16)
    chains = {p.rules: p.path for p in question.proposals()}
    # sqrt(134.5M x 84.96M) = 106.9M; 22 layers are 106.2M. The gap is under 2.5, so the law proposes the direct hop.
    assert chains == {("midpoint",): ("teacher", "ta22", "student"), ("law", "direct"): ("teacher", "student")}
    assert from_flags("smollm2-135m", None, None, None, 14) == question
    tree = question.tree("demo")
    assert tree["models"]["ta22"] == {"from": "teacher", "layers": 22}
    assert tree["models"]["teacher"] == {"source": "smollm2-135m"}


def test_chains_of_a_configuration():
    question = from_config(load("demo"))
    assert list(question.models) == ["teacher", "ta", "student"]
    assert [p.path for p in question.proposals()] == [("teacher", "ta", "student"), ("teacher", "student")]


def test_models_of_the_students_size_are_no_assistants():
    question = from_config(load("paper-gpt2"))  # whose first path ends at an assistant
    assert list(question.models) == ["gpt2-1.5B", "gpt2-760M", "gpt2-340M", "gpt2-120M"]
    question = from_config(load("dolly-smollm2"))
    assert [s.layers for s in question.models.values()] == [30, 24, 22, 20, 16]


def test_flops_of_a_forward_by_hand():
    # 2 x 200 weights x 5 tokens; attention 2 x 2 layers x 4 wide x 5 x 6; logits of 2 tokens 2 x 10 x 4 x 2
    assert forward(TINY, 3, 2) == 2000 + 480 + 160
    assert head(TINY, 2) == 160


def tiny_budget(phase, rows=None, **changes):
    data = {"max_prompt_tokens": 3, "max_tokens": 5, "validation": 1}
    tree = {"models": {"t": {"source": "t"}, "s": {"source": "s"}}, "chain": {"paths": [["t", "s"]]},
            "data": data, "phases": [phase], **changes}  # fmt: skip
    return Budget(parse(tree), {"t": replace(TINY, layers=4), "s": TINY}, rows)


TEACHER = 2 * 400 * 5 + 2 * 4 * 4 * 30 + 160  # one forward of 3 + 2 tokens: 4,000 + 960 + 160
STUDENT = 2640


@pytest.mark.parametrize(
    ("phase", "training", "decoding"),
    [
        ({"objective": "sft"}, 3 * STUDENT * 40, 0),
        ({"objective": "kd"}, (3 * STUDENT + TEACHER) * 40, 0),
        ({"objective": "seqkd", "teacher_responses": {"max_new_tokens": 2}}, 3 * STUDENT * 40, TEACHER * 40),
        ({"objective": "gkd", "max_new_tokens": 2}, (3 * STUDENT + TEACHER) * 40, STUDENT * 20),
        ({"objective": "gkd", "max_new_tokens": 2, "replay": {}}, (3 * STUDENT + TEACHER) * 40, STUDENT * 20),
        # a share that may rise counts as 1 for what the student answers, as its start for what the teacher does
        ({"objective": "distillm", "max_new_tokens": 2, "student_share": 0.25, "adaptive_share": {}, "eval_every": 5,
          "teacher_responses": {"max_new_tokens": 2}}, (3 * STUDENT + TEACHER) * 40, STUDENT * 40 + TEACHER * 30),
        # 40 sequences trained on are 20 samples, 2 epochs each: the second epoch of the teacher is its head alone
        ({"objective": "minillm", "rollouts": 4, "ppo_epochs": 2, "max_new_tokens": 2},
         3 * STUDENT * 40 + TEACHER * 20 + 160 * 20, (STUDENT + TEACHER) * 20),
    ],
)  # fmt: skip
def test_work_of_every_objective_by_hand(phase, training, decoding):
    """10 steps of 4 sequences, prompts of 3 tokens and responses of 2."""
    budget = tiny_budget({"steps": 10, "batch_size": 4, **phase})
    (hop,) = budget.hops
    assert (hop.work.training, hop.work.decoding) == (training, decoding)
    assert hop.steps == 10 and hop.work.flops == training + decoding


def test_checkpointing_is_a_forward_more():
    plain, again = (
        tiny_budget({"objective": "sft", "steps": 1, "batch_size": 1}, train={"gradient_checkpointing": on}).work.flops
        for on in (False, True)
    )
    assert (plain, again) == (3 * STUDENT, 4 * STUDENT)


def test_steps_by_epochs_need_the_number_of_rows():
    phase = {"objective": "minillm", "steps": None, "epochs": 2, "batch_size": 4, "rollouts": 4, "ppo_epochs": 2}
    assert tiny_budget(phase).work is None and tiny_budget(phase).hops[0].steps is None
    assert num_steps(tiny_budget(phase).config.phases[0], 10) == 10  # 2 epochs x 10 rows x 2 passes / 4
    assert tiny_budget(phase, rows=10).hops[0].steps == 10


def test_memory_and_disk_by_hand():
    budget = tiny_budget({"objective": "sft", "steps": 1, "micro_batch_size": 2}, train={"loss_chunk_mb": 1})
    # student 250 x 16; int8 teacher 4 x 100 + 50 x 2; activations 34 x 10 tokens x 4 wide x 2 layers; the loss's MiB
    assert budget.hops[0].memory == 4000 + 500 + 34 * 10 * 4 * 2 + 2**20
    assert budget.disk == 4 * 250 + 12 * 250
    sampling = {"objective": "minillm", "steps": 1, "rollouts": 4, "batch_size": 4, "micro_batch_size": 1,
                "rollout_batch_size": 10**7, "max_new_tokens": 2}  # fmt: skip
    # in sampling: the 16-bit copy, and keys and values of 5 tokens, 2 wide, 2 + 4 layers, 2 bytes, ten million times
    assert tiny_budget(sampling).hops[0].memory == 4000 + 500 + 500 + 2 * 5 * 2 * 6 * 2 * 10**7


def test_hours_by_hand():
    a100 = next(g for g in GPUS if g.name == "A100")
    assert hours(Work(training=312e12 * 0.35 * 3600), a100) == pytest.approx(1)
    # decoding is bound by bytes where those take longer than its FLOPs
    assert hours(Work(decoding=1e9, decoded_bytes=2.039e12 * 0.5 * 7200), a100) == pytest.approx(2)


def test_measured_speed_comes_from_rows_of_bench_train_step(tmp_path):
    row = {"benchmark": "train_step", "provider": "mskd", "answer_tokens": 16, "prompt_tokens_from_to": [2, 4],
           "shape": "SmolLM2 30 > 22 > 16 layers, hop 2, phase: 8 rollouts, batch 8, 4 epochs", "ms_p50": 500.0,
           "run": "r"}  # fmt: skip
    stored = {"runs": {"r": {"name": "NVIDIA A100-SXM4-80GB", "device": "cuda"}},
              "rows": [row, {**row, "provider": "trl", "ms_p50": 1.0}, {**row, "shape": "another"}]}  # fmt: skip
    (tmp_path / "a100.json").write_text(json.dumps(stored))
    shape = shape_of("smollm2-135m")
    student, teacher = (forward(shape.cut_to(n), 3, 2) for n in (16, 22))
    flops = 8 * (13 * student + 2 * teacher + 3 * head(shape, 2))
    assert measured(tmp_path) == {"NVIDIA A100-SXM4-80GB": pytest.approx(flops / 0.5)}
    assert measured(tmp_path / "none") == {}


def test_a_folder_says_its_own_size(tiny_llama_folder, tmp_path):
    shape = source_shape(str(tiny_llama_folder))
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.kv_width, shape.attention_width) == (4, 32, 320, 16, 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    settings = config(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl"))
    shapes = shapes_of(settings)
    assert shapes["ta"].parameters == shape.parameters - shape.per_layer
    assert num_rows(settings) == 24 - 4 - 3


# -- the command line -----------------------------------------------------------------------------


def test_what_plan_writes_is_what_distill_takes(run, tmp_path):
    file = tmp_path / "run.toml"
    data = ["--data", "databricks/databricks-dolly-15k"]
    flags = ["--teacher", "openai-community/gpt2-xl", "--target", "124M", *data, "--write", file]
    code, out, _ = run("plan", *flags)
    assert code == 0 and out[-1] == f"{file}: mskd distill {file}"
    question = from_sizes("openai-community/gpt2-xl", "124M")
    written = load(file)
    assert written == parse(question.tree("databricks/databricks-dolly-15k"))
    assert len(written.chain.paths) == 3
    code, out, _ = run("distill", file, "--dry-run")
    rows = [line for line in out if line.startswith("| teacher")]
    assert code == 0 and len(rows) == 6 and "| 5000 |" in rows[0] and "projected" in out[0]
    code, _, err = run("plan", *flags)
    assert code == 2 and "not written over" in err[0]


def test_dry_run_says_what_it_does_not_know(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = '{teacher = {source = "nobody/knows-this"}, student = {source = "openai-community/gpt2"}}'
    path = '[["teacher", "student"]]'
    text = f'models = {models}\nchain = {{paths = {path}}}\nphases = [{{objective = "kd", steps = 3}}]\n'
    (tmp_path / "run.toml").write_text(text)
    code, out, err = run("distill", tmp_path / "run.toml", "--dry-run")
    assert code == 0 and not err
    assert "size not known: teacher (nobody/knows-this)" in out
    assert any(line.startswith("| teacher > student | not known before it is fetched | ? |") for line in out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", recipes())
def test_dry_run_of_a_recipe(run, recipe):
    code, out, err = run("distill", recipe, "--dry-run")
    hops = {path[:n] for path in load(recipe).chain.paths for n in range(2, len(path) + 1)}
    shown = [line.split(" | ")[0].removeprefix("| ") for line in out if line.startswith("| ")]
    assert code == 0 and not err and {" > ".join(hop) for hop in hops} <= set(shown)
    assert not any("?" in line for line in out)  # all that a recipe needs is known without a download


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--teacher and one of --target, --layers and --remove"),
        (["--teacher", "smollm2-135m", "--target", "1M", "--layers", "3"], "one of --target"),
        (["--teacher", "facebook/opt-13b", "--target", "1.3B", "--family", "optt"], "did you mean 'opt'?; known: gpt2"),
        (["--teacher", "facebook/opt-13b", "--target", "1.3B", "--family", "gpt2"], "not of family 'gpt2'"),
        (["--teacher", "facebook/opt-1.3b", "--target", "13B"], "not smaller than the teacher, 1316M; allowed: 125M"),
        (["--teacher", "facebook/opt-13b", "--target", "small"], "give a number like 124M or 1.5B"),
        (["--teacher", "openai-community/gpt2-medium", "--target", "124M"], "there is no size between"),
        (["--teacher", "nobody/knows-this", "--layers", "3"], "is not known; give a model folder or one of"),
        (["--teacher", "smollm2-135m", "--layers", "30"], "allowed: 1 to 29"),
        (["--teacher", "smollm2-135m", "--layers", "29"], "no room for an assistant between 30 and 29"),
        (["--teacher", "smollm2-135m", "--remove", "30"], "allowed: 1 to 29"),
        (["--teacher", "smollm2-135m", "--layers", "16", "--family", "opt"], "--family goes with --target"),
        (["demo", "--measure"], "set data.validation"),
        (["demo", "--layers", "3"], "--layers goes with --teacher"),
        (["demo", "--teacher", "x"], "--teacher goes without a recipe"),
        (["demo", "--write", "/no/such/folder/run.toml"], "is in no folder that exists"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line(run, flags, says):
    code, _, err = run("plan", *flags)
    assert code == 2 and len(err) == 1 and says in err[0]
