"""Causal softmax attention with key and value heads of different width: the core of expanded MLA."""

import jax

from dsv3_jax.kernels.attention import reference

IMPLEMENTATIONS = ("reference",)


def causal_attention(
    q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, *, scale: float, implementation: str | None = None
) -> jax.Array:
    """Computes softmax(scale · q kᵀ + causal mask) v per head.

    Args:
      q_BTNX, k_BTNX: queries and keys, any float dtype.
      v_BTNU: values, same dtype; U may differ from X.
      scale: factor on the scores.
      implementation: None picks the fastest that the device supports; a named one runs or raises.

    Returns:
      [B, T, N, U] in the dtype of q; scores and softmax are float32.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: choose one of {IMPLEMENTATIONS} or None")
    return reference.causal_attention(q_BTNX, k_BTNX, v_BTNU, scale=scale)
