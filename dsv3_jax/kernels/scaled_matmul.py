"""The persistent, warp-specialised pipeline that all block-scaled FP8 products run on (Pallas Mosaic GPU, Hopper).

One warpgroup copies tiles of both operands and their scales to shared memory and runs ahead across output tiles, so the
next tile's loads happen during the epilogue. Each of the others multiplies 64 rows of the tile, 128 of the contraction
at a time: the tensor cores start from zero, and the partial products are scaled and added to float32 registers. Three
of them, so that two can multiply while one adds up. Or two, with registers for a second partial product each, which the
tensor cores make while the first is added; such tiles read more for each product, and are for sizes that larger ones
leave multiprocessors idle on. A stage is given back before the last addition.

Blocks of a cluster multiply the same rows with neighbouring columns, step by step together: each loads its columns, and
its share of the rows for all of them. So a block may load rows only when all of them have given the stage back, which
their copying warpgroups tell each other. The multiplying ones signal their own block alone: of a warpgroup that signals
others, only the first warp does, and the rest might still read the stage, or miss its next arrival for good.

The scales of a stage are read by ordinary loads and overwritten by TMA without a proxy fence between: the loads have
returned before the stage is given back. The race detector of the interpreter wants the fence (`Tile.fence`); it costs
2% on an H200.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsv3_jax.config import require
from dsv3_jax.fp8.formats import TILE, QuantizedArray
from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.hopper import PRODUCER_REGISTERS, WARPGROUP_ROWS, consumer_registers, segmented

TMA_SCALE_ROW = 32  # float32 numbers in 128 bytes: where a copy to shared memory may begin
WGMMA_DEPTH = 32  # codes of the contraction that one instruction multiplies
TMA_BOX = 256  # elements along a side, at most
WHOLE_ROWS, WHOLE_ROW_BYTES = 8, 128  # TMA reads and writes codes and outputs in such pieces


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one thread block: a rows x columns tile of the output."""

    warpgroups: int = 3  # that multiply
    in_flight: int = 1  # partial products that a warpgroup has at one time, 1 or 2: one is added, the other made
    columns: int = 128  # at most the 128 that share a scale of the weights
    stages: int = 4  # 128-deep steps in shared memory at one time
    store_columns: int = 128  # columns per store to device memory
    store_slots: int = 1  # stores in flight per warpgroup
    raster_rows: int = 8  # row tiles swept together, so that their rows and weights meet in L2
    cluster: int = 1  # thread blocks with neighbouring columns that share each load of the rows
    fence: bool = False  # a proxy fence before a stage is given back
    early_addresses: bool = False  # where a stage lies is computed before it is waited for, not after

    @property
    def rows(self) -> int:
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def cluster_columns(self) -> int:
        return self.columns * self.cluster


def large_tile(out_dtype: Any) -> Tile:
    """Returns the tile of 192 x 128 for an output of this type: the fastest where every multiprocessor has one."""
    pieces = {"store_columns": 32, "store_slots": 2} if jnp.dtype(out_dtype).itemsize == 4 else {}
    return Tile(cluster=2, early_addresses=True, **pieces)


def small_tile(out_dtype: Any) -> Tile:
    """Returns the tile of 128 x 128 for sizes that larger ones leave multiprocessors idle on."""
    return dataclasses.replace(large_tile(out_dtype), warpgroups=2, in_flight=2, stages=5)


class Work(NamedTuple):
    """The output tiles of a cluster: which rows and columns of which group, and which part of the contraction."""

    group: Any
    first_row: Any
    row_end: Any  # rows from here on belong to another tile
    first_column: Any
    first_step: Any
    num_steps: Any


