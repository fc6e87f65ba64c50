"""What the Hopper quantizers share: one pass over tensors tile by tile, register layouts, the scale of a row.

A thread block copies one tile of each operand to shared memory, quantizes it in chunks of 64 rows by 128 and copies
codes and scales out. Several blocks share an SM and hide each other's latency, so a block needs no pipeline of its own.
TMA reads zeros outside a tensor and does not write there: partial tiles need no masks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import E4M3, TILE, QuantizedArray
from dsv3_jax.kernels.block_quantize import instructions
from dsv3_jax.kernels.hopper import segmented

ROW_MULTIPLE = 16  # of the rows of every tensor
SEGMENT = 64  # columns that lie together in shared memory; the columns of every operand are a multiple
NARROW_SEGMENT = 16  # of codes whose columns are not
CHUNK = 64  # rows that a warpgroup quantizes at a time: 64 values per thread

LARGEST_MULTIPLIER = 2.0**126  # of a value to be quantized

# Eight lanes share a row and hold 8 neighbours of each of its halves: 16-byte loads, 3 shuffles for a maximum.
_ROWS = fragmented_array.TiledLayout(
    fragmented_array.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
ROWS = plgpu.Layout.TILED(_ROWS.tiling, _ROWS.warp_dims, _ROWS.lane_dims, _ROWS.vector_dim)
COLUMNS = plgpu.Layout.WGMMA  # two shuffles for a maximum; what a transposed load can be turned into

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
)

# Where a thread reads no shared memory that it writes: each result has the barrier after the wait for its slot, and
# that between its stores and its copy. Pallas's own are two more per store.
WITHOUT_BARRIERS = dataclasses.replace(COMPILER_PARAMS, unsafe_no_auto_barriers=True)


class Operand(NamedTuple):
    """A tensor [R, K] of which a thread block reads a tile."""

    tensor: jax.Array | QuantizedArray
    first_tile: int = 0  # along K


class Result(NamedTuple):
    """What a thread block writes of an output: a tile of codes, the transpose of one, or the sums of a tile's rows."""

    output: int  # which of the outputs
    first_tile: int = 0  # along the columns of the operands
    is_transposed: bool = False
    is_sum: bool = False


class Scaled(NamedTuple):
    """Values of a result times a factor per row, which is left to the multiplication with the scale's inverse."""

    values: jax.Array  # float32 [chunk, 128]
    factors: jax.Array  # float32 [chunk]


class Factors(NamedTuple):
    """One float32 per row of a tile, in shared memory."""

    values: Any
    row_layout: Any  # in registers, of the tile

    def rows(self, chunk) -> jax.Array:
        """Returns those of a chunk of rows, spread over its columns."""
        factors = self.of_rows(chunk)
        return lax.broadcast_in_dim(factors, (*factors.shape, TILE), [0])

    def of_rows(self, chunk) -> jax.Array:
        """Returns those of a chunk of rows, float32 [64], or all of fewer."""
        rows = min(CHUNK, self.values.shape[0])
        return plgpu.layout_cast(self.values[pl.ds(chunk * rows, rows)], self.row_layout.reduce(1))

    def columns(self, _) -> jax.Array:
        """Returns those of a tile of 128 rows, spread over 64 of its columns, transposed."""
        factors = plgpu.layout_cast(self.values[...], COLUMNS.reduce(0))
        return lax.broadcast_in_dim(factors, (CHUNK, TILE), [1])


class Block(NamedTuple):
    """The tile of an operand in shared memory."""

    values: Any
    scales: Factors | None  # of codes
    row_layout: Any  # in registers

    def rows(self, chunk) -> jax.Array:
        """Returns a chunk of the tile's rows, float32 [64, 128], or all of fewer."""
        values = self.unscaled_rows(chunk)
        return values if self.scales is None else values * self.scales.rows(chunk)

    def unscaled_rows(self, chunk) -> jax.Array:
        """Returns what `rows` multiplies with the scales."""
        rows = min(CHUNK, self.values.shape[0])
        values = plgpu.layout_cast(self.values[pl.ds(chunk * rows, rows)], self.row_layout)
        return _to_float32(values, self.row_layout)

    def columns(self, chunk) -> jax.Array:
        """Returns 64 columns of a tile of 128 rows, transposed: float32 [64, 128]."""
        own = self.values.at[:, pl.ds(chunk * CHUNK, CHUNK)]
        values = plgpu.layout_cast(own.T[...], plgpu.Layout.WGMMA_TRANSPOSED)
        if values.dtype == E4M3:
            values = values.astype(jnp.float16)  # exact, and pairs of 16 bits change lanes in one shuffle
        values = _to_float32(plgpu.layout_cast(values, COLUMNS), COLUMNS)
        return values if self.scales is None else values * self.scales.columns(chunk)


