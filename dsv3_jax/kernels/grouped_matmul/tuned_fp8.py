"""Tile shapes of the grouped FP8 products; `launch/tune.py` measures others beside them."""

from typing import Any

import jax.numpy as jnp

from dsv3_jax.kernels.scaled_matmul import Tile


def product(out_dtype: Any) -> Tile:
    """Returns the tile for rows times the matrices of their groups."""
    if jnp.dtype(out_dtype).itemsize == 2:
        return Tile(raster_rows=12, cluster=2, early_addresses=True)
    return Tile(raster_rows=12, store_columns=32, store_slots=2)


def weight_gradient(out_dtype: Any) -> Tile:
    """Returns the tile for the gradients of the matrices."""
    return Tile() if jnp.dtype(out_dtype).itemsize == 2 else Tile(store_columns=32, store_slots=2)
