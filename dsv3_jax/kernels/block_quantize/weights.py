"""The quantization of weights for Hopper GPUs: 128x128 blocks are read once, codes written in both orientations.

Every SM runs one thread block, which loads blocks of the weight three ahead. Each of its four warpgroups holds 64 x 64
values in registers, tells the others their largest magnitude through shared memory, and divides. The exchange also
says that the block has been read, and the next load takes its place.

A warpgroup transposes its codes on the way to shared memory: as float16, of which pairs change lanes in one shuffle.
TMA reads zeros outside a tensor and does not write there: partial blocks need no masks.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import E4M3, E4M3_MAX, MIN_AMAX, TILE, QuantizedArray, num_tiles, padded_blocks, upper_half
from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.hopper import WARPGROUP_ROWS, segmented

STAGES = 3  # blocks of 64 KiB in shared memory
WARPGROUPS = 4
LARGEST_INTEGER = 0x7FFFFFFF

# Every warp holds all row maxima of a block, 4 neighbours per lane, so that each finds the largest by itself.
_ROW_MAXIMA = fragmented_array.TiledLayout(
    fragmented_array.Tiling(((TILE,), (4,))), (fragmented_array.Replicated(4),), (-2,), -1
)
ROW_MAXIMA = plgpu.Layout.TILED(
    _ROW_MAXIMA.tiling, _ROW_MAXIMA.warp_dims, _ROW_MAXIMA.lane_dims, _ROW_MAXIMA.vector_dim
)


def quantize_weights(weight_KN: jax.Array) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes [..., K, N] in blocks, transposed ([..., N, K]) and as it is."""
    *leading, rows, columns = weight_KN.shape
    matrices = math.prod(leading)
    block_rows, block_columns = num_tiles(rows), num_tiles(columns)
    num_blocks = matrices * block_rows * block_columns
    num_programs = min(num_blocks, NUM_SMS)
    part = (WARPGROUP_ROWS, TILE * TILE // (WARPGROUPS * WARPGROUP_ROWS))
    parts_per_line = TILE // part[1]

    # One function because loads, maxima and stores share barriers and buffers.
    def kernel(weight, forward, forward_scales, backward, backward_scales, *scratch):
        values_smem, maxima_smem, codes_smem, transposed_smem, is_full, is_read = scratch
        first, warpgroup = lax.axis_index("first"), lax.axis_index("warpgroup")
        count = lax.div(num_blocks - first + num_programs - 1, num_programs)
        part_row = lax.div(warpgroup, parts_per_line) * part[0]
        part_column = lax.rem(warpgroup, parts_per_line) * part[1]

        def block_at(index):
            number = first + index * num_programs
            line, j = lax.div(number, block_columns), lax.rem(number, block_columns)
            return lax.div(line, block_rows), lax.rem(line, block_rows), j

        def load(index, slot):
            matrix, i, j = block_at(index)
            source = weight.at[matrix, pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, values_smem.at[slot], is_full.at[slot])

        @pl.when(warpgroup == 0)
        def _load_ahead():
            for index in range(STAGES):
                pl.when(index < count)(lambda index=index: load(index, index))

        def quantize_block(index, slot):
            parity = lax.rem(index, 2)
            matrix, i, j = block_at(index)
            plgpu.barrier_wait(is_full.at[slot])
            own = values_smem.at[slot, pl.ds(part_row, part[0]), pl.ds(part_column, part[1])]
            values = plgpu.layout_cast(own[...], plgpu.Layout.WGMMA)
            # As integers, whose largest is NaN where there is one.
            magnitude_bits = lax.bitcast_convert_type(values, jnp.int32) & LARGEST_INTEGER
            maxima_smem[parity, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)] = magnitude_bits.max(axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(is_read)
            plgpu.barrier_wait(is_read)

            @pl.when((warpgroup == 0) & (index + STAGES < count))
            def _load_next():
                load(index + STAGES, slot)

            largest_bits = plgpu.layout_cast(maxima_smem[parity], ROW_MAXIMA).max()
            scale = _scale_of(largest_bits, part)
            codes = _divide(values, scale, 1 / scale).astype(E4M3)
            transposed = plgpu.layout_cast(codes.astype(jnp.float16), plgpu.Layout.WGMMA_TRANSPOSED).astype(E4M3)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_codes, own_transposed = codes_smem.at[warpgroup], transposed_smem.at[warpgroup]
            own_codes[...] = codes
            own_transposed.T[...] = transposed
            plgpu.commit_smem()
            first_row, first_column = i * TILE + part_row, j * TILE + part_column
            own_rows, own_columns = pl.ds(first_row, part[0]), pl.ds(first_column, part[1])

            # Of a part beyond the weight TMA would write zeros into another, where the weight is one segment wide.
            @pl.when((first_row < rows) & (first_column < columns))
            def _store_codes():
                plgpu.copy_smem_to_gmem(own_codes, backward.at[matrix, own_rows, own_columns], commit_group=False)
                plgpu.copy_smem_to_gmem(own_transposed, forward.at[matrix, own_columns, own_rows], commit_group=False)

            plgpu.commit_smem_to_gmem_group()

            @pl.when(warpgroup == 0)
            def _store_scale():
                scale = plgpu.layout_cast(_scale_of(largest_bits, (TILE,)), ROW_MAXIMA).max()
                backward_scales[matrix, i, j] = scale
                forward_scales[matrix, j, i] = scale
                pl.when(j == block_columns - 1)(lambda: _zero(backward_scales, (matrix, i), block_columns))
                pl.when(i == block_rows - 1)(lambda: _zero(forward_scales, (matrix, j), block_rows))

            return jnp.where(slot == STAGES - 1, 0, slot + 1)

        lax.fori_loop(0, count, quantize_block, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = "quantize_weights"
    outputs = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((matrices, columns, rows), E4M3),
            jax.ShapeDtypeStruct((matrices, block_columns, padded_blocks(rows)), jnp.float32),
            jax.ShapeDtypeStruct((matrices, rows, columns), E4M3),
            jax.ShapeDtypeStruct((matrices, block_rows, padded_blocks(columns)), jnp.float32),
        ),
        grid=(num_programs,),
        grid_names=("first",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=(
            segmented((STAGES, TILE, TILE), jnp.float32, also_dividing=columns),
            plgpu.SMEM((2, WARPGROUPS * WARPGROUP_ROWS), jnp.int32),
            segmented((WARPGROUPS, *part), E4M3, also_dividing=columns),
            segmented((WARPGROUPS, *part[::-1]), E4M3, also_dividing=rows),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
        ),
    )(weight_KN.reshape(matrices, rows, columns))
    # Without the barrier XLA runs the kernel twice where a loop also stacks its results for the backward pass.
    outputs = lax.optimization_barrier(outputs)
    forward, forward_scales, backward, backward_scales = (
        output.reshape(*leading, *output.shape[1:]) for output in outputs
    )
    return QuantizedArray(forward, forward_scales, "block"), QuantizedArray(backward, backward_scales, "block")


def _scale_of(largest_bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns an array filled with the scale of a block, given the bits of its largest magnitude."""
    amax = lax.bitcast_convert_type(lax.broadcast_in_dim(largest_bits, shape, ()), jnp.float32)
    amax = jnp.where(amax < MIN_AMAX, MIN_AMAX, amax)
    return _divide(amax, jnp.full_like(amax, E4M3_MAX), 1 / E4M3_MAX)


def _divide(x: jax.Array, y: jax.Array, inverse: jax.Array | float) -> jax.Array:
    """Divides float32 with correct rounding, given nearly 1 / y. Zeros keep their sign.

    The compiler fuses products with the sums that they enter. So the first quotient is a sum, or its lower half would
    be that of the unrounded product; the other products, of halves of 12 bits, are exact like the remainder.
    """
    quotient = x * inverse + x * 0.0
    quotient_high, y_high = upper_half(quotient), upper_half(y)
    quotient_low, y_low = quotient - quotient_high, y - y_high
    excess = quotient_high * y_high - x + quotient_high * y_low + quotient_low * y_high + quotient_low * y_low
    return quotient - excess * inverse


def _zero(scales: Any, line: tuple, num_blocks: int) -> None:
    """Writes the unused scales at the end of a line."""
    for column in range(num_blocks, scales.shape[-1]):
        scales[(*line, column)] = jnp.float32(0)
