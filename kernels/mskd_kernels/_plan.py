"""Which row kernels run, and in which shape: a pure function of the sizes and of the GPU, so that any machine can ask.

    plan(4096, 50257, 2, Chip((9, 0), 132, 50 * 2**20))

The shapes aim at loads of 128 bits and no register spills; `python -m bench.architectures` compiles and counts.
No row of the table has been timed: nothing here ran on a GPU. What a user's GPU measures decides only whether the
fused kernel runs (`proof.timings`).
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """What a plan needs to know of a GPU."""

    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    l2_bytes: int


class Shape(NamedTuple):
    """Columns of a tile, and the warps that work on it."""

    block: int
    warps: int


class Plan(NamedTuple):
    """`parts`: programs that share a row. `fused`: its shape or None; its `programs` have one row each at a time."""

    statistics: Shape
    parts: int
    gradient: Shape
    fused: Shape | None
    programs: int


MOST_PARTS = 64
# A thread, at most: 16 warps fill a multiprocessor, 8 with float64 sums. Left alone, ptxas wants more, and spills.
REGISTERS, REGISTERS_FLOAT64 = 128, 255
_TILES_A_PART = 4  # at least: a part also reads the row's first columns and writes its sums
_FILL = 4  # programs a multiprocessor that hide each other's waiting
_L2_SHARE = 0.6  # of L2, for the rows that are being worked on; the rest is for what is written, and for luck


class _Shapes(NamedTuple):
    statistics: Shape
    gradient: Shape
    fused: Shape


_LIGHT = _Shapes(Shape(2048, 8), Shape(2048, 8), Shape(4096, 16))
_HEAVY = _Shapes(Shape(1024, 4), Shape(1024, 4), Shape(2048, 8))  # soft-caps, float64, kinds of two passes; 16 bits
# From this compute capability on: 16 or 32 bits without soft-cap, and the rest.
_TABLE: tuple[tuple[tuple[int, int], _Shapes, _Shapes], ...] = (
    ((0, 0), _LIGHT, _HEAVY),  # sm_70, sm_75
    ((8, 0), _LIGHT, _HEAVY),  # sm_80, sm_86, sm_89
    ((9, 0), _LIGHT, _HEAVY),
    ((10, 0), _LIGHT, _HEAVY),  # sm_100, sm_120
)


def plan(
    tokens: int, vocabulary: int, itemsize: int, chip: Chip, heavy: bool = False, fuse: bool | None = None
) -> Plan:
    """What runs for `tokens` rows of `vocabulary` logits of `itemsize` bytes, the wider of student and teacher.

    `fuse` None: the fused kernel runs where two rows a program fit in L2 and there are rows for every multiprocessor.
    `heavy`: soft-caps, float64 sums and kinds of two passes take more registers, thus smaller tiles.
    """
    _, light, dense = next(row for row in reversed(_TABLE) if chip.capability >= row[0])
    shapes = dense if heavy else light
    narrower = itemsize // 2 if heavy and itemsize > 2 else 1  # 16 bytes a thread and side, or registers spill
    statistics, gradient, fused = (_fitted(Shape(b // narrower, warps), vocabulary) for b, warps in shapes)
    a_program = 2 * vocabulary * itemsize
    residents = min(_FILL, int(_L2_SHARE * chip.l2_bytes // (chip.processors * a_program)))
    worthwhile = residents > 0 and tokens >= chip.processors
    return Plan(
        statistics=statistics,
        parts=_parts(tokens, -(-vocabulary // statistics.block), chip.processors),
        gradient=gradient,
        fused=fused if (worthwhile if fuse is None else fuse) else None,
        programs=min(tokens, chip.processors * max(residents, 1)),
    )


def _parts(tokens: int, tiles: int, processors: int) -> int:
    """Programs a row, so that few rows fill the GPU too."""
    wanted = -(-_FILL * processors // max(tokens, 1))
    return max(1, min(wanted, tiles // _TILES_A_PART, MOST_PARTS))


def _fitted(shape: Shape, vocabulary: int) -> Shape:
    """A small vocabulary gets a small tile and few warps."""
    block = min(shape.block, max(128, 1 << (vocabulary - 1).bit_length()))
    return Shape(block, max(1, shape.warps * block // shape.block))
