"""Who may import whom, and what the packages may pull in: the rules of the house, read from the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)

# The rooms of mskd from the ground up, with the third-party packages of each. A file imports from its own room and from
# those before it; the files beside the rooms (cli, __init__) from all.
ROOMS = {
    "config": {"pydantic", "pydantic_core", "torch", "mskd_kernels"},
    "store": {"pydantic", "torch", "safetensors", "rich"},
    "models": {"torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "gguf", "huggingface_hub"},
    "data": {"torch", "numpy", "transformers", "datasets", "rich"},
    "sampling": {"torch", "transformers"},
    "training": {"torch", "accelerate", "mskd_kernels"},
    "evaluation": {"torch", "transformers", "numpy", "scipy", "rouge_score", "lm_eval", "mskd_kernels"},
    "report": {"matplotlib", "jinja2", "markdown_it", "markupsafe"},
    "run": {"torch", "accelerate", "huggingface_hub"},
    "plan": set(),
}
BESIDE = {"typer", "mskd_kernels"}
MOST_FILES = 12  # of one folder: a room that grows past it holds two nouns


def module_files(package: str, folder: Path) -> dict[str, Path]:
    """The files of a package by dotted name."""
    names = {p: ".".join([package, *p.relative_to(folder).with_suffix("").parts]) for p in folder.glob("**/*.py")}
    return {name.removesuffix(".__init__"): p for p, name in names.items()}


MSKD = module_files("mskd", ROOT / "mskd")
KERNELS = module_files("mskd_kernels", ROOT / "kernels" / "mskd_kernels")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from mskd.run import chain` counts as mskd.run.chain."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            own = {f"{node.module}.{alias.name}" for alias in node.names} & (MSKD.keys() | KERNELS.keys())
            found |= own or {node.module}
    return found


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_a_file_imports_its_own_room_and_lower_ones_only():
    floors = list(ROOMS)
    assert {room(m) for m, p in MSKD.items() if p.parent != ROOT / "mskd"} == set(floors)
    for module, path in MSKD.items():
        here = room(module)
        if here not in ROOMS:
            continue
        for name in imports(path) & MSKD.keys():
            there = room(name)
            assert there in floors[: floors.index(here) + 1], f"{module} must not import {name}, which is above it"
            assert name != f"mskd.{here}" or path.name == "__init__.py", f"{module}: import the file, not its own room"


def test_a_room_uses_its_own_packages_only():
    for module, path in MSKD.items():
        packages = {name.partition(".")[0] for name in imports(path)} - STDLIB - {"mskd"}
        assert packages <= ROOMS.get(room(module), BESIDE), module


def test_no_file_imports_itself_by_way_of_others():
    for files in (MSKD, KERNELS):
        TopologicalSorter({m: imports(p) & files.keys() - {m} for m, p in files.items()}).prepare()  # or CycleError


def test_no_room_grows_past_a_dozen_files():
    for folder in {p.parent for p in MSKD.values()}:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} has {len(files)} files"


def test_every_file_says_first_what_it_is():
    for path in [*MSKD.values(), *KERNELS.values()]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


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
    for path in ROOT.glob("kernels/mskd_kernels/**/*.py"):
        tops = {n.partition(".")[0] for n in imports(path)}
        assert tops <= STDLIB | {"torch", "triton", "mskd_kernels"}, path


def test_the_folder_kernels_is_no_package():
    # Hugging Face's package has this name; with an __init__.py here transformers would import ours.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_mskd_is_light():
    code = "import sys, mskd; print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"
