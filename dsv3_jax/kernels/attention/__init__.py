"""Causal softmax attention with key and value heads of different width: the core of expanded MLA."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import device
from dsv3_jax.kernels.attention import cudnn, reference

IMPLEMENTATIONS = ("reference", "pallas_gpu", "cudnn")
LENGTH_MULTIPLE, WIDTH_MULTIPLE = 128, 64  # tiles of the Hopper kernel


def causal_attention(
    q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, *, scale: float, implementation: str | None = None
) -> jax.Array:
    """Computes softmax(scale · q kᵀ + causal mask) v per head.

    Args:
      q_BTNX, k_BTNX: queries and keys, any float dtype.
      v_BTNU: values, same dtype; U may differ from X.
      scale: factor on the scores.
      implementation: "pallas_gpu" (Hopper; 16-bit floats, T a multiple of 128, X and U multiples of 64, U <= X <= 192,
        U <= 128), "cudnn" (any NVIDIA GPU; 16-bit floats) or "reference". None picks pallas_gpu on a Hopper GPU for
        operands it supports, else the reference; a named one runs or raises.

    Returns:
      [B, T, N, U] in the dtype of q; scores and softmax are float32.

    Raises:
      ValueError: an unknown implementation, or operands that the named one does not support.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: choose one of {IMPLEMENTATIONS} or None")
    problem = _unsupported(q_BTNX, v_BTNU)
    if implementation is None:
        implementation = "pallas_gpu" if device.is_hopper() and problem is None else "reference"
    if implementation == "reference":
        return reference.causal_attention(q_BTNX, k_BTNX, v_BTNU, scale=scale)
    if implementation == "cudnn":
        return cudnn.causal_attention(q_BTNX, k_BTNX, v_BTNU, scale=scale)
    if problem is not None:
        raise ValueError(f"implementation='pallas_gpu' cannot run {problem}; use implementation='reference'")
    from dsv3_jax.kernels.attention import pallas_gpu  # loads Mosaic: seconds that a CPU process can save

    return pallas_gpu.causal_attention(q_BTNX, k_BTNX, v_BTNU, scale)


def _unsupported(q_BTNX: jax.Array, v_BTNU: jax.Array) -> str | None:
    """Names what about these operands the Hopper kernel cannot run, or returns None."""
    length, width, value_width = q_BTNX.shape[1], q_BTNX.shape[-1], v_BTNU.shape[-1]
    if q_BTNX.dtype not in (jnp.bfloat16, jnp.float16) or v_BTNU.dtype != q_BTNX.dtype:
        return f"q {q_BTNX.dtype} with v {v_BTNU.dtype}: only one 16-bit float type for all"
    if length % LENGTH_MULTIPLE or not length:
        return f"T={length}: must be a multiple of {LENGTH_MULTIPLE}"
    if width % WIDTH_MULTIPLE or value_width % WIDTH_MULTIPLE:
        return f"X={width}, U={value_width}: both must be multiples of {WIDTH_MULTIPLE}"
    if not 0 < value_width <= width <= 192 or value_width > 128:
        return f"X={width}, U={value_width}: needs U <= X <= 192 and U <= 128, or the registers do not hold them"
    return None
