"""Grouped products of block-scaled FP8 operands on Hopper GPUs, by the pipeline of `kernels.scaled_matmul`.

Groups start at multiples of 128 rows. A tile may be taller than what is left of its group: it then multiplies rows of
the next group too and leaves them out when it stores. Which tile is whose stands in a small table on the device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import TILE, QuantizedArray, num_tiles
from dsv3_jax.kernels.grouped_matmul import tuned_fp8
from dsv3_jax.kernels.scaled_matmul import Tile, Work, scaled_matmul


def grouped_fp8_matmul(
    a: QuantizedArray,
    b: QuantizedArray,
    group_sizes_E: jax.Array,
    *,
    alignment: int,
    out_dtype: Any = jnp.bfloat16,
    tile: Tile | None = None,
) -> jax.Array:
    """Multiplies each group's rows of a [M, K] with the transpose of its matrix of b [E, C, K]; returns [M, C].

    Rows past the last group are not written.

    Args:
      tile: shape of the work of one thread block; None takes the tuned one.
    """
    num_rows, contraction = a.codes.shape
    num_groups, columns, _ = b.codes.shape
    if tile is None:
        tile = tuned_fp8.product(num_rows / num_groups, out_dtype)
    column_tiles = pl.cdiv(columns, tile.cluster_columns)
    live_E = -(-group_sizes_E // alignment) * alignment
    tables = _row_tiles(live_E, tile.rows, max_tiles=num_rows // tile.rows + num_groups)

    def work_at(table_refs, index):
        group_ref, first_row_ref, row_end_ref, num_row_tiles_ref = table_refs
        row, column = plgpu.planar_snake(index, (num_row_tiles_ref[0], column_tiles), 0, tile.raster_rows)
        return Work(
            group_ref[row],
            first_row_ref[row],
            row_end_ref[row],
            column * tile.cluster_columns,
            0,
            num_tiles(contraction),
        )

    return scaled_matmul(
        a,
        b,
        tables,
        out_type=jax.ShapeDtypeStruct((num_rows, columns), out_dtype),
        tile=tile,
        num_work=lambda table_refs: table_refs[3][0] * column_tiles,
        work_at=work_at,
    )[0]


def grouped_fp8_weight_gradient(
    a: QuantizedArray,
    b: QuantizedArray,
    group_sizes_E: jax.Array,
    *,
    alignment: int,
    out_dtype: Any = jnp.float32,
    tile: Tile | None = None,
) -> jax.Array:
    """Multiplies a [C1, M] with the transpose of b [C2, M] over each group's part of M; returns [E, C1, C2].

    Args:
      tile: shape of the work of one thread block; None takes the tuned one.
    """
    if tile is None:
        tile = tuned_fp8.weight_gradient(out_dtype)
    return _weight_gradient(a, b, group_sizes_E, alignment, out_dtype, tile, with_squares=False)[0]


def grouped_fp8_weight_gradient_with_squares(
    a: QuantizedArray, b: QuantizedArray, group_sizes_E: jax.Array, *, alignment: int, tile: Tile | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns what `grouped_fp8_weight_gradient` does in float32, and the sum of the squares of all of it."""
    if tile is None:
        tile = tuned_fp8.weight_gradient(jnp.float32)
    return _weight_gradient(a, b, group_sizes_E, alignment, jnp.float32, tile, with_squares=True)


def _weight_gradient(
    a: QuantizedArray,
    b: QuantizedArray,
    group_sizes_E: jax.Array,
    alignment: int,
    out_dtype: Any,
    tile: Tile,
    *,
    with_squares: bool,
) -> tuple[jax.Array, jax.Array | None]:
    rows, columns = a.codes.shape[0], b.codes.shape[0]
    (num_groups,) = group_sizes_E.shape
    row_tiles, column_tiles = pl.cdiv(rows, tile.rows), pl.cdiv(columns, tile.cluster_columns)
    steps_E = (-(-group_sizes_E // alignment) * (alignment // TILE)).astype(jnp.int32)
    first_step_E = jnp.cumsum(steps_E, dtype=jnp.int32) - steps_E

    def work_at(table_refs, index):
        steps_ref, first_step_ref = table_refs
        group = lax.div(index, row_tiles * column_tiles)
        in_group = lax.rem(index, row_tiles * column_tiles)
        row, column = plgpu.planar_snake(in_group, (row_tiles, column_tiles), 1, tile.raster_rows)
        return Work(
            group, row * tile.rows, rows, column * tile.cluster_columns, first_step_ref[group], steps_ref[group]
        )

    return scaled_matmul(
        a,
        b,
        (steps_E, first_step_E),
        out_type=jax.ShapeDtypeStruct((num_groups, rows, columns), out_dtype),
        tile=tile,
        num_work=lambda _: num_groups * row_tiles * column_tiles,
        work_at=work_at,
        with_squares=with_squares,
    )


def _row_tiles(live_E: jax.Array, tile_rows: int, *, max_tiles: int) -> tuple[jax.Array, ...]:
    """Returns per row tile its group, its first row and the end of its group's rows; and the number of tiles, [1]."""
    tiles_E = -(-live_E // tile_rows)
    tiles_end_E, rows_end_E = jnp.cumsum(tiles_E), jnp.cumsum(live_E)
    index = jnp.arange(max_tiles)
    group = jnp.searchsorted(tiles_end_E, index, side="right", method="compare_all")
    group = jnp.minimum(group, len(live_E) - 1)
    first_row = rows_end_E[group] - live_E[group] + (index - tiles_end_E[group] + tiles_E[group]) * tile_rows
    tables = (group, first_row, rows_end_E[group], tiles_end_E[-1:])
    return tuple(table.astype(jnp.int32) for table in tables)
