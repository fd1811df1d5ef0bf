"""Who may import whom, and what the packages may pull in: the rules of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from mskd import x` counts as mskd.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "mskd" else str(node.module) for alias in node.names
            }
    return found


def test_nothing_imports_cli_bench_or_the_folder_kernels():
    for path in [*ROOT.glob("mskd/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        names = imports(path)
        assert not {n for n in names if n == "kernels" or n.startswith("kernels.")}, path
        if path.stem not in ("__main__",) and "tests" not in path.parts:
            assert not {n for n in names if n.startswith(("mskd.cli", "bench"))}, path


def test_bench_imports_the_library_and_its_peers_in_one_place():
    """The peers are an extra: where they are missing, everything else must still run."""
    allowed = {"torch", "triton", "numpy", "matplotlib", "transformers", "accelerate", "datasets", "tokenizers"}
    for path in ROOT.glob("bench/*.py"):
        tops = {n.partition(".")[0] for n in imports(path)}
        peers = {"trl", "liger_kernel"} if path.stem in ("kl_providers", "trl_step") else set()
        assert tops <= STDLIB | allowed | {"bench", "mskd", "mskd_kernels"} | peers, path
        assert "mskd.cli" not in imports(path), path


def test_kernels_import_only_torch_and_triton():
    for path in ROOT.glob("kernels/mskd_kernels/*.py"):
        tops = {n.partition(".")[0] for n in imports(path)}
        assert tops <= STDLIB | {"torch", "triton", "mskd_kernels"}, path


def test_the_folder_kernels_is_no_package():
    # Hugging Face's package has this name; with an __init__.py here transformers would import ours.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_mskd_is_light():
    code = "import sys, mskd; print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"
