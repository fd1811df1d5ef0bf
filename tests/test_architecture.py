"""Who may import whom, and what the packages may pull in: the rules of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)

LEAVES = {"config", "phases", "hardware", "checkpoint"}  # what every module below the loop may use
# module -> (mskd modules it may import, third-party packages)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": ({"config", "chain"}, set()),
    "__main__": ({"cli"}, set()),
    "phases": (set(), {"pydantic"}),
    "config": ({"phases"}, {"pydantic"}),
    "sweep": ({"config"}, set()),
    "hardware": ({"config"}, {"torch", "mskd_kernels"}),
    "checkpoint": ({"config"}, {"torch", "safetensors"}),
    "optim": ({"config", "phases", "quantize"}, {"torch"}),
    "draw": (set(), {"torch"}),
    "statistics": ({"config"}, {"numpy", "scipy"}),
    "quantize": ({"config"}, {"torch", "transformers", "bitsandbytes"}),
    "sources": (
        {"config", "checkpoint"},
        {"torch", "transformers", "tokenizers", "huggingface_hub", "gguf", "safetensors"},
    ),
    "rows": ({"config"}, {"datasets"}),
    "data": (LEAVES | {"rows"}, {"torch", "transformers"}),
    "packing": ({"config"}, {"numpy"}),
    "offload": (set(), {"torch"}),
    "models": (LEAVES | {"data", "offload", "quantize", "sources"}, {"torch", "transformers", "safetensors"}),
    "prune": (LEAVES | {"data", "models"}, {"torch", "transformers"}),
    "decode": ({"models"}, {"torch", "transformers"}),
    "slots": ({"decode", "draw"}, {"torch"}),
    "rollout": (LEAVES | {"data", "models", "draw", "decode", "slots"}, {"torch", "transformers"}),
    "objective": (LEAVES | {"data", "models", "rollout"}, {"torch", "mskd_kernels"}),
    "evaluate": (
        LEAVES | {"data", "models", "draw", "packing", "statistics"},
        {"torch", "transformers", "rouge_score", "mskd_kernels"},
    ),
    "tracking": (LEAVES, {"accelerate", "rich"}),
    "results": (LEAVES | {"statistics"}, set()),
    "summary": ({"results"}, set()),
    "document": (set(), set()),
    "page": ({"document"}, set()),
    "tables": ({"document", "results"}, set()),
    "cost": ({"document", "results", "tables"}, set()),
    "graph": ({"results", "tables"}, set()),
    "figures": ({"cost", "document", "graph", "results", "tables"}, {"matplotlib"}),
    "trends": ({"document", "results", "statistics", "tables"}, set()),
    "verdict": ({"cost", "document", "results", "statistics", "tables"}, set()),
    "record": ({"document", "results"}, set()),
    "report": (
        LEAVES
        | {"cost", "document", "figures", "page", "record", "results", "statistics", "summary", "tables", "trends"}
        | {"verdict"},
        set(),
    ),
    "responses": (LEAVES | {"data", "draw", "rollout", "tracking", "hop"}, {"torch"}),
    "shares": (LEAVES | {"data", "hop"}, {"torch", "accelerate"}),
    "forwards": (LEAVES | {"data", "objective", "packing", "shares", "hop"}, set()),
    "hidden": (set(), {"torch"}),
    "adaptive": ({"phases"}, {"torch"}),
    "replay": ({"phases", "checkpoint", "data"}, {"torch"}),
    "batches": (
        LEAVES
        | {"data", "draw", "models", "rollout", "objective", "responses", "shares", "forwards", "hidden", "hop"}
        | {"adaptive", "replay", "tracking"},
        {"torch"},
    ),
    "hop": (
        LEAVES | {"data", "models", "rollout", "objective", "batches", "forwards", "optim", "tracking"},
        {"torch", "accelerate"},
    ),
    "nodes": (LEAVES | {"data", "models", "optim"}, set()),
    "licence": ({"sources"}, {"huggingface_hub"}),
    "scores": (LEAVES | {"document", "nodes", "results", "statistics", "tables"}, {"huggingface_hub"}),
    "card": (
        LEAVES | {"data", "document", "licence", "nodes", "scores", "sources", "tables"},
        {"huggingface_hub"},
    ),
    "stop": ({"rollout"}, set()),
    "chain": (
        LEAVES
        | {"stop", "sweep", "nodes", "hop", "shares", "data", "models", "prune", "evaluate", "rollout", "tracking"}
        | {"card", "report", "scores"},
        {"torch", "accelerate"},
    ),
    "reasoning": ({"config", "checkpoint"}, {"lm_eval", "numpy", "torch"}),
    "assess": (LEAVES | {"data", "models", "evaluate", "reasoning", "statistics", "tables", "tracking"}, set()),
    "sizes": ({"config"}, set()),
    "budget": ({"config", "phases", "sizes", "models"}, set()),
    "plan": ({"config", "sizes", "budget"}, set()),
    "estimate": ({"config", "sizes", "budget", "plan", "sweep"}, set()),
    "trials": (LEAVES | {"plan", "chain", "nodes", "models", "data", "evaluate"}, set()),
    "cli": (
        {"config", "chain", "assess", "plan", "estimate", "trials", "report", "hardware", "rollout"},
        {"typer", "mskd_kernels"},
    ),
}  # fmt: skip


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


def test_every_module_has_a_rule():
    assert {p.stem for p in (ROOT / "mskd").glob("*.py")} == set(RULES)


@pytest.mark.parametrize("module", RULES)
def test_imports_follow_the_rules(module):
    own, packages = RULES[module]
    for name in imports(ROOT / "mskd" / f"{module}.py"):
        top, _, rest = name.partition(".")
        if top == "mskd":
            target = rest.split(".")[0]
            is_module = (ROOT / "mskd" / f"{target}.py").exists()
            assert not is_module or target in own, f"mskd.{module} must not import mskd.{target}"
        else:
            assert top in STDLIB | packages, f"mskd.{module} must not import {top}"


def test_nothing_imports_cli_bench_or_the_folder_kernels():
    for path in [*ROOT.glob("mskd/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("tests/**/*.py")]:
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
