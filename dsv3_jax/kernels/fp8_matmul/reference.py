"""The FP8 product in plain JAX: the oracle of the kernels and the CPU path."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import TILE, QuantizedArray, num_tiles


@functools.partial(jax.jit, static_argnames="out_dtype")
def fp8_matmul(a: QuantizedArray, b: QuantizedArray, *, out_dtype: Any) -> jax.Array:
    """Multiplies [R, K] with [C, K] along K, one tile of 128 at a time; see the op's own function.

    Codes are multiplied as float32, exactly on every device; sums of 128 such products are then scaled and added in
    float32, as the Hopper kernel does. (As bfloat16, some would become products that XLA's CPU runtime lacks.)
    """
    contraction = a.codes.shape[-1]
    steps = num_tiles(contraction)
    scales_b_kC = _column_scales(b, steps)

    def add_tile(y_RC, tile):
        codes_a_RI, codes_b_CI, scales_a_R, scales_b_C = tile
        partial_RC = jax.lax.dot_general(
            codes_a_RI.astype(jnp.float32), codes_b_CI.astype(jnp.float32), (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return y_RC + partial_RC * (scales_a_R[:, None] * scales_b_C), None

    tiles = (_tiles_first(a.codes), _tiles_first(b.codes), a.scales, scales_b_kC)
    y_RC = jnp.zeros((a.codes.shape[0], b.codes.shape[0]), jnp.float32)
    return jax.lax.scan(add_tile, y_RC, tiles)[0].astype(out_dtype)


def _tiles_first(codes_RK: jax.Array) -> jax.Array:
    """Returns codes as [ceil(K/128), R, 128], the last tile filled up with zeros."""
    rows, contraction = codes_RK.shape
    steps = num_tiles(contraction)
    padded = jnp.pad(codes_RK, ((0, 0), (0, steps * TILE - contraction)))
    return jnp.swapaxes(padded.reshape(rows, steps, TILE), 0, 1)


def _column_scales(b: QuantizedArray, steps: int) -> jax.Array:
    """Returns the scale of every column of the product per tile of the contraction, [ceil(K/128), C]."""
    if b.tile == "row":
        return b.scales
    return jnp.repeat(b.scales[:, :steps].T, TILE, axis=1)[:, : b.codes.shape[0]]
