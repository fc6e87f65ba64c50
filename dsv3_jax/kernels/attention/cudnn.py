"""Causal attention through cuDNN's fused kernel, which wants values as wide as keys: they are padded with zeros."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def causal_attention(q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, *, scale: float) -> jax.Array:
    """Computes causal attention on an NVIDIA GPU; [B, T, N, U] in q's dtype.

    Raises:
      ValueError: 32-bit operands, which cuDNN's kernel does not take.
    """
    width, value_width = q_BTNX.shape[-1], v_BTNU.shape[-1]
    if q_BTNX.dtype not in (jnp.bfloat16, jnp.float16) or value_width > width:
        raise ValueError(
            f"implementation='cudnn' cannot run q {q_BTNX.dtype} {q_BTNX.shape}, v {v_BTNU.shape}: needs a 16-bit "
            "float type and values at most as wide as keys; use implementation='reference'"
        )
    padding = [(0, 0)] * 3 + [(0, width - value_width)]
    out_BTNX = jax.nn.dot_product_attention(
        q_BTNX, k_BTNX, jnp.pad(v_BTNU, padding), scale=scale, is_causal=True, implementation="cudnn"
    )
    return checkpoint_name(out_BTNX[..., :value_width], "attention_out")
