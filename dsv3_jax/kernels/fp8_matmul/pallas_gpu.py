"""Dense products of block-scaled FP8 operands on Hopper GPUs: few rows on `few_rows.py`, more on `scaled_matmul`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import QuantizedArray, num_tiles
from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.fp8_matmul import tuned
from dsv3_jax.kernels.fp8_matmul.few_rows import MAX_ROWS, few_rows_matmul
from dsv3_jax.kernels.scaled_matmul import Work, scaled_matmul

MIN_STEPS_OF_PART = 8  # 128-deep


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
    shape = len(a.codes), len(b.codes)
    if tile is None:
        has_few_rows = len(a.codes) <= MAX_ROWS and b.tile == "block"
        tile = tuned.few_rows(*b.codes.shape) if has_few_rows else tuned.fp8_matmul(*shape, out_dtype)
    if isinstance(tile, tuned.FewRowsTile):
        return few_rows_matmul(a, b, out_type=jax.ShapeDtypeStruct(shape, out_dtype), tile=tile)
    return _multiply(a, b, out_dtype, tile, with_squares=False)[0]


def fp8_matmul_with_squares(
    a: QuantizedArray, b: QuantizedArray, *, tile: tuned.Tile | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the product of `fp8_matmul` in float32, and the sum of the squares of all of it."""
    if tile is None:
        tile = tuned.fp8_matmul(len(a.codes), len(b.codes), jnp.float32)
    return _multiply(a, b, jnp.float32, tile, with_squares=True)


def _multiply(
    a: QuantizedArray, b: QuantizedArray, out_dtype: Any, tile: tuned.Tile, *, with_squares: bool
) -> tuple[jax.Array, jax.Array | None]:
    (num_rows, contraction), num_columns = a.codes.shape, b.codes.shape[0]
    row_tiles, column_tiles = pl.cdiv(num_rows, tile.rows), pl.cdiv(num_columns, tile.cluster_columns)
    num_work, steps = row_tiles * column_tiles, num_tiles(contraction)
    parts = num_parts(num_work, steps, tile) if jnp.dtype(out_dtype) == jnp.float32 else 1
    steps_of_part = pl.cdiv(steps, parts)
    out_shape = (parts, num_rows, num_columns) if parts > 1 else (num_rows, num_columns)

    def work_at(_, index):
        part, first_step, num_steps = 0, 0, steps
        if parts > 1:
            part, index = lax.div(index, num_work), lax.rem(index, num_work)
            first_step = part * steps_of_part
            num_steps = jnp.minimum(steps_of_part, steps - first_step)
        row, column = plgpu.planar_snake(index, (row_tiles, column_tiles), 1, tile.raster_rows)
        return Work(part, row * tile.rows, num_rows, column * tile.cluster_columns, first_step, num_steps)

    out, squares = scaled_matmul(
        a,
        b,
        out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
        tile=tile,
        num_work=lambda _: parts * num_work,
        work_at=work_at,
        with_squares=with_squares and parts == 1,
    )
    if parts > 1:
        out = out.sum(axis=0)
        squares = jnp.sum(jnp.square(out)) if with_squares else None
    return out, squares


def num_parts(num_work: int, steps: int, tile: tuned.Tile) -> int:
    """Returns into how many parts the contraction of a float32 result is cut, for thread blocks without work otherwise.

    Weight gradients of narrow layers are few tiles over many tokens.
    """
    most = min(NUM_SMS // tile.cluster // num_work, steps // MIN_STEPS_OF_PART)
    return pl.cdiv(steps, pl.cdiv(steps, most)) if most > 1 else 1
