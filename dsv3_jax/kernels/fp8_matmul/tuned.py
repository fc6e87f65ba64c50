"""Tile shapes of the Hopper FP8 products; `launch/tune.py` measures others beside them."""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl

from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.scaled_matmul import Tile, large_tile, small_tile

SMALL_TILE_COST = 1.05  # of a multiply-add in a tile of 128 x 128, beside one of 192 x 128; measured on an H200


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
    costs = {large_tile(out_dtype): 1.0, dataclasses.replace(small_tile(out_dtype), cluster=1): SMALL_TILE_COST}

    def duration(tile):
        work = pl.cdiv(num_rows, tile.rows) * pl.cdiv(num_columns, tile.cluster_columns)
        return pl.cdiv(work, NUM_SMS // tile.cluster) * tile.rows * costs[tile]

    return min(costs, key=duration)


def few_rows(columns: int, contraction: int) -> FewRowsTile:
    """Returns the tile for at most 128 rows times the transpose of [columns, contraction] weights.

    Narrow where wider tiles would leave multiprocessors without one and the contraction is long enough to share.
    """
    narrow = columns < 64 * NUM_SMS and contraction >= 4096
    if narrow:
        return FewRowsTile(columns=32 if columns >= 4096 else 16, warpgroups=4, stages=8)
    return FewRowsTile(columns=64, warpgroups=2, stages=4)
