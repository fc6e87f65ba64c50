"""Grouped matmul for Hopper GPUs: three products on one persistent, warp-specialised Pallas Mosaic GPU pipeline.

Layout. Groups start at multiples of `ROW_ALIGNMENT` rows, so a tile of rows belongs to one group and its weight tile is
found by one table lookup; the table and the group sizes stay on the device. All operands are read as they lie in
memory: 16-bit wgmma takes its shared-memory operands in either order, so neither the weights of the input gradient nor
the rows of the weight gradient are transposed first.

One warpgroup copies tiles to shared memory and runs ahead across output tiles, so the next tile's loads happen during
the epilogue; each of the others multiplies 64 rows of the tile and keeps its float32 accumulator in registers
(64 x 256: 128 registers per thread, 0 spills). 128 x 256 tiles because L2 and shared-memory bandwidth are the limit: a
64-deep step moves 48 KiB for 1024 cycles of tensor-core time. `launch/bench.py --suite=grouped_matmul` measures them:
on an H200 678 to 720 TFLOP/s over both expert linears and all passes, 0.93 to 0.98 of torch beside it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.grouped_matmul import tuned
from dsv3_jax.kernels.grouped_matmul.tuned import ROW_ALIGNMENT, STEP
from dsv3_jax.kernels.hopper import PRODUCER_REGISTERS, WARPGROUP_ROWS, consumer_registers, segmented


@jax.custom_vjp
def grouped_matmul(x_MK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiplies each group's rows with its matrix; [M, N] in x's dtype, zero in tiles that hold no rows.

    Weights of another dtype are rounded to x's for the products; their gradient has their own dtype.
    """
    y_MN = rows_times_weights(x_MK, w_EKN.astype(x_MK.dtype), group_sizes_E, weights_are_transposed=False)
    # Without the barrier XLA runs the kernel twice where a loop also stacks its result for the backward pass.
    return lax.optimization_barrier(y_MN)


def _forward(x_MK, w_EKN, group_sizes_E):
    return grouped_matmul(x_MK, w_EKN, group_sizes_E), (x_MK, w_EKN, group_sizes_E)


