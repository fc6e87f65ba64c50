"""Dense products of block-scaled FP8 operands on Hopper GPUs, by the pipeline of `pipeline.py`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import QuantizedArray, num_tiles
from dsv3_jax.kernels.fp8_matmul import tuned
from dsv3_jax.kernels.fp8_matmul.pipeline import Work, scaled_matmul

SCALE_ROWS_MULTIPLE = 4  # TMA: lines of row scales start at multiples of 16 bytes
OUT_COLUMNS_MULTIPLE = 8  # TMA: rows of the output start at multiples of 16 bytes


def fp8_matmul(
    a: QuantizedArray, b: QuantizedArray, *, out_dtype: Any = jnp.bfloat16, tile: tuned.Tile | None = None
) -> jax.Array:
    """Multiplies row-quantized a [R, K] with the transpose of b [C, K], block- or row-quantized; returns [R, C].

    Args:
      tile: shape of the work of one thread block; None takes the tuned one.
    """
    if tile is None:
        tile = tuned.fp8_matmul(out_dtype)
    rows, contraction = a.codes.shape
    columns = b.codes.shape[0]
    padded_columns = -(-columns // OUT_COLUMNS_MULTIPLE) * OUT_COLUMNS_MULTIPLE
    row_tiles, column_tiles = pl.cdiv(rows, tile.rows), pl.cdiv(columns, tile.columns)

    def work_at(_, index):
        row, column = plgpu.planar_snake(index, (row_tiles, column_tiles), 1, tile.raster_rows)
        return Work(0, row * tile.rows, rows, column * tile.columns, 0, num_tiles(contraction))

    out = scaled_matmul(
        with_aligned_scales(a),
        with_aligned_scales(b),
        out_type=jax.ShapeDtypeStruct((rows, padded_columns), out_dtype),
        tile=tile,
        num_work=lambda _: row_tiles * column_tiles,
        work_at=work_at,
    )
    return out if padded_columns == columns else out[:, :columns]


def with_aligned_scales(quantized: QuantizedArray) -> QuantizedArray:
    """Pads the lines of row scales to whole 16 bytes, which TMA needs; block scales have them already."""
    missing = -quantized.scales.shape[-1] % SCALE_ROWS_MULTIPLE
    if not missing:
        return quantized
    return dataclasses.replace(quantized, scales=jnp.pad(quantized.scales, ((0, 0), (0, missing))))
