"""Grouped FP8 products in plain JAX: the oracle of the kernels and the CPU path.

Walks the live tiles of 128 rows. Groups start at multiples of 128, so a tile belongs to one group, and along a
contraction over rows it is one scale tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import TILE, QuantizedArray
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.grouped_matmul import reference


@functools.partial(jax.jit, static_argnames=("alignment", "out_dtype"))
def grouped_fp8_matmul(
    a: QuantizedArray, b: QuantizedArray, group_sizes_E: jax.Array, *, alignment: int, out_dtype: Any
) -> jax.Array:
    """Multiplies each live tile of rows with its group's weights; rows of other tiles are zero."""
    num_rows = a.codes.shape[0]
    group_of_tile, num_live_tiles = _live_tiles(group_sizes_E, alignment, num_rows)

    def multiply_tile(tile, y_MC):
        group = group_of_tile[tile]
        rows = QuantizedArray(_slice(a.codes, tile, 0), _slice(a.scales, tile, 1), a.tile)
        weights = QuantizedArray(b.codes[group], b.scales[group], b.tile)
        y_IC = fp8_matmul(rows, weights, out_dtype=out_dtype, implementation="reference")
        return jax.lax.dynamic_update_slice_in_dim(y_MC, y_IC, tile * TILE, 0)

    y_MC = jnp.zeros((num_rows, b.codes.shape[1]), out_dtype)
    return jax.lax.fori_loop(0, num_live_tiles, multiply_tile, y_MC)


@functools.partial(jax.jit, static_argnames=("alignment", "out_dtype"))
def grouped_fp8_weight_gradient(
    a: QuantizedArray, b: QuantizedArray, group_sizes_E: jax.Array, *, alignment: int, out_dtype: Any
) -> jax.Array:
    """Adds the product of each live tile of the contraction to its group's gradient."""
    group_of_tile, num_live_tiles = _live_tiles(group_sizes_E, alignment, a.codes.shape[1])

    def slice_of(operand, tile):
        return QuantizedArray(_slice(operand.codes, tile, 1), operand.scales[tile][None], operand.tile)

    def add_tile(tile, dw_EXY):
        product = fp8_matmul(slice_of(a, tile), slice_of(b, tile), out_dtype=jnp.float32, implementation="reference")
        return dw_EXY.at[group_of_tile[tile]].add(product)

    shape = (group_sizes_E.shape[0], a.codes.shape[0], b.codes.shape[0])
    return jax.lax.fori_loop(0, num_live_tiles, add_tile, jnp.zeros(shape, jnp.float32)).astype(out_dtype)


def _live_tiles(group_sizes_E: jax.Array, alignment: int, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the group of every tile of 128 rows and how many tiles the groups' rows and their padding take."""
    aligned_E = -(-group_sizes_E // alignment) * alignment
    return reference.live_blocks(aligned_E, TILE, num_rows // TILE)


def _slice(x: jax.Array, tile: jax.Array, dim: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, tile * TILE, TILE, dim)