def _backward(residuals, dy_MN):
    x_MK, w_EKN, group_sizes_E = residuals
    return *gradients(x_MK, w_EKN, group_sizes_E, dy_MN, w_EKN.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def gradients(
    x_MK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, dy_MN: jax.Array, weight_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of rows, in their dtype, and matrices, from that of the product."""
    dx_MK = rows_times_weights(dy_MN, w_EKN.astype(dy_MN.dtype), group_sizes_E, weights_are_transposed=True)
    return dx_MK, weight_gradient(x_MK, dy_MN, group_sizes_E, out_dtype=weight_dtype)


def rows_times_weights(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    weights_are_transposed: bool,
    tile: tuned.Tile | None = None,
) -> jax.Array:
    """Multiplies rows with their group's matrix, or with its transpose: the product and its input gradient.

    Args:
      x_MK: rows; [M, N] when the weights are transposed.
      w_EKN: one matrix per group.
      group_sizes_E: int32 rows per group.
      weights_are_transposed: contracts over N instead of K.
      tile: shape of the work of one thread block; None takes the tuned one.

    Returns:
      [M, N], or [M, K] when the weights are transposed, in the dtype of x; tiles without rows are zero.
    """
    num_rows, contraction = x_MK.shape
    columns = w_EKN.shape[1] if weights_are_transposed else w_EKN.shape[2]
    if tile is None:
        tile = tuned.rows_times_weights(columns)
    num_tiles = num_rows // ROW_ALIGNMENT

    def blocks_of(refs, _, row, column):
        x_ref, w_ref, group_of_tile_ref, _ = refs
        group = group_of_tile_ref[row]
        rows, out_columns = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)

        def blocks_of_step(step):
            steps = pl.ds(step * STEP, STEP)
            w_slice = (out_columns, steps) if weights_are_transposed else (steps, out_columns)
            return x_ref.at[rows, steps], w_ref.at[group, *w_slice]

        return blocks_of_step

    return _persistent_matmul(
        (x_MK, w_EKN, *_groups_of_tiles(group_sizes_E, num_tiles)),
        out_type=jax.ShapeDtypeStruct((num_rows, columns), x_MK.dtype),
        tile=tile,
        grid=(1, num_tiles, pl.cdiv(columns, tile.columns)),
        num_steps=lambda refs, _, row: jnp.where(row < refs[-1][0], contraction // STEP, 0),
        blocks_of=blocks_of,
        out_block=lambda out_ref, _, rows, out_columns: out_ref.at[rows, out_columns],
        lhs_is_transposed=False,
        rhs_is_transposed=weights_are_transposed,
    )


def weight_gradient(
    x_MK: jax.Array,
    dy_MN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    out_dtype: Any,
    tile: tuned.Tile | None = None,
) -> jax.Array:
    """Multiplies each group's transposed rows with its output gradients; [E, K, N], exact zeros for an empty group."""
    width, columns = x_MK.shape[1], dy_MN.shape[1]
    (num_groups,) = group_sizes_E.shape
    if tile is None:
        tile = tuned.weight_gradient(width, columns, out_dtype)
    blocks_E = -(-group_sizes_E // ROW_ALIGNMENT) * (ROW_ALIGNMENT // STEP)
    starts_E = jnp.cumsum(blocks_E) - blocks_E

    def blocks_of(refs, group, row, column):
        x_ref, dy_ref, starts_ref, _ = refs
        start = starts_ref[group]
        x_columns, dy_columns = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)

        def blocks_of_step(step):
            rows = pl.ds((start + step) * STEP, STEP)
            return x_ref.at[rows, x_columns], dy_ref.at[rows, dy_columns]

        return blocks_of_step

    return _persistent_matmul(
        (x_MK, dy_MN, starts_E, blocks_E),
        out_type=jax.ShapeDtypeStruct((num_groups, width, columns), out_dtype),
        tile=tile,
        grid=(num_groups, pl.cdiv(width, tile.rows), pl.cdiv(columns, tile.columns)),
        num_steps=lambda refs, group, _: refs[3][group],
        blocks_of=blocks_of,
        out_block=lambda out_ref, group, rows, out_columns: out_ref.at[group, rows, out_columns],
        lhs_is_transposed=True,
        rhs_is_transposed=False,
    )


def _groups_of_tiles(group_sizes_E: jax.Array, num_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Returns the group of every row tile, and how many tiles hold rows, [1]: later ones are only to be zeroed."""
    (num_groups,) = group_sizes_E.shape
    tiles_end = jnp.cumsum(-(-group_sizes_E // ROW_ALIGNMENT))
    group = jnp.searchsorted(tiles_end, jnp.arange(num_tiles), side="right", method="compare_all")
    return jnp.minimum(group, num_groups - 1).astype(jnp.int32), tiles_end[-1:].astype(jnp.int32)


def _persistent_matmul(
    operands: tuple[jax.Array, ...],
    *,
    out_type: jax.ShapeDtypeStruct,
    tile: tuned.Tile,
    grid: tuple[int, int, int],
    num_steps: Callable,
    blocks_of: Callable,
    out_block: Callable,
    lhs_is_transposed: bool,
    rhs_is_transposed: bool,
) -> jax.Array:
    """Runs the pipeline over a (group, row tile, column tile) grid.

    Args:
      operands: arrays in device memory; the callables get their references.
      out_type: shape and dtype of the result.
      tile: shape of the work of one thread block.
      grid: number of groups, row tiles and column tiles.
      num_steps: (references, group, row tile) -> how many stages of the contraction its tiles have, may be 0.
      blocks_of: (references, group, row tile, column tile) -> function from a step to the references of its two blocks.
        What it reads of the tables it reads once per tile: a load in the loop over steps would delay every copy.
      out_block: (output reference, group, rows, columns) -> reference to a block of the output.
      lhs_is_transposed: the left block is [step, rows] instead of [rows, step].
      rhs_is_transposed: the right block is [columns, step] instead of [step, columns].
    """
    num_groups, num_row_tiles, num_column_tiles = grid
    dtype = operands[0].dtype
    stages, warpgroups = tile.stages, tile.warpgroups
    tiles_per_group = num_row_tiles * num_column_tiles
    width, columns = out_type.shape[-2:]
    may_lie_outside = width % tile.rows or columns % tile.columns

    # One function because the two roles share barriers, buffers and the order of tiles.
    def grouped_matmul_kernel(*refs):
        *in_refs, out_ref, lhs_smem, rhs_smem, out_smem, full, empty = refs
        warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("first")
        num_tiles = lax.div(num_groups * tiles_per_group - first + NUM_SMS - 1, NUM_SMS)

        def position(index):
            linear = first + index * NUM_SMS
            row, column = plgpu.planar_snake(
                lax.rem(linear, tiles_per_group), (num_row_tiles, num_column_tiles), 0, tile.raster_rows
            )
            return lax.div(linear, tiles_per_group), row, column

        def next_slot(slot):
            return jnp.where(slot == stages - 1, 0, slot + 1)

        def last_slot(slot):
            return jnp.where(slot == 0, stages - 1, slot - 1)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(index, slot):
                group, row, column = position(index)
                blocks_of_step = blocks_of(in_refs, group, row, column)

                def load_step(step, slot):
                    plgpu.barrier_wait(empty.at[slot])
                    lhs_block, rhs_block = blocks_of_step(step)
                    plgpu.copy_gmem_to_smem(lhs_block, lhs_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(rhs_block, rhs_smem.at[slot], full.at[slot])
                    return next_slot(slot)

                return lax.fori_loop(0, num_steps(in_refs, group, row), load_step, slot)

            slot = lax.fori_loop(0, num_tiles, load_tile, jnp.int32(0))

            def drain(_, slot):
                plgpu.barrier_wait(empty.at[slot])
                return next_slot(slot)

            lax.fori_loop(0, stages - 1, drain, slot)

        @pl.when(warpgroup < warpgroups)
        def _consume():
            plgpu.set_max_registers(consumer_registers(warpgroups), action="increase")
            own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            # Every step frees the slot before its own; the first one thereby opens the last slot.
            @pl.loop(0, stages - 1)
            def _(slot):
                plgpu.barrier_arrive(empty.at[slot])

            def multiply_tile(index, slot):
                group, row, column = position(index)

                def accumulate(acc_ref):
                    def multiply_step(_, slot):
                        plgpu.barrier_wait(full.at[slot])
                        lhs = lhs_smem.at[slot, :, own_rows].T if lhs_is_transposed else lhs_smem.at[slot, own_rows]
                        rhs = rhs_smem.at[slot].T if rhs_is_transposed else rhs_smem.at[slot]
                        plgpu.wgmma(acc_ref, lhs, rhs)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[last_slot(slot)])
                        return next_slot(slot)

                    slot_after = lax.fori_loop(0, num_steps(in_refs, group, row), multiply_step, slot)
                    return acc_ref[...], slot_after

                acc, slot = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, tile.columns), jnp.float32))
                first_row = row * tile.rows + warpgroup * WARPGROUP_ROWS
                out_tile = acc.astype(out_type.dtype)
                for i, start in enumerate(range(0, tile.columns, tile.store_columns)):
                    first_column = column * tile.columns + start

                    def store(i=i, start=start, first_column=first_column):
                        buffer = out_smem.at[warpgroup, i % tile.store_slots]
                        plgpu.wait_smem_to_gmem(tile.store_slots - 1, wait_read_only=True)
                        buffer[...] = out_tile[:, start : start + tile.store_columns]
                        plgpu.commit_smem()
                        rows = pl.ds(first_row, WARPGROUP_ROWS)
                        out_columns = pl.ds(first_column, tile.store_columns)
                        plgpu.copy_smem_to_gmem(buffer, out_block(out_ref, group, rows, out_columns))

                    if may_lie_outside:
                        pl.when((first_row < width) & (first_column < columns))(store)
                    else:
                        store()
                return slot

            lax.fori_loop(0, num_tiles, multiply_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    lhs_shape = (STEP, tile.rows) if lhs_is_transposed else (tile.rows, STEP)
    rhs_shape = (tile.columns, STEP) if rhs_is_transposed else (STEP, tile.columns)
    return plgpu.kernel(
        grouped_matmul_kernel,
        out_type=out_type,
        grid=(NUM_SMS,),
        grid_names=("first",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            segmented((stages, *lhs_shape), dtype),
            segmented((stages, *rhs_shape), dtype),
            segmented((warpgroups, tile.store_slots, WARPGROUP_ROWS, tile.store_columns), out_type.dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands)
