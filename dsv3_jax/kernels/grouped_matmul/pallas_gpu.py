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

import functools
import typing
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
from dsv3_jax.kernels.hopper import PRODUCER_REGISTERS, WARPGROUP_ROWS, Cluster, consumer_registers, segmented


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
    dx_MK = rows_times_weights(dy_MN, w_EKN.astype(dy_MN.dtype), group_sizes_E, weights_are_transposed=True)
    dw_EKN = weight_gradient(x_MK, dy_MN, group_sizes_E, out_dtype=w_EKN.dtype)
    return dx_MK, dw_EKN, None


grouped_matmul.defvjp(_forward, _backward)


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
    bundles = _bundles(group_sizes_E, num_rows // ROW_ALIGNMENT, tile.cluster)

    def blocks_of(refs, _, bundle, row, column):
        x_ref, w_ref, group_of_bundle_ref, *_ = refs
        group = group_of_bundle_ref[bundle]
        rows, out_columns = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)

        def blocks_of_step(step):
            steps = pl.ds(step * STEP, STEP)
            w_slice = (out_columns, steps) if weights_are_transposed else (steps, out_columns)
            return x_ref.at[rows, steps], w_ref.at[group, *w_slice]

        return blocks_of_step

    def row_of(refs, bundle, rank):
        *_, first_tile_ref, last_tile_ref, _ = refs
        return jnp.minimum(first_tile_ref[bundle] + rank, last_tile_ref[bundle])

    return _persistent_matmul(
        (x_MK, w_EKN, *bundles),
        out_type=jax.ShapeDtypeStruct((num_rows, columns), x_MK.dtype),
        tile=tile,
        grid=(1, bundles.group.shape[0], pl.cdiv(columns, tile.columns)),
        num_steps=lambda refs, _, bundle: jnp.where(bundle < refs[-1][0], contraction // STEP, 0),
        row_of=row_of,
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

    def blocks_of(refs, group, _, row, column):
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
        grid=(num_groups, pl.cdiv(width, tile.rows * tile.cluster), pl.cdiv(columns, tile.columns)),
        num_steps=lambda refs, group, _: refs[3][group],
        row_of=lambda _, bundle, rank: bundle * tile.cluster + rank,
        blocks_of=blocks_of,
        out_block=lambda out_ref, group, rows, out_columns: out_ref.at[group, rows, out_columns],
        lhs_is_transposed=True,
        rhs_is_transposed=False,
    )


class _Bundles(typing.NamedTuple):
    """The row tiles that a cluster takes together: of one group, so that they share its weights."""

    group: jax.Array  # int32 per bundle
    first_tile: jax.Array  # int32 per bundle
    last_tile: jax.Array  # int32 per bundle: of its group; a cluster with fewer tiles than blocks repeats this one
    num_live: jax.Array  # int32 [1]: later bundles hold no rows, only tiles to be zeroed


def _bundles(group_sizes_E: jax.Array, num_tiles: int, size: int) -> _Bundles:
    """Bundles the row tiles of every group, then those past the last group; bundles left over lie outside the rows."""
    (num_groups,) = group_sizes_E.shape
    live_tiles_E = -(-group_sizes_E // ROW_ALIGNMENT)
    tiles = jnp.append(live_tiles_E, num_tiles - live_tiles_E.sum())
    bundles_end = jnp.cumsum(-(-tiles // size))
    tiles_end = jnp.cumsum(tiles)
    num_bundles = (num_tiles + (num_groups + 1) * (size - 1)) // size
    index = jnp.arange(num_bundles)
    group = jnp.searchsorted(bundles_end, index, side="right", method="compare_all")
    is_left_over = group > num_groups
    group = jnp.minimum(group, num_groups)
    first_bundle = bundles_end[group] - -(-tiles[group] // size)
    first_tile = tiles_end[group] - tiles[group] + (index - first_bundle) * size
    int32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    return _Bundles(
        group=int32(jnp.minimum(group, num_groups - 1)),
        first_tile=int32(jnp.where(is_left_over, num_tiles, first_tile)),
        last_tile=int32(jnp.where(is_left_over, num_tiles, tiles_end[group] - 1)),
        num_live=int32(bundles_end[num_groups - 1 : num_groups]),
    )


def _persistent_matmul(
    operands: tuple[jax.Array, ...],
    *,
    out_type: jax.ShapeDtypeStruct,
    tile: tuned.Tile,
    grid: tuple[int, int, int],
    num_steps: Callable,
    row_of: Callable,
    blocks_of: Callable,
    out_block: Callable,
    lhs_is_transposed: bool,
    rhs_is_transposed: bool,
) -> jax.Array:
    """Runs the pipeline over a (group, bundle, column tile) grid; a cluster of blocks takes a bundle of row tiles.

    Args:
      operands: arrays in device memory; the callables get their references.
      out_type: shape and dtype of the result.
      tile: shape of the work of one thread block.
      grid: number of groups, bundles and column tiles.
      num_steps: (references, group, bundle) -> how many stages of the contraction its tiles have, may be 0.
      row_of: (references, bundle, rank in the cluster) -> row tile.
      blocks_of: (references, group, bundle, row tile, column tile) -> function from a step to the references of its
        two blocks; the right one is the same for all thread blocks of a cluster. What it reads of the tables it reads
        once per tile: a load in the loop over steps would delay every copy.
      out_block: (output reference, group, rows, columns) -> reference to a block of the output.
      lhs_is_transposed: the left block is [step, rows] instead of [rows, step].
      rhs_is_transposed: the right block is [columns, step] instead of [step, columns].
    """
    num_groups, num_bundles, num_column_tiles = grid
    dtype = operands[0].dtype
    stages, warpgroups, cluster = tile.stages, tile.warpgroups, Cluster(tile.cluster)
    tiles_per_group = num_bundles * num_column_tiles
    num_clusters = NUM_SMS // cluster.size
    width, columns = out_type.shape[-2:]
    may_lie_outside = (
        width % (tile.rows * tile.cluster) or columns % tile.columns or num_bundles * tile.cluster * tile.rows > width
    )

    # One function because the two roles share barriers, buffers and the order of tiles.
    def grouped_matmul_kernel(*refs):
        *in_refs, out_ref, lhs_smem, rhs_smem, out_smem, full, empty = refs
        warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("first")
        num_tiles = lax.div(num_groups * tiles_per_group - first + num_clusters - 1, num_clusters)

        def position(index):
            linear = first + index * num_clusters
            bundle, column = plgpu.planar_snake(
                lax.rem(linear, tiles_per_group), (num_bundles, num_column_tiles), 0, tile.raster_rows // cluster.size
            )
            return lax.div(linear, tiles_per_group), bundle, row_of(in_refs, bundle, cluster.rank()), column

        def next_slot(slot):
            return jnp.where(slot == stages - 1, 0, slot + 1)

        def last_slot(slot):
            return jnp.where(slot == 0, stages - 1, slot - 1)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(index, slot):
                group, bundle, row, column = position(index)
                blocks_of_step = blocks_of(in_refs, group, bundle, row, column)

                def load_step(step, slot):
                    plgpu.barrier_wait(empty.at[slot])
                    lhs_block, rhs_block = blocks_of_step(step)
                    plgpu.copy_gmem_to_smem(lhs_block, lhs_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(rhs_block, rhs_smem.at[slot], full.at[slot], **cluster.load_arguments)
                    return next_slot(slot)

                return lax.fori_loop(0, num_steps(in_refs, group, bundle), load_step, slot)

            slot = lax.fori_loop(0, num_tiles, load_tile, jnp.int32(0))

            def drain(_, slot):  # a block may not exit while its cluster peer can still signal it
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
                group, bundle, row, column = position(index)

                def accumulate(acc_ref):
                    def multiply_step(_, slot):
                        plgpu.barrier_wait(full.at[slot])
                        lhs = lhs_smem.at[slot, :, own_rows].T if lhs_is_transposed else lhs_smem.at[slot, own_rows]
                        rhs = rhs_smem.at[slot].T if rhs_is_transposed else rhs_smem.at[slot]
                        plgpu.wgmma(acc_ref, lhs, rhs)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[last_slot(slot)])
                        return next_slot(slot)

                    slot_after = lax.fori_loop(0, num_steps(in_refs, group, bundle), multiply_step, slot)
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
        grid=(num_clusters,),
        grid_names=("first",),
        **cluster.kernel_arguments,
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            segmented((stages, *lhs_shape), dtype),
            segmented((stages, *rhs_shape), dtype),
            segmented((warpgroups, tile.store_slots, WARPGROUP_ROWS, tile.store_columns), out_type.dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            cluster.empty_barriers(stages, arrivals=warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands)