def scaled_matmul(
    a: QuantizedArray,
    b: QuantizedArray,
    tables: tuple[jax.Array, ...] = (),
    *,
    out_type: jax.ShapeDtypeStruct,
    tile: Tile,
    num_work: Callable,
    work_at: Callable,
    with_squares: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Multiplies row-scaled a with the transpose of b, block- or row-scaled, tile by tile.

    Args:
      a: row-quantized [R, K].
      b: [C, K], or block-quantized [E, C, K] with one matrix per group.
      tables: arrays that the callables read.
      out_type: [R, C] or, with one matrix per group, [E, R, C].
      tile: the work of one thread block.
      num_work: references to the tables -> number of pieces of work, each of tile.rows x tile.cluster_columns.
      work_at: (references to the tables, index) -> `Work`.
      with_squares: also add up the squares of the output, where no tile has rows of another.

    Returns:
      the output, and the float32 sum of the squares of all of it or None.

    Raises:
      ValueError: the tile has too few stages, or its cluster does not divide the multiprocessors or its rows.
    """
    whole_shape = out_type.shape
    a, b = with_whole_tiles(a), with_whole_tiles(b)
    out_type = with_whole_rows(out_type)
    columns, stages, warpgroups = tile.columns, tile.stages, tile.warpgroups
    require_possible(tile)
    num_clusters = NUM_SMS // tile.cluster
    is_clustered = tile.cluster > 1
    by_all = {"collective_axes": ("block",)} if is_clustered else {}
    out_columns = out_type.shape[-1]
    is_blockwise = b.tile == "block"
    block_scales = b.scales.shape[-1]
    operands = (a.codes, a.scales, b.codes, b.scales, *tables)
    a_type = segmented((stages, tile.rows, TILE), a.codes.dtype)

    # One function because the two roles share barriers, buffers and the order of tiles.
    def fp8_matmul_kernel(*refs):
        a_ref, a_scales_ref, b_ref, b_scales_ref, *table_refs = refs[: len(operands)]
        out_ref, *squares_ref = refs[len(operands) : -11]
        a_smem, b_smem, a_scales_smem, b_scales_smem, out_smem, squares_smem = refs[-11:-5]
        empty, full_blocks, empty_blocks, full, empty_in_all = refs[-5:]
        warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("first")
        count = lax.div(num_work(table_refs) - first + num_clusters - 1, num_clusters)

        def work(index):
            now = work_at(table_refs, first + jnp.minimum(index, jnp.maximum(count - 1, 0)) * num_clusters)
            if is_clustered:
                now = now._replace(first_column=now.first_column + lax.axis_index("block") * columns)
            return now

        def next_slot(slot):
            return jnp.where(slot == stages - 1, 0, slot + 1)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(index, carry):
                slot, now = carry
                later = work(index + 1)  # read early, so that the loads from the tables are never waited for
                matrix = (now.group,) if b.codes.ndim == 3 else ()
                tile_columns = pl.ds(pl.multiple_of(now.first_column, columns), columns)
                if is_blockwise:
                    parity = lax.rem(index, 2)
                    plgpu.barrier_wait(empty_blocks.at[parity])
                    last_line = b_scales_ref.shape[-2] - 1
                    line = (*matrix, jnp.minimum(lax.div(now.first_column, TILE), last_line))
                    for box in scale_boxes(block_scales):
                        source, target = b_scales_ref.at[(*line, box)], b_scales_smem.at[parity, box]
                        plgpu.copy_gmem_to_smem(source, target, full_blocks.at[parity])

                def load_step(index, slot):
                    plgpu.barrier_wait(empty.at[slot])
                    if is_clustered:
                        plgpu.barrier_arrive(empty_in_all.at[slot])
                    step = now.first_step + index
                    contracted = pl.ds(step * TILE, TILE)
                    arrived = full.at[slot]
                    plgpu.copy_gmem_to_smem(b_ref.at[(*matrix, tile_columns, contracted)], b_smem.at[slot], arrived)
                    if not is_blockwise:
                        plgpu.copy_gmem_to_smem(b_scales_ref.at[step, tile_columns], b_scales_smem.at[slot], arrived)
                    if is_clustered:
                        plgpu.barrier_wait(empty_in_all.at[slot])
                    tile_rows = pl.ds(pl.multiple_of(now.first_row, WARPGROUP_ROWS), tile.rows)
                    plgpu.copy_gmem_to_smem(a_ref.at[tile_rows, contracted], a_smem.at[slot], arrived, **by_all)
                    plgpu.copy_gmem_to_smem(a_scales_ref.at[step, tile_rows], a_scales_smem.at[slot], arrived, **by_all)
                    return next_slot(slot)

                return lax.fori_loop(0, now.num_steps, load_step, slot), later

            slot, _ = lax.fori_loop(0, count, load_tile, (jnp.int32(0), work(0)))

            # Every barrier is left as it was found.
            def drain(_, slot):
                plgpu.barrier_wait(empty.at[slot])
                return next_slot(slot)

            lax.fori_loop(0, stages, drain, slot)
            if is_clustered:  # no block ends while rows or signals are under way between it and another
                plgpu.barrier_arrive(empty_in_all.at[slot])
                plgpu.barrier_wait(empty_in_all.at[slot])
            if is_blockwise:
                for later in range(2):
                    plgpu.barrier_wait(empty_blocks.at[lax.rem(count + later, 2)])

        @pl.when(warpgroup < warpgroups)
        def _consume():
            plgpu.set_max_registers(consumer_registers(warpgroups), action="increase")
            own_first_row = warpgroup * WARPGROUP_ROWS
            own_rows = pl.ds(own_first_row, WARPGROUP_ROWS)
            shape = (WARPGROUP_ROWS, columns)
            partial_type = plgpu.ACC(shape, jnp.float32)
            zero_per_row = plgpu.layout_cast(jnp.zeros(WARPGROUP_ROWS, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_arrive(empty.at[slot])

            if is_blockwise:
                for parity in range(2):
                    plgpu.barrier_arrive(empty_blocks.at[parity])

            def give_back(slot):
                if tile.fence:
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])

            def multiply_tile(index, carry):
                slot, now, squares = carry
                later = work(index + 1)
                parity = lax.rem(index, 2)
                if is_blockwise:
                    plgpu.barrier_wait(full_blocks.at[parity])

                def await_stage(slot):
                    if tile.early_addresses:
                        find_addresses(
                            a_smem.at[slot, own_rows],
                            b_smem.at[slot],
                            a_scales_smem.at[slot, own_rows],
                            transforms=a_type.transforms,
                        )
                    plgpu.barrier_wait(full.at[slot])
                    return plgpu.load(a_scales_smem, (slot, own_rows), layout=plgpu.Layout.WGMMA.reduce(1))

                def start_product(partial_ref, slot):
                    plgpu.wgmma(partial_ref, a_smem.at[slot, own_rows], b_smem.at[slot].T)

                def block_scale(step):
                    return b_scales_smem[parity, now.first_step + step] if is_blockwise else None

                def add(acc, partial, slot, a_scale, b_scale):
                    if is_blockwise:
                        give_back(slot)
                        return acc + partial * lax.broadcast_in_dim(a_scale * b_scale, shape, [0])
                    # Read only now, and a few at a time: 32 more registers would not be there.
                    b_scale = plgpu.load(b_scales_smem, (slot, slice(None)), layout=plgpu.Layout.WGMMA.reduce(0))
                    scale = lax.broadcast_in_dim(a_scale, shape, [0]) * lax.broadcast_in_dim(b_scale, shape, [1])
                    acc = acc + partial * scale
                    give_back(slot)
                    return acc

                def multiply_step(index, carry):
                    slot, acc = carry
                    b_scale, a_scale = block_scale(index), await_stage(slot)

                    def multiply(partial_ref):
                        start_product(partial_ref, slot)
                        return partial_ref[...]

                    partial = pl.run_scoped(multiply, partial_type)
                    return next_slot(slot), add(acc, partial, slot, a_scale, b_scale)

                def multiply_two_steps(index, carry):
                    slot, acc, _ = carry
                    later = next_slot(slot)
                    b_scale, later_b_scale = block_scale(2 * index), block_scale(2 * index + 1)
                    a_scale = await_stage(slot)

                    def multiply(partial_ref):
                        start_product(partial_ref, slot)
                        later_a_scale = await_stage(later)

                        def multiply_later(later_ref):
                            start_product(later_ref, later)
                            partial = plgpu.wgmma_accumulator_load(partial_ref, wait_n=1)
                            return add(acc, partial, slot, a_scale, b_scale), later_ref[...]

                        return *pl.run_scoped(multiply_later, partial_type), later_a_scale

                    acc, partial, later_a_scale = pl.run_scoped(multiply, partial_type)
                    acc = add(acc, partial, later, later_a_scale, later_b_scale)
                    # A later use of zero. Without it the second product takes its register, and ptxas, for which it is
                    # then no constant, clears 64 registers before that product and waits for the first.
                    return next_slot(later), acc, lax.optimization_barrier(zero_per_row)

                def skip_step(_, slot):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(empty.at[slot])
                    return next_slot(slot)

                # A warpgroup whose rows all belong to another tile leaves the tensor cores to the others.
                own_steps = jnp.where(now.first_row + own_first_row < now.row_end, now.num_steps, 0)
                zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                carry, steps_done = (slot, zeros), 0
                if tile.in_flight == 2:
                    pairs = lax.div(own_steps, 2)
                    *carry, _ = lax.fori_loop(0, pairs, multiply_two_steps, (*carry, zero_per_row))
                    steps_done = 2 * pairs
                slot, acc = lax.fori_loop(steps_done, own_steps, multiply_step, tuple(carry))
                slot = lax.fori_loop(own_steps, now.num_steps, skip_step, slot)
                if is_blockwise:
                    plgpu.barrier_arrive(empty_blocks.at[parity])
                store(acc.astype(out_type.dtype), now)
                if with_squares:
                    squares += jnp.sum(jnp.square(acc), axis=1)
                return slot, later, squares

            def store(out_tile, now):
                matrix = (now.group,) if len(out_type.shape) == 3 else ()
                first_row = pl.multiple_of(now.first_row, WARPGROUP_ROWS) + own_first_row
                block_rows = pl.ds(first_row, WARPGROUP_ROWS)
                width = tile.store_columns
                for i, start in enumerate(range(0, columns, width)):
                    first_column = pl.multiple_of(now.first_column, columns) + start
                    block = out_tile[:, start : start + width]

                    @pl.when((first_row < now.row_end) & (first_column < out_columns))
                    def _store(i=i, block=block, first_column=first_column):
                        target = out_ref.at[(*matrix, block_rows, pl.ds(first_column, width))]
                        buffer = out_smem.at[warpgroup, i % tile.store_slots]
                        plgpu.wait_smem_to_gmem(tile.store_slots - 1 if i else 0, wait_read_only=True)
                        buffer[...] = block
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(buffer, target)

            start = (jnp.int32(0), work(0), zero_per_row if with_squares else None)
            *_, squares = lax.fori_loop(0, count, multiply_tile, start)
            if with_squares:
                squares_smem[warpgroup] = squares
                plgpu.commit_smem()
                block = lax.axis_index("block") if is_clustered else 0
                plgpu.copy_smem_to_gmem(squares_smem.at[warpgroup], squares_ref[0].at[first, block, warpgroup])
            plgpu.wait_smem_to_gmem(0)

    b_scales_shape = (2, -(-block_scales // TMA_SCALE_ROW) * TMA_SCALE_ROW) if is_blockwise else (stages, columns)
    squares_type = jax.ShapeDtypeStruct((num_clusters, tile.cluster, warpgroups, WARPGROUP_ROWS), jnp.float32)
    out, *squares = plgpu.kernel(
        fp8_matmul_kernel,
        out_type=(out_type, squares_type) if with_squares else (out_type,),
        grid=(num_clusters,),
        grid_names=("first",),
        cluster=(tile.cluster,) if is_clustered else (),
        cluster_names=("block",) if is_clustered else (),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            a_type,
            segmented((stages, columns, TILE), b.codes.dtype),
            plgpu.SMEM((stages, tile.rows), jnp.float32),
            plgpu.SMEM(b_scales_shape, jnp.float32),
            segmented((warpgroups, tile.store_slots, WARPGROUP_ROWS, tile.store_columns), out_type.dtype),
            plgpu.SMEM((warpgroups, WARPGROUP_ROWS), jnp.float32) if with_squares else None,
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
            plgpu.Barrier(num_barriers=2, num_arrivals=len(scale_boxes(block_scales))),
            plgpu.Barrier(num_barriers=2, num_arrivals=warpgroups),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3 if is_blockwise else 4),
            plgpu.ClusterBarrier(collective_axes=("block",), num_barriers=stages) if is_clustered else None,
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands)
    # Without the barrier XLA runs the kernel twice where a loop also stacks its result for the backward pass. Weight
    # gradients are only stacked: without it the kernel writes them where they belong.
    out = lax.optimization_barrier(out) if is_blockwise else out
    out = out if out.shape == whole_shape else out[tuple(map(slice, whole_shape))]
    return out, jnp.sum(squares[0]) if squares else None


def find_addresses(a_smem: Any, b_smem: Any, a_scales_smem: Any, *, transforms: tuple) -> None:
    """Has the addresses of a product's operands computed here, those of codes in the form that wgmma takes.

    Nothing uses them here. The product finds its own, which the compiler sees to be the same; but what follows a wait
    it computes after it, and these are a chain of five instructions.

    Args:
      a_smem: codes of 64 rows, 128 deep.
      b_smem: codes of the columns.
      a_scales_smem: of the rows.
      transforms: of the declaration of the codes.
    """
    codes, scales = plgpu.RefType(transforms), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(codes, codes, scales))
    def find(_, a_smem, b_smem, a_scales_smem):
        found = [utils.memref_ptr(a_scales_smem)]
        depth = arith.constant(ir.IntegerType.get_signless(64), WGMMA_DEPTH // 16)  # in units of 16 bytes
        for codes in (a_smem, b_smem):
            found.append(mma_utils.encode_descriptor(codes, 0, 8 * TILE, TILE))
            for _ in range(TILE // WGMMA_DEPTH - 1):
                found.append(arith.addi(found[-1], depth))
        constraints = ",".join("l" * len(found))
        llvm.inline_asm(ir.Type.parse("!llvm.void"), found, "", constraints, has_side_effects=True)

    find(a_smem, b_smem, a_scales_smem)


def require_possible(tile: Tile) -> None:
    """Raises a ValueError for a tile that idles multiprocessors, that TMA cannot share, or that waits for ever."""
    require(tile.in_flight in (1, 2), "tile.in_flight", tile.in_flight, "must be 1 or 2")
    fix = f"must be at least tile.in_flight={tile.in_flight}: a product is begun before the stage of the last is free"
    require(tile.stages >= tile.in_flight, "tile.stages", tile.stages, fix)
    require(NUM_SMS % tile.cluster == 0, "tile.cluster", tile.cluster, f"must divide {NUM_SMS} multiprocessors")
    share_is_whole = tile.rows % (TMA_SCALE_ROW * tile.cluster) == 0
    fix = f"must divide the {tile.rows} rows of a tile into multiples of {TMA_SCALE_ROW}"
    require(share_is_whole, "tile.cluster", tile.cluster, fix)


def with_whole_tiles(quantized: QuantizedArray) -> QuantizedArray:
    """Pads with zeros to what TMA reads. Of the published network only the gradients of 576 latent channels need it."""
    rows, contraction = quantized.codes.shape[-2:]
    more_rows, more_contraction = -rows % WHOLE_ROWS, -contraction % WHOLE_ROW_BYTES
    if not more_rows and not more_contraction:
        return quantized
    leading = ((0, 0),) * (quantized.codes.ndim - 2)
    codes = jnp.pad(quantized.codes, (*leading, (0, more_rows), (0, more_contraction)))
    scales = quantized.scales
    if quantized.tile == "row":
        scales = jnp.pad(scales, (*leading, (0, 0), (0, more_rows)))
    return dataclasses.replace(quantized, codes=codes, scales=scales)


def with_whole_rows(out_type: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the type of an output that TMA can write and that holds one of the given type."""
    *leading, rows, columns = out_type.shape
    columns_multiple = WHOLE_ROW_BYTES // out_type.dtype.itemsize
    rows, columns = rows + -rows % WHOLE_ROWS, columns + -columns % columns_multiple
    return jax.ShapeDtypeStruct((*leading, rows, columns), out_type.dtype)


def scale_boxes(num_scales: int) -> list[pl.Slice]:
    """Returns the boxes in which TMA copies a line of scales."""
    return [pl.ds(start, min(TMA_BOX, num_scales - start)) for start in range(0, num_scales, TMA_BOX)]
