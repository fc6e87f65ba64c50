"""Dense products of block-scaled FP8 operands on Hopper GPUs: many rows on `pipeline.py`, few on `few_rows.py`.

TMA reads and writes arrays in whole tiles of 8 rows and 128 bytes. Operands of other shapes are padded with zeros
first; no array of the published network needs it but the gradients of the 576 latent channels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import TILE, QuantizedArray, num_tiles
from dsv3_jax.kernels.fp8_matmul import tuned
from dsv3_jax.kernels.fp8_matmul.few_rows import MAX_ROWS, few_rows_matmul
from dsv3_jax.kernels.fp8_matmul.pipeline import Work, scaled_matmul

ROWS_MULTIPLE = 8
ROW_BYTES = 128  # of the codes and of the output


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
    num_rows, num_columns = a.codes.shape[0], b.codes.shape[0]
    a, b = with_whole_tiles(a), with_whole_tiles(b)
    if tile is None:
        has_few_rows = num_rows <= MAX_ROWS and b.tile == "block"
        tile = tuned.few_rows(num_rows, *b.codes.shape) if has_few_rows else tuned.fp8_matmul(out_dtype)
    out_type = jax.ShapeDtypeStruct((len(a.codes), whole_columns(num_columns, out_dtype)), out_dtype)
    if isinstance(tile, tuned.FewRowsTile):
        out = few_rows_matmul(a, b, out_type=out_type, tile=tile)
    else:
        out = _many_rows_matmul(a, b, out_type=out_type, tile=tile)
    return out if out.shape == (num_rows, num_columns) else out[:num_rows, :num_columns]


def _many_rows_matmul(
    a: QuantizedArray, b: QuantizedArray, *, out_type: jax.ShapeDtypeStruct, tile: tuned.Tile
) -> jax.Array:
    (num_rows, contraction), num_columns = a.codes.shape, len(b.codes)
    row_tiles, column_tiles = pl.cdiv(num_rows, tile.rows), pl.cdiv(num_columns, tile.cluster_columns)

    def work_at(_, index):
        row, column = plgpu.planar_snake(index, (row_tiles, column_tiles), 1, tile.raster_rows)
        return Work(0, row * tile.rows, num_rows, column * tile.cluster_columns, 0, num_tiles(contraction))

    num_work = row_tiles * column_tiles
    return scaled_matmul(a, b, out_type=out_type, tile=tile, num_work=lambda _: num_work, work_at=work_at)


def with_whole_tiles(quantized: QuantizedArray) -> QuantizedArray:
    """Pads with zeros to what TMA reads: whole tiles of codes, and row scales in lines of whole 16 bytes."""
    rows, contraction = quantized.codes.shape[-2:]
    more_rows, more_contraction = -rows % ROWS_MULTIPLE, -contraction % TILE
    if not more_rows and not more_contraction:
        return quantized
    leading = ((0, 0),) * (quantized.codes.ndim - 2)
    codes = jnp.pad(quantized.codes, (*leading, (0, more_rows), (0, more_contraction)))
    scales = quantized.scales
    if quantized.tile == "row":
        scales = jnp.pad(scales, (*leading, (0, 0), (0, more_rows)))
    return dataclasses.replace(quantized, codes=codes, scales=scales)


def whole_columns(columns: int, out_dtype: Any) -> int:
    """Returns the columns of an output of this type that TMA can write."""
    multiple = ROW_BYTES // jnp.dtype(out_dtype).itemsize
    return -(-columns // multiple) * multiple
