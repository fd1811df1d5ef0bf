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
            top, *rest = name.split(".")
            if top == "mskd_kernels":
                found.add(rest[0] if rest and rest[0] in files else "__init__")
    return found


def floors(sources: dict[str, str]) -> list[str]:
    """The files from the ground up. CycleError names a circle."""
    return list(
        TopologicalSorter({name: imported(text, set(sources)) for name, text in sources.items()}).static_order()
    )


def test_no_circle():
    order = floors({path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")})
    assert order.index("_row_op") < order.index("_triton_kernels") < order.index("_rows") < order.index("__init__")


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
        floors({"_a": back, "_b": "from mskd_kernels._a import x"})
