"""Dense products of block-scaled FP8 operands on Hopper GPUs: few rows on `few_rows.py`, more on `scaled_matmul`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import QuantizedArray, num_tiles
from dsv3_jax.kernels.fp8_matmul import tuned
from dsv3_jax.kernels.fp8_matmul.few_rows import MAX_ROWS, few_rows_matmul
from dsv3_jax.kernels.scaled_matmul import Work, scaled_matmul


def fp8_matmul(
    a: QuantizedArray,
    b: QuantizedArray,
    *,
    out_dtype: Any = jnp.bfloat16,
    tile: tuned.Tile | tuned.FewRowsTile | None = None,
) -> jax.Array:
    """Multiplies row-quantized a [R, K] with the transpose of b [C, K], block- or row-quantized; returns [R, C].

    Args:
      tile: shape of the work of one thread block, and thereby which kernel runs; None takes the tuned one.
    """
    (num_rows, contraction), num_columns = a.codes.shape, b.codes.shape[0]
    if tile is None:
        has_few_rows = num_rows <= MAX_ROWS and b.tile == "block"
        tile = tuned.few_rows(*b.codes.shape) if has_few_rows else tuned.fp8_matmul(out_dtype)
    out_type = jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype)
    if isinstance(tile, tuned.FewRowsTile):
        return few_rows_matmul(a, b, out_type=out_type, tile=tile)
    row_tiles, column_tiles = pl.cdiv(num_rows, tile.rows), pl.cdiv(num_columns, tile.cluster_columns)

    def work_at(_, index):
        row, column = plgpu.planar_snake(index, (row_tiles, column_tiles), 1, tile.raster_rows)
        return Work(0, row * tile.rows, num_rows, column * tile.cluster_columns, 0, num_tiles(contraction))

    num_work = row_tiles * column_tiles
    return scaled_matmul(a, b, out_type=out_type, tile=tile, num_work=lambda _: num_work, work_at=work_at)
