"""RMSNorm and the quantization of its result for Hopper GPUs: rows are read once.

A thread block keeps a few whole rows in shared memory, sums their squares, and then normalises and quantizes them 256
columns at a time. Its two warpgroups take half of the columns each, so that every SM has the warps to compute one block
while it loads others.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8.formats import E4M3, TILE, QuantizedArray
from dsv3_jax.kernels.block_quantize import tiles

WARPGROUPS = 2
ROWS, STEP = 4, 2  # rows of a thread block; tiles of 1x128 of each that a warpgroup takes at a time

# Sixteen lanes hold a tile, 4 neighbours of each of its halves: 16 bytes of the float32 weight, what a lane can load.
_LAYOUT = fragmented_array.TiledLayout(
    fragmented_array.Tiling(((ROWS, STEP, TILE), (STEP, TILE // 2), (4,))), (-6,), (-3, -2), vector_dim=-1
)
LAYOUT = plgpu.Layout.TILED(_LAYOUT.tiling, _LAYOUT.warp_dims, _LAYOUT.lane_dims, _LAYOUT.vector_dim)


def rms_norm_rows(x_RD: jax.Array, weight_D: jax.Array, eps: float) -> QuantizedArray:
    """Normalises rows and quantizes them in 1x128 tiles."""
    num_rows, width = x_RD.shape
    blocks, steps = width // TILE, width // (STEP * TILE)
    warpgroups = 1 if steps % WARPGROUPS else WARPGROUPS
    shape = (ROWS, STEP, TILE)

    def rms_norm_rows(x, weight, codes, scales, x_smem, sums_smem, is_full, is_summed):
        i, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
        own_rows = pl.ds(i * ROWS, ROWS)

        def load():
            plgpu.copy_gmem_to_smem(x.at[own_rows], x_smem, is_full)

        if warpgroups > 1:
            pl.when(warpgroup == 0)(load)
        else:
            load()
        plgpu.barrier_wait(is_full)

        def own_step(number):
            return pl.ds((warpgroup * (steps // warpgroups) + number) * STEP, STEP)

        def read(number):
            return plgpu.layout_cast(x_smem[:, own_step(number)], LAYOUT).astype(jnp.float32)

        def add_squares(number, squares):
            return squares + jnp.square(read(number))

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)
        squares = lax.fori_loop(0, steps // warpgroups, add_squares, zeros)
        sums_smem[warpgroup] = squares.sum(axis=2).sum(axis=1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(is_summed)
        plgpu.barrier_wait(is_summed)
        total = sum(plgpu.layout_cast(sums_smem[w], LAYOUT.reduce((1, 2))) for w in range(warpgroups))
        inverse_rms = lax.broadcast_in_dim(lax.rsqrt(total * (1 / width) + eps), shape, [0])

        def quantize_step(number, _):
            where = own_step(number)
            step_weight = plgpu.load(weight, (where, slice(None)), layout=LAYOUT.reduce(0), optimized=False)
            values = read(number) * inverse_rms * lax.broadcast_in_dim(step_weight, shape, [1, 2])
            step_codes, step_scales = tiles.quantize(values, LAYOUT)
            codes.at[own_rows, where][...] = step_codes
            scales.at[where, own_rows].T[...] = plgpu.layout_cast(step_scales, LAYOUT.reduce(2))
            return 0

        lax.fori_loop(0, steps // warpgroups, quantize_step, 0)

    codes, scales = plgpu.kernel(
        rms_norm_rows,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, blocks, TILE), E4M3),
            jax.ShapeDtypeStruct((blocks, num_rows), jnp.float32),
        ),
        grid=(num_rows // ROWS,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((ROWS, blocks, TILE), x_RD.dtype),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=warpgroups),
        ),
        compiler_params=tiles.COMPILER_PARAMS,
    )(x_RD.reshape(num_rows, blocks, TILE), weight_D.astype(jnp.float32).reshape(blocks, TILE))
    # Without the barrier XLA runs the kernel twice where a loop also stacks its results for the backward pass.
    codes, scales = lax.optimization_barrier((codes, scales))
    return QuantizedArray(codes.reshape(num_rows, width), scales, "row")
