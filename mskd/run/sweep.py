"""A sweep: one configuration with several seeds or a grid stands for many runs, its cells.

    for cell in cells(config):          # the first seed over the whole grid, then the next seed
        print(cell.seed, cell.grid, cell.config.chain.paths)
    check_size(config, yes=False)       # ConfigError where that is much to train

A cell's configuration is an ordinary one. Cells have the same test items: `seed` draws them, not the cell's seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mskd.config import Config, ConfigError

MAX_HOPS = 50  # to train without being asked


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its seed, its values of the grid's keys, and the configuration they make."""

    seed: int
    grid: dict[str, Any]
    config: Config

    @property
    def label(self) -> str:
        """The cell in words: "seed 1, phases.kd.lr = 0.001"."""
        return ", ".join([f"seed {self.seed}", *(f"{k} = {v}" for k, v in self.grid.items())])


def cells(config: Config) -> Iterator[Cell]:
    """The cells of a configuration in the order of work; the configuration itself where it is no sweep.

    Raises ConfigError where values of the grid do not go together.
    """
    if not is_sweep(config):
        yield Cell(config.seed, {}, config)
        return
    split = {} if config.data.seed is not None else {"data.seed": config.seed}
    for seed in config.seeds or (config.seed,):
        for values in itertools.product(*config.grid.values()):
            grid = dict(zip(config.grid, values, strict=True))
            yield Cell(seed, grid, config.with_values({"seed": seed, **split, **grid}))


def is_sweep(config: Config) -> bool:
    return bool(config.seeds or config.grid)


def num_cells(config: Config) -> int:
    """Cells of a configuration, counted without making them."""
    return len(config.seeds or (config.seed,)) * math.prod(len(values) for values in config.grid.values())


def num_hops(config: Config) -> int:
    """Hops of one cell; paths share those that they begin with."""
    return len({path[:n] for path in config.chain.paths for n in range(2, len(path) + 1)})


def check_size(config: Config, yes: bool) -> None:
    """Raises ConfigError for more than MAX_HOPS hops to train, unless `yes`."""
    runs, hops = num_cells(config), num_cells(config) * num_hops(config)
    if hops > MAX_HOPS and not yes:
        raise ConfigError(
            f"{config.name} is {runs} {'run' if runs == 1 else 'runs'} with {hops} hops to train in all (fewer where "
            f"runs share some), more than {MAX_HOPS}; go ahead with --yes, or give fewer paths, seeds or grid values"
        )
