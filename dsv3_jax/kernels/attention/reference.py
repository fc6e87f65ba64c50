"""Causal attention in plain JAX: the oracle of the kernels and the CPU path.

Queries are taken in at most 8 blocks, and a block's scores reach only as far as its last key: little more than half the
products of the full square, and an eighth of its scores in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SMALLEST_BLOCK = 128  # queries
LARGEST_NUMBER_OF_BLOCKS = 8


def causal_attention(q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, *, scale: float) -> jax.Array:
    """Computes causal attention block of queries by block; [B, T, N, U] in q's dtype."""
    length = q_BTNX.shape[1]
    block = max(SMALLEST_BLOCK, -(-length // LARGEST_NUMBER_OF_BLOCKS))
    blocks = [
        _attend(q_BTNX[:, start:end], k_BTNX[:, :end], v_BTNU[:, :end], start, scale)
        for start in range(0, length, block)
        for end in [min(start + block, length)]
    ]
    return checkpoint_name(jnp.concatenate(blocks, axis=1), "attention_out")


def _attend(q_BTNX, k_BSNX, v_BSNU, first_position: int, scale: float):
    precision = jax.lax.Precision.HIGHEST if q_BTNX.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores_BNTS = einsum("BTNX,BSNX->BNTS", q_BTNX, k_BSNX) * scale
    query_positions = first_position + jnp.arange(q_BTNX.shape[1])
    is_visible_TS = jnp.arange(k_BSNX.shape[1]) <= query_positions[:, None]
    weights_BNTS = jax.nn.softmax(jnp.where(is_visible_TS, scores_BNTS, -jnp.inf), axis=-1)
    return einsum("BNTS,BSNU->BTNU", weights_BNTS.astype(q_BTNX.dtype), v_BSNU).astype(q_BTNX.dtype)
