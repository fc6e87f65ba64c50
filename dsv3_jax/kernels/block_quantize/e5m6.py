"""The 12-bit E5M6 for Hopper GPUs: written beside E4M3 rows, and read as E4M3 columns.

A byte of the lower plane holds the nibbles of two columns, half of all columns apart. So a thread block takes two tiles
of 128 columns which are that far apart, and everything is read and written once.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import E4M3, TILE, E5M6Array, QuantizedArray
from dsv3_jax.kernels.block_quantize import tiles
from dsv3_jax.kernels.block_quantize.tiles import CHUNK, COLUMNS, ROWS, Operand, Result
from dsv3_jax.kernels.hopper import segmented

TILE_ROWS = 32  # of a thread block that writes: 64 values per thread


def quantize_rows_and_encode(x_RK: jax.Array) -> tuple[QuantizedArray, E5M6Array]:
    """Quantizes [R, K] in 1x128 tiles to E4M3 and to E5M6."""
    num_rows, contraction = x_RK.shape
    half = contraction // (2 * TILE)
    tile = (TILE_ROWS, TILE)

    def quantize_rows_and_encode(x, *refs):
        outputs, (x_smem, codes_smem, high_smem, low_smem, scales_smem, e5m6_scales_smem, is_full) = refs[:5], refs[5:]
        codes, scales, high, low, e5m6_scales = outputs
        i, j = lax.axis_index("row"), lax.axis_index("column")
        rows = pl.ds(i * TILE_ROWS, TILE_ROWS)

        def columns(part):
            return pl.ds((j + part * half) * TILE, TILE)

        for part in range(2):
            plgpu.copy_gmem_to_smem(x.at[rows, columns(part)], x_smem.at[part], is_full)
        plgpu.barrier_wait(is_full)
        low_codes = None
        for part in range(2):
            values = plgpu.layout_cast(x_smem[part], ROWS).astype(jnp.float32)
            codes_smem[part], scales_smem[part] = tiles.quantize(values, ROWS)
            e5m6_scales_smem[part], inverses = tiles.row_scales(
                values, ROWS, largest=formats.E5M6_MAX, smallest=formats.E5M6_SMALLEST
            )
            e5m6_codes = formats.e5m6_codes(values * inverses)
            high_smem[part] = (e5m6_codes >> 4).astype(jnp.uint8)
            nibbles = e5m6_codes & 15
            low_codes = nibbles if low_codes is None else low_codes | nibbles << 4
        low_smem[...] = low_codes.astype(jnp.uint8)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(low_smem, low.at[rows, columns(0)], commit_group=False)
        for part in range(2):
            plgpu.copy_smem_to_gmem(codes_smem.at[part], codes.at[rows, columns(part)], commit_group=False)
            plgpu.copy_smem_to_gmem(high_smem.at[part], high.at[rows, columns(part)], commit_group=False)
            tiles.copy_scales(scales_smem.at[part], scales.at[j + part * half], i * TILE_ROWS, num_rows)
            tiles.copy_scales(e5m6_scales_smem.at[part], e5m6_scales.at[j + part * half], i * TILE_ROWS, num_rows)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scales_type = jax.ShapeDtypeStruct((2 * half, num_rows), jnp.float32)
    outputs = plgpu.kernel(
        quantize_rows_and_encode,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, contraction), E4M3),
            scales_type,
            jax.ShapeDtypeStruct((num_rows, contraction), jnp.uint8),
            jax.ShapeDtypeStruct((num_rows, contraction // 2), jnp.uint8),
            scales_type,
        ),
        grid=(pl.cdiv(num_rows, TILE_ROWS), half),
        grid_names=("row", "column"),
        scratch_types=(
            segmented((2, *tile), x_RK.dtype),
            segmented((2, *tile), E4M3),
            segmented((2, *tile), jnp.uint8),
            segmented(tile, jnp.uint8),
            plgpu.SMEM((2, TILE_ROWS), jnp.float32),
            plgpu.SMEM((2, TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=tiles.COMPILER_PARAMS,
    )(x_RK)
    # Without the barrier XLA runs the kernel twice where a loop also stacks its results for the backward pass.
    codes, scales, high, low, e5m6_scales = lax.optimization_barrier(outputs)
    return QuantizedArray(codes, scales, "row"), E5M6Array(high, low, e5m6_scales)


def decode_columns(encoded: E5M6Array) -> QuantizedArray:
    """Quantizes E5M6 [R, K] in 128x1 tiles: row-quantized [K, R]."""
    num_rows, contraction = encoded.high.shape
    half = contraction // (2 * TILE)
    high = QuantizedArray(encoded.high, encoded.scales, "row")

    def chunk_values(chunk, first, second, low):
        def bits(block):
            own = block.values.at[:, pl.ds(chunk * CHUNK, CHUNK)]
            return plgpu.layout_cast(own.T[...], plgpu.Layout.WGMMA_TRANSPOSED).astype(jnp.uint16)

        for block, is_upper in ((first, False), (second, True)):
            nibbles = bits(low) >> 4 if is_upper else bits(low) & 15
            # E5M6 is the upper 12 bits of a float16.
            values = lax.bitcast_convert_type(bits(block) << 8 | nibbles << 4, jnp.float16)
            yield plgpu.layout_cast(values, COLUMNS).astype(jnp.float32) * block.scales.columns(chunk)

    (columns,) = tiles.for_each_tile(
        chunk_values,
        [Operand(high), Operand(high, half), Operand(encoded.low)],
        [Result(0, is_transposed=True), Result(0, half, is_transposed=True)],
        output_shapes=[(contraction, num_rows)],
        extent=(num_rows, half),
        tile_rows=TILE,
        name="decode_columns",
    )
    return columns
