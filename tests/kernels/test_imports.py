"""The files of mskd_kernels lie on floors: no circle of imports, those within functions and for types included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mskd_kernels
import pytest

FOLDER = Path(mskd_kernels.__file__).parent


def imported(source: str, files: set[str]) -> set[str]:
    """The files of the package that a source imports, wherever in it.

    `from mskd_kernels import x` is the file x where there is one, else the package's own list.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in files:
                name = name.rpartition(".")[0]
            found |= {name} - {""}
    return found


def floors(sources: dict[str, str]) -> list[str]:
    """The files from the ground up. CycleError names a circle."""
    graph = {name: imported(text, set(sources)) for name, text in sources.items()}
    return list(TopologicalSorter(graph).static_order())


def test_no_circle():
    sources = {}
    for path in FOLDER.rglob("*.py"):
        name = ".".join([FOLDER.name, *path.relative_to(FOLDER).with_suffix("").parts])
        sources[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    order = floors(sources)
    places = [
        order.index(f"mskd_kernels.{name}")
        for name in ("_row_op", "_triton_kernels", "proof.first_use", "_rows", "divergence", "proof.trial")
    ]
    assert places == sorted(places) and "mskd_kernels" in order


@pytest.mark.parametrize(
    "back",
    [
        "from mskd_kernels._b import thing",
        "import mskd_kernels._b",
        "def late():\n    from mskd_kernels import _b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mskd_kernels._b import Thing",
    ],
)
def test_a_circle_is_seen(back):
    with pytest.raises(CycleError):
        floors({"mskd_kernels._a": back, "mskd_kernels._b": "from mskd_kernels._a import x"})
