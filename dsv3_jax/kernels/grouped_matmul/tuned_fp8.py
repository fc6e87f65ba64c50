"""Tile shapes of the grouped FP8 products; `launch/tune.py` measures others beside them."""

import dataclasses
from typing import Any

from dsv3_jax.kernels.scaled_matmul import Tile, large_tile, small_tile

SMALL_GROUP = 2048  # rows, less than which the rests that tiles of 192 rows leave cost more than small tiles do


def product(rows_of_group: float, out_dtype: Any) -> Tile:
    """Returns the tile for rows times the matrices of their groups, of so many rows on average."""
    tile = small_tile(out_dtype) if rows_of_group < SMALL_GROUP else large_tile(out_dtype)
    return dataclasses.replace(tile, raster_rows=12)


def weight_gradient(out_dtype: Any) -> Tile:
    """Returns the tile for the gradients of the matrices."""
    return large_tile(out_dtype)
