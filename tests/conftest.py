"""Fixtures of all tests; and before anything imports Triton: without a GPU its kernels are interpreted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import other_sums
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a function is decorated, not when it is called
if os.environ.get("OTHER_SUMS"):  # a variant of `make test-cpus`
    other_sums.install()

from tiny import build_llama, build_tokenizer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from mskd.cli import main  # noqa: E402


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer for each test, which may change it."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder (config, safetensors, tokenizer with chat template). Shared: read it, never write to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = build_tokenizer()
    build_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: exit code, lines of stdout, lines of stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mskd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        shown = capsys.readouterr()
        return exit_.value.code, shown.out.splitlines(), shown.err.splitlines()

    return call
