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


def causal_attention(
    q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, first_key_BT: jax.Array | None = None, *, scale: float
) -> jax.Array:
    """Computes causal attention block of queries by block; [B, T, N, U] in q's dtype."""
    length = q_BTNX.shape[1]
    block = max(SMALLEST_BLOCK, -(-length // LARGEST_NUMBER_OF_BLOCKS))
    starts = range(0, length, block)
    operands = (q_BTNX, k_BTNX, v_BTNU, first_key_BT)
    blocks = [_attend(*operands, start, min(start + block, length), scale) for start in starts]
    return checkpoint_name(jnp.concatenate(blocks, axis=1), "attention_out")


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5, 6))
def _attend(q_BTNX, k_BTNX, v_BTNU, first_key_BT, start: int, end: int, scale: float):
    """Attends from queries start to end; the backward pass keeps only whole inputs and computes the scores again."""
    q_BTNX, k_BSNX, v_BSNU = q_BTNX[:, start:end], k_BTNX[:, :end], v_BTNU[:, :end]
    precision = jax.lax.Precision.HIGHEST if q_BTNX.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores_BNTS = einsum("BTNX,BSNX->BNTS", q_BTNX, k_BSNX) * scale
    is_visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]  # [T, S], with first keys [B, 1, T, S]
    if first_key_BT is not None:
        is_visible &= jnp.arange(end) >= first_key_BT[:, None, start:end, None]
    weights_BNTS = jax.nn.softmax(jnp.where(is_visible, scores_BNTS, -jnp.inf), axis=-1)
    return einsum("BNTS,BSNU->BTNU", weights_BNTS.astype(q_BTNX.dtype), v_BSNU).astype(q_BTNX.dtype)
