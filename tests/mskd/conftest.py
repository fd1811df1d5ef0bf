"""Fixtures for tests of mskd: the tiny tokenizer and the tiny Llama of tiny.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import build_llama, build_tokenizer
from transformers import PreTrainedTokenizerFast

from mskd.cli import main


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
