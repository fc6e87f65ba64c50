"""Tile shapes of the Hopper FP8 products; `launch/tune.py` measures others beside them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.scaled_matmul import Tile

SMALLER_TILE_COST = 1.05  # of a multiply-add in a tile of 128 x 128, beside one of 192 x 128; measured on an H200


@dataclasses.dataclass(frozen=True)
class FewRowsTile:
    """The work of one thread block of a product with few rows: all rows of some columns."""

    columns: int  # divides the 128 that share a scale of the weights
    warpgroups: int = 2  # each takes every so many-th step of the contraction
    stages: int = 8  # 128-deep steps in shared memory at one time, a multiple of the warpgroups
    fence: bool = False  # a proxy fence before a stage is given back


def fp8_matmul(num_rows: int, num_columns: int, out_dtype: Any) -> Tile:
    """Returns the tile for a dense product of [num_rows, num_columns] of this type.

    Of two, that with which the last multiprocessor is ready first.
    """
    larger = Tile(cluster=2, early_addresses=True)
    if jnp.dtype(out_dtype).itemsize == 4:
        larger = dataclasses.replace(larger, store_columns=32, store_slots=2)
    smaller = dataclasses.replace(larger, warpgroups=2, in_flight=2, stages=5, cluster=1)

    def duration(tile):
        work = pl.cdiv(num_rows, tile.rows) * pl.cdiv(num_columns, tile.cluster_columns)
        cost = SMALLER_TILE_COST if tile is smaller else 1.0
        return pl.cdiv(work, NUM_SMS // tile.cluster) * tile.rows * cost

    return min(larger, smaller, key=duration)


def few_rows(columns: int, contraction: int) -> FewRowsTile:
    """Returns the tile for at most 128 rows times the transpose of [columns, contraction] weights.

    Narrow where wider tiles would leave multiprocessors without one and the contraction is long enough to share.
    """
    narrow = columns < 64 * NUM_SMS and contraction >= 4096
    if narrow:
        return FewRowsTile(columns=32 if columns >= 4096 else 16, warpgroups=4, stages=8)
    return FewRowsTile(columns=64, warpgroups=2, stages=4)
