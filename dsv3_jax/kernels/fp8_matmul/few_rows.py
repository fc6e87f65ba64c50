"""Block-scaled FP8 products with at most 128 rows: decoding, where reading the weights is all the time there is.

Narrow tiles, so that every multiprocessor reads its share of the weights at once. Inside a thread block the steps of
the contraction go to the multiplying warpgroups in turn, which hides the latency of each step behind the others; their
sums meet in shared memory at the end.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import TILE, QuantizedArray, num_tiles
from dsv3_jax.kernels.fp8_matmul.tuned import FewRowsTile
from dsv3_jax.kernels.hopper import WARPGROUP_ROWS, segmented
from dsv3_jax.kernels.scaled_matmul import TMA_SCALE_ROW, scale_boxes, with_whole_rows, with_whole_tiles

MAX_ROWS = 2 * WARPGROUP_ROWS


def few_rows_matmul(
    a: QuantizedArray, b: QuantizedArray, *, out_type: jax.ShapeDtypeStruct, tile: FewRowsTile
) -> jax.Array:
    """Multiplies row-quantized a [R, K], R <= 128, with the transpose of block-quantized b [C, K]; returns [R, C]."""
    whole_shape = out_type.shape
    a, b, out_type = with_whole_tiles(a), with_whole_tiles(b), with_whole_rows(out_type)
    num_rows, contraction = a.codes.shape
    columns, stages, warpgroups = tile.columns, tile.stages, tile.warpgroups
    waves = pl.cdiv(num_rows, WARPGROUP_ROWS)
    rows, steps, block_scales = waves * WARPGROUP_ROWS, num_tiles(contraction), b.scales.shape[-1]
    wave_rows = [pl.ds(wave * WARPGROUP_ROWS, WARPGROUP_ROWS) for wave in range(waves)]

    # One function because both roles share barriers and buffers.
    def few_rows_kernel(a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref, *scratch):
        a_smem, b_smem, a_scales_smem, b_scales_smem, sums_smem, out_smem, full, empty, full_blocks, summed = scratch
        warpgroup = lax.axis_index("warpgroup")
        first_column = lax.axis_index("column_tile") * columns

        @pl.when(warpgroup == warpgroups)
        def _produce():
            block = jnp.minimum(lax.div(first_column, TILE), b_scales_ref.shape[0] - 1)
            for box in scale_boxes(block_scales):
                plgpu.copy_gmem_to_smem(b_scales_ref.at[block, box], b_scales_smem.at[box], full_blocks)

            def load_step(step, _):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(empty.at[slot])
                contracted = pl.ds(step * TILE, TILE)
                b_block = b_ref.at[pl.ds(first_column, columns), contracted]
                plgpu.copy_gmem_to_smem(b_block, b_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(a_ref.at[pl.ds(0, rows), contracted], a_smem.at[slot], full.at[slot])
                a_scales = a_scales_ref.at[step, pl.ds(0, rows)]
                plgpu.copy_gmem_to_smem(a_scales, a_scales_smem.at[slot], full.at[slot])

            lax.fori_loop(0, steps, load_step, None)

            @pl.loop(steps, steps + stages)
            def _drain(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < warpgroups)
        def _consume():
            @pl.loop(0, stages // warpgroups)
            def _(index):
                plgpu.barrier_arrive(empty.at[index * warpgroups + warpgroup])

            plgpu.barrier_wait(full_blocks)

            def multiply_step(index, sums):
                step = index * warpgroups + warpgroup
                slot = lax.rem(step, stages)
                b_scale = b_scales_smem[step]
                plgpu.barrier_wait(full.at[slot])
                new_sums = []
                for own_rows, sum_ in zip(wave_rows, sums):
                    a_scale = plgpu.load(a_scales_smem, (slot, own_rows), layout=plgpu.Layout.WGMMA.reduce(1))

                    def multiply(partial_ref, own_rows=own_rows):
                        plgpu.wgmma(partial_ref, a_smem.at[slot, own_rows], b_smem.at[slot].T)
                        return partial_ref[...]

                    partial = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32))
                    new_sums.append(sum_ + partial * lax.broadcast_in_dim(a_scale * b_scale, partial.shape, [0]))
                if tile.fence:
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])
                return tuple(new_sums)

            own_steps = lax.div(steps - warpgroup + warpgroups - 1, warpgroups)
            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
            sums = lax.fori_loop(0, own_steps, multiply_step, (zeros,) * waves)

            @pl.when(warpgroup > 0)
            def _hand_over():
                for own_rows, sum_ in zip(wave_rows, sums):
                    sums_smem[warpgroup - 1, own_rows] = sum_
                plgpu.barrier_arrive(summed)

            @pl.when(warpgroup == 0)
            def _store():
                if warpgroups > 1:
                    plgpu.barrier_wait(summed)
                for own_rows, sum_ in zip(wave_rows, sums):
                    for other in range(warpgroups - 1):
                        sum_ += plgpu.load(sums_smem, (other, own_rows), layout=plgpu.Layout.WGMMA)
                    out_smem[own_rows] = sum_.astype(out_type.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[pl.ds(0, rows), pl.ds(first_column, columns)])
                plgpu.wait_smem_to_gmem(0)

    codes = a.codes.dtype
    out = plgpu.kernel(
        few_rows_kernel,
        out_type=out_type,
        grid=(pl.cdiv(len(b.codes), columns),),
        grid_names=("column_tile",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            segmented((stages, rows, TILE), codes),
            segmented((stages, columns, TILE), codes),
            plgpu.SMEM((stages, rows), jnp.float32),
            plgpu.SMEM((-(-block_scales // TMA_SCALE_ROW) * TMA_SCALE_ROW,), jnp.float32),
            segmented((max(1, warpgroups - 1), rows, columns), jnp.float32),
            segmented((rows, columns), out_type.dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3),
            plgpu.Barrier(num_barriers=stages, num_arrivals=1),
            plgpu.Barrier(num_arrivals=len(scale_boxes(block_scales))),
            plgpu.Barrier(num_arrivals=max(1, warpgroups - 1)),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(a.codes, a.scales, b.codes, b.scales)
    out = lax.optimization_barrier(out)
    return out if out.shape == whole_shape else out[tuple(map(slice, whole_shape))]
