"""Tile shapes of the Hopper FP8 products, chosen by measurement on one H200 (`launch/tune.py` repeats it)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

NUM_SMS = 132  # H100 SXM and H200; one persistent thread block each


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one thread block: a rows x columns tile of the output, 64 rows per multiplying warpgroup."""

    warpgroups: int = 3
    columns: int = 128  # at most the 128 that share a scale of the weights
    stages: int = 4  # 128-deep steps in shared memory at one time
    store_columns: int = 128  # columns per store to device memory
    store_slots: int = 1  # stores in flight per warpgroup
    stores_directly: bool = False  # from registers to device memory, where whole tiles fit the output
    raster_rows: int = 8  # row tiles swept together, so that their rows and weights meet in L2
    fence: bool = False  # a proxy fence before a stage is given back

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


def fp8_matmul(out_dtype: Any) -> Tile:
    """Returns the tile for a dense product of this output type."""
    return Tile() if jnp.dtype(out_dtype).itemsize == 2 else Tile(store_columns=32, store_slots=2)


def grouped_fp8_matmul(out_dtype: Any) -> Tile:
    """Returns the tile for a grouped product of this output type."""
    return fp8_matmul(out_dtype)


def fp8_weight_gradient(out_dtype: Any) -> Tile:
    """Returns the tile for a grouped weight gradient of this type."""
    return fp8_matmul(out_dtype)
