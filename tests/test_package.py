"""What is built and shipped: the wheel's and the sdist's contents, and life beside Hugging Face's package `kernels`."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built without isolation, so that nothing is downloaded."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "mskd"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_the_two_packages_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"mskd", "mskd_kernels"}
    assert "mskd/config/recipes/demo.toml" in names and "mskd/config/recipes/instructions.jsonl" in names
    shipped = {f"{p.relative_to(ROOT)}" for p in ROOT.glob("mskd/**/*.py")}
    shipped |= {f"{p.relative_to(ROOT / 'kernels')}" for p in ROOT.glob("kernels/mskd_kernels/**/*.py")}
    assert shipped == {n for n in names if n.endswith(".py")}


def test_sdist_has_no_importable_kernels_or_bench(built):
    names = {n.split("/", 1)[1] for n in tarfile.open(built[1]).getnames() if "/" in n}
    assert "kernels/__init__.py" not in names
    assert not {n for n in names if n.startswith("bench")}
    assert "kernels/mskd_kernels/__init__.py" in names  # without it no wheel could be built from the sdist


def test_transformers_imports_beside_another_package_named_kernels(tmp_path):
    """As on a machine with Hugging Face's `kernels` installed, with this repository's root first on the path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '99.0'\nclass Device: pass\nORIGIN = 'theirs'\n")
    code = (
        "import kernels, transformers, mskd_kernels; from transformers import AutoModelForCausalLM;"
        "assert kernels.ORIGIN == 'theirs', kernels"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


ZEN4 = """
import json, logging, sys

class AsOnZen4:  # where bitsandbytes asks `kernels` for a kernel at its import
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            sys.modules["bitsandbytes.functional"].has_avx512bf16 = lambda: True

logged, handle = [], logging.Logger.handle
logging.Logger.handle = lambda self, record: (logged.append(record.getMessage()), handle(self, record))
sys.meta_path.insert(0, AsOnZen4())
import mskd, bitsandbytes, kernels
from bitsandbytes.backends.cpu import ops
logging.getLogger(ops.__name__).warning("another warning")
print(json.dumps([logged, getattr(ops, "gemm_4bit_forward_kernel", "no CPU library"), str(kernels.__path__)]))
"""


@pytest.mark.parametrize("installed", [False, True])
def test_bitsandbytes_says_nothing_of_the_folder_kernels_and_finds_the_package(tmp_path, installed):
    """From the repository's root, without and with Hugging Face's package."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(
            "def get_kernel(name, version):\n    from types import SimpleNamespace\n"
            "    return SimpleNamespace(gemm_4bit_forward=f'{name} {version}')\n"
        )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])
    result = subprocess.run(
        [sys.executable, "-c", ZEN4], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    logged, kernel, found = json.loads(result.stdout.splitlines()[-1])
    if kernel == "no CPU library":
        pytest.skip("bitsandbytes has no library for this CPU")
    assert "gemm_4bit" not in result.stderr and "another warning" in result.stderr
    if installed:
        assert kernel == "kernels-community/quantization-bitsandbytes 1" and str(tmp_path) in found
        assert logged == ["another warning"]
    else:
        assert kernel is None and str(ROOT / "kernels") in found
        assert any("cannot import name 'get_kernel' from 'kernels'" in line for line in logged)
