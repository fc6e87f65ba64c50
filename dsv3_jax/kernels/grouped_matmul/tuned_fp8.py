"""Tile shapes of the grouped FP8 products; `launch/tune.py` measures others beside them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dsv3_jax.kernels.scaled_matmul import Tile

SMALL_GROUP = 2048  # rows; tiles of 192 leave more of such groups idle than those of 128, which read more, cost


def product(rows_of_group: float, out_dtype: Any) -> Tile:
    """Returns the tile for rows times the matrices of their groups, of so many rows on average."""
    tile = Tile(raster_rows=12, cluster=2, early_addresses=True)
    if rows_of_group < SMALL_GROUP:
        tile = dataclasses.replace(tile, warpgroups=2, in_flight=2, stages=5)
    return tile if jnp.dtype(out_dtype).itemsize == 2 else dataclasses.replace(tile, store_columns=32, store_slots=2)


def weight_gradient(out_dtype: Any) -> Tile:
    """Returns the tile for the gradients of the matrices."""
    tile = Tile(cluster=2, early_addresses=True)
    return tile if jnp.dtype(out_dtype).itemsize == 2 else dataclasses.replace(tile, store_columns=32, store_slots=2)
