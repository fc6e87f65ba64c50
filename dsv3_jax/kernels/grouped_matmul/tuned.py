"""Tile shapes of the Hopper kernels, chosen by measurement on one H200 (`launch/tune.py` repeats it)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

ROW_ALIGNMENT = 128  # rows of an output tile
STEP = 64  # contraction per pipeline stage: one 128-byte swizzle row of a 16-bit type


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one thread block: a rows x columns tile of the output, 64 rows per multiplying warpgroup."""

    warpgroups: int = 2
    columns: int = 256
    stages: int = 4  # 64-deep steps in shared memory at one time
    store_columns: int = 128  # columns per store to device memory
    store_slots: int = 1  # stores in flight per warpgroup
    raster_rows: int = 8  # row tiles swept together, so that their rows and weights meet in L2

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


def rows_times_weights(columns: int) -> Tile:
    """Returns the tile for rows times [contraction, columns]: the best or within 2% of it at every width measured."""
    return _fit(Tile(), columns)


def weight_gradient(width: int, columns: int, out_dtype: Any) -> Tile:
    """Returns the tile for a [width, columns] gradient per group."""
    store_columns = 64 if jnp.dtype(out_dtype).itemsize == 4 else 128
    tile = _fit(Tile(store_columns=store_columns), columns)
    return dataclasses.replace(tile, warpgroups=1) if width < 128 else tile


def _fit(tile: Tile, columns: int) -> Tile:
    """Narrows a tile to a result of few columns."""
    widest = next(width for width in (64, 128, 256) if width >= min(columns, 256))
    return dataclasses.replace(tile, columns=widest, store_columns=min(tile.store_columns, widest))