def for_each_tile(
    chunk_values: Callable[..., Iterator[jax.Array | Scaled]],
    operands: list[Operand],
    results: list[Result],
    *,
    output_shapes: list[tuple[int, int]],
    extent: tuple[int, int],
    tile_rows: int,
    name: str,
    factors: tuple[jax.Array, ...] = (),
    has_one_slot: bool = False,
) -> list[QuantizedArray | jax.Array]:
    """Quantizes what is computed of each tile.

    Args:
      chunk_values: (chunk, *blocks of the operands, *factors) -> iterator over the float32 values of each result:
        [chunk, 128], scaled or not; of sums [chunk].
      operands: what a thread block reads.
      results: what it writes, in the order of the values.
      output_shapes: [R, K] of each output: of the quantized array, or of what is summed over each tile of K.
      extent: rows, and tiles along columns, of what the grid of thread blocks covers.
      tile_rows: 32, 64 or 128; 128 where columns are quantized.
      name: what profiles call the kernel.
      factors: float32 [R], one per row of the operands.
      has_one_slot: shared memory holds one result at a time, instead of one of each.

    Returns:
      the outputs: quantized arrays, and sums as float32 [ceil(K/128), R].
    """
    chunk_rows = min(CHUNK, tile_rows)
    chunks = tile_rows // chunk_rows
    # A copy cannot end within a segment. Narrow ones are for what is transposed: there, rows are read like columns.
    is_segmented = all(contraction % SEGMENT == 0 for _, contraction in output_shapes)
    arrays, types, transfers = _in_shared_memory(operands, factors, tile_rows)
    slots = 1 if has_one_slot else len(results)
    num_vectors = types.count(None)
    are_sums = [any(result.is_sum for result in results if result.output == o) for o in range(len(output_shapes))]

    # One function because what is computed and what is stored share slots and the order of copies.
    def kernel(*refs):
        inputs, refs = refs[: len(arrays)], refs[len(arrays) :]
        outputs, refs = _by_output(refs[: len(out_types)], are_sums), refs[len(out_types) :]
        *tiles, codes_smem, vectors_smem, is_full = refs
        tiles, vectors = iter(tiles), iter(range(num_vectors))
        copies = [vectors_smem.at[next(vectors)] if type_ is None else next(tiles) for type_ in types]
        i, j = lax.axis_index("row"), lax.axis_index("column")
        layout = ROWS if is_segmented else COLUMNS

        def store(number, chunk, values):
            slot = number % slots
            own_codes, own_scales = codes_smem.at[slot], vectors_smem.at[num_vectors + slot, pl.ds(0, chunk_rows)]
            output, first_tile, is_transposed, is_sum = results[number]
            codes, scales = (None, values) if is_sum else quantize(values, COLUMNS if is_transposed else layout)
            if number >= slots or chunks > 1:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            if codes is not None:
                own_codes[...] = codes
            own_scales[...] = scales
            plgpu.commit_smem()
            along_rows, along_columns = i, j + first_tile
            if is_transposed:
                row, tile = along_columns * TILE + chunk * chunk_rows, along_rows
            else:
                row, tile = along_rows * tile_rows + chunk * chunk_rows, along_columns
            rows, num_rows = pl.ds(row, chunk_rows), output_shapes[output][0]

            def copy_out():
                codes, scales = outputs[output]
                if codes is not None:
                    plgpu.copy_smem_to_gmem(own_codes, codes.at[rows, pl.ds(tile * TILE, TILE)], commit_group=False)
                copy_scales(own_scales, scales.at[tile], row, num_rows)

            if chunks > 1 and 0 < num_rows % TILE <= chunk_rows:
                pl.when(row < num_rows)(copy_out)
            else:
                copy_out()
            plgpu.commit_smem_to_gmem_group()

        for source, copy, index_of in zip(inputs, copies, transfers):
            plgpu.copy_gmem_to_smem(source.at[index_of(i, j)], copy, is_full)
        plgpu.barrier_wait(is_full)
        copies = iter(copies)
        blocks = []
        for tensor, _ in operands:
            values = next(copies)
            scales = Factors(next(copies), layout) if isinstance(tensor, QuantizedArray) else None
            blocks.append(Block(values, scales, layout))
        blocks += [Factors(values, layout) for values in copies]

        # A loop: the instructions of both chunks would not fit into the cache of instructions.
        @pl.loop(0, chunks)
        def _quantize_chunk(chunk):
            for number, values in enumerate(chunk_values(chunk, *blocks)):
                store(number, chunk, values)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel.__name__ = name
    out_types = []
    for (rows, contraction), is_sum in zip(output_shapes, are_sums):
        if not is_sum:
            out_types.append(jax.ShapeDtypeStruct((rows, contraction), E4M3))
        out_types.append(jax.ShapeDtypeStruct((formats.num_tiles(contraction), rows), jnp.float32))
    outputs = plgpu.kernel(
        kernel,
        out_type=tuple(out_types),
        grid=(pl.cdiv(extent[0], tile_rows), extent[1]),
        grid_names=("row", "column"),
        scratch_types=(
            *(type_ for type_ in types if type_ is not None),
            segmented((slots, chunk_rows, TILE), E4M3, also_dividing=SEGMENT if is_segmented else NARROW_SEGMENT),
            plgpu.SMEM((num_vectors + slots, tile_rows), jnp.float32),  # one array: each is rounded up to 1 KiB
            plgpu.Barrier(num_arrivals=len(arrays)),
        ),
        compiler_params=WITHOUT_BARRIERS,
    )(*arrays)
    # Without the barrier XLA runs the kernel twice where a loop also stacks its results for the backward pass.
    outputs = _by_output(lax.optimization_barrier(outputs), are_sums)
    return [scales if codes is None else QuantizedArray(codes, scales, "row") for codes, scales in outputs]


