"""Grouped matmul in plain JAX: the oracle of the kernels and the CPU path.

Walks the live blocks of `alignment` rows, one dense product each, so the work follows the tokens, never the number of
groups (`jax.lax.ragged_dot` multiplies every row with every group on CPU and GPU).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

LARGEST_BLOCK = 256  # a block of rows and its product stay in a core's L2 cache


def row_alignment(num_rows: int, num_groups: int) -> int:
    """Returns the rows of a block: a quarter of a group's mean, for little padding, but up to 8 the whole mean, since
    reading a group's matrix then costs more than multiplying with it."""
    mean = max(1, num_rows // num_groups)
    return min(LARGEST_BLOCK, 1 << (max(mean // 4, min(mean, 8)) - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_MK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, alignment: int) -> jax.Array:
    """Multiplies each live block of rows with its group's matrix; [M, N] in x's dtype."""
    group_of_block, num_live_blocks = live_blocks(group_sizes_E, alignment, x_MK.shape[0] // alignment)

    def multiply_block(block, y_MN):
        x_bK = _rows(x_MK, block, alignment)
        y_bN = _product(x_bK, w_EKN[group_of_block[block]], 1, 0)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_bN.astype(y_MN.dtype), block * alignment, 0)

    y_MN = jnp.zeros((x_MK.shape[0], w_EKN.shape[2]), x_MK.dtype)
    return jax.lax.fori_loop(0, num_live_blocks, multiply_block, y_MN)


def _forward(x_MK, w_EKN, group_sizes_E, alignment):
    return grouped_matmul(x_MK, w_EKN, group_sizes_E, alignment), (x_MK, w_EKN, group_sizes_E)


def _backward(alignment, residuals, dy_MN):
    x_MK, w_EKN, group_sizes_E = residuals
    return *gradients(x_MK, w_EKN, group_sizes_E, dy_MN, alignment, w_EKN.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def gradients(
    x_MK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, dy_MN: jax.Array, alignment: int, weight_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of rows, in their dtype, and matrices, from that of the product."""
    group_of_block, num_live_blocks = live_blocks(group_sizes_E, alignment, x_MK.shape[0] // alignment)

    def differentiate_block(block, gradients):
        dx_MK, dw_EKN = gradients
        group = group_of_block[block]
        dy_bN = _rows(dy_MN, block, alignment)
        x_bK = _rows(x_MK, block, alignment)
        dx_bK = _product(dy_bN, w_EKN[group], 1, 1)
        dw_KN = _product(x_bK, dy_bN, 0, 0)
        dx_MK = jax.lax.dynamic_update_slice_in_dim(dx_MK, dx_bK.astype(dx_MK.dtype), block * alignment, 0)
        return dx_MK, dw_EKN.at[group].add(dw_KN)

    start = (jnp.zeros_like(x_MK), jnp.zeros(w_EKN.shape, jnp.float32))
    dx_MK, dw_EKN = jax.lax.fori_loop(0, num_live_blocks, differentiate_block, start)
    return dx_MK, dw_EKN.astype(weight_dtype)


def live_blocks(group_sizes_E: jax.Array, alignment: int, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Returns the group of every block and the number of blocks that hold rows."""
    last_block_E = jnp.cumsum(-(-group_sizes_E // alignment))
    group_of_block = jnp.searchsorted(last_block_E, jnp.arange(num_blocks), side="right", method="compare_all")
    return jnp.minimum(group_of_block, group_sizes_E.shape[0] - 1), last_block_E[-1]


def _product(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Contracts two matrices in a's dtype with float32 accumulation; float32 products stay float32 on every device."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contraction = (((a_dim,), (b_dim,)), ((), ()))
    b = b.astype(a.dtype)
    return jax.lax.dot_general(a, b, contraction, precision=precision, preferred_element_type=jnp.float32)


def _rows(x: jax.Array, block: jax.Array, alignment: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block * alignment, alignment, 0)