def _by_output(arrays: Sequence[Any], are_sums: list[bool]) -> list[tuple[Any | None, Any]]:
    """Returns codes and scales of every output, of sums None and the sums."""
    arrays = iter(arrays)
    return [(None if is_sum else next(arrays), next(arrays)) for is_sum in are_sums]


def _in_shared_memory(
    operands: list[Operand], factors: tuple[jax.Array, ...], tile_rows: int
) -> tuple[list, list, list]:
    """Returns all arrays that are read, the blocks that hold their tiles or None of vectors, and (i, j) -> index."""
    arrays, types, transfers = [], [], []
    for tensor, first_tile in operands:
        is_quantized = isinstance(tensor, QuantizedArray)
        array = tensor.codes if is_quantized else tensor
        arrays.append(array)
        types.append(segmented((tile_rows, TILE), array.dtype, also_dividing=SEGMENT))
        transfers.append(
            lambda i, j, first=first_tile: (pl.ds(i * tile_rows, tile_rows), pl.ds((j + first) * TILE, TILE))
        )
        if is_quantized:
            arrays.append(tensor.scales)
            types.append(None)
            transfers.append(lambda i, j, first=first_tile: (j + first, pl.ds(i * tile_rows, tile_rows)))
    for array in factors:
        arrays.append(array)
        types.append(None)
        transfers.append(lambda i, _: pl.ds(i * tile_rows, tile_rows))
    return arrays, types, transfers


def copy_scales(own: Any, scales: Any, row: Any, num_rows: int) -> None:
    """Copies scales of rows from `row` on out of shared memory, those of rows that exist; commits nothing."""
    (count,) = own.shape
    if num_rows % count == 0:
        plgpu.copy_smem_to_gmem(own, scales.at[pl.ds(row, count)], commit_group=False)
        return
    for first in range(0, count, ROW_MULTIPLE):  # a contiguous copy would run into the next tile

        @pl.when(row + first < num_rows)
        def _copy(first=first):
            piece, rows = own.at[pl.ds(first, ROW_MULTIPLE)], pl.ds(row + first, ROW_MULTIPLE)
            plgpu.copy_smem_to_gmem(piece, scales.at[rows], commit_group=False)


def _to_float32(values: jax.Array, layout: plgpu.Layout) -> jax.Array:
    return instructions.widen(values, layout) if values.dtype == jnp.bfloat16 else values.astype(jnp.float32)


def quantize(values: jax.Array | Scaled, layout: plgpu.Layout) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of float32 values in registers, and the scale of each of their rows."""
    if isinstance(values, Scaled):
        return _quantize_scaled(*values, layout)
    scales, inverses = row_scales(values, layout)
    return (values * inverses).astype(E4M3), scales


def row_scales(values: jax.Array, layout: plgpu.Layout, **limits: float) -> tuple[jax.Array, jax.Array]:
    """Returns the scale of each row of float32 values, and its inverse spread over the row.

    Args:
      values: in registers.
      layout: of the values.
      limits: those of the number format, see `formats.power_of_two_scales`; none are E4M3's.
    """
    scales, inverses = formats.power_of_two_scales(instructions.largest_magnitudes(values, layout), **limits)
    return scales, lax.broadcast_in_dim(inverses, values.shape, range(values.ndim - 1))


def _quantize_scaled(values: jax.Array, factors: jax.Array, layout: plgpu.Layout) -> tuple[jax.Array, jax.Array]:
    amax = instructions.largest_magnitudes(values, layout) * jnp.abs(factors)
    scales, inverses = formats.power_of_two_scales(jnp.where(amax >= 0, amax, 0.0))  # NaN is left out
    # Finite: zero stays zero.
    multipliers = jnp.clip(factors * inverses, -LARGEST_MULTIPLIER, LARGEST_MULTIPLIER)
    return (values * lax.broadcast_in_dim(multipliers, values.shape, [0])).astype(E4M3), scales
