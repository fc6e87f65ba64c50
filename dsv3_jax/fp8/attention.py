"""Causal attention and the linear after it, which share one kept array.

The attention output is the linear's input and what attention's own gradient needs. It is kept once, in the linear's
format: 12-bit E5M6 in the report (§3.3.3), decoded for attention.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.fp8.formats import E5M6Array, decode_e5m6, dequantize
from dsv3_jax.fp8.linear import KeptInput, for_backward, input_columns, pad_rows, quantize_and_keep, weight_gradient
from dsv3_jax.fp8.weight import Fp8Weight
from dsv3_jax.kernels.attention import attend, attention_gradients
from dsv3_jax.kernels.block_quantize import quantize_rows_and_columns
from dsv3_jax.kernels.fp8_matmul import fp8_matmul


def attention_and_projection(
    q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, first_key_BT: jax.Array | None, weight: Fp8Weight, *,
    scale: float,
) -> jax.Array:  # fmt: skip
    """Computes softmax(scale · q kᵀ + mask) v in the operands' dtype and multiplies all heads with the weight.

    Args:
      q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT: operands of `kernels.attention`.
      weight: [N, U, *outputs].
      scale: factor on the scores.

    Returns:
      [B, T, *outputs] in q's dtype.
    """
    y_RD = _attention_and_projection(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, weight.as_matrix(), scale)
    return y_RD.reshape(*q_BTNX.shape[:2], *weight.output_dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention_and_projection(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, weight: Fp8Weight, scale: float) -> jax.Array:
    return _forward(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, weight, scale)[0]


def _forward(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, weight, scale):
    out_BTNU, lse_BNT = attend(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, scale=scale)
    batch, length, *_ = out_BTNU.shape
    out_RK = pad_rows(out_BTNU.reshape(batch * length, -1))
    rows, kept = quantize_and_keep(out_RK, None, 0.0, weight.input_cache)
    y_RD = fp8_matmul(rows, weight.forward, out_dtype=out_RK.dtype)[: batch * length]
    kept = checkpoint_name(kept, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return y_RD, (q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, kept, lse_BNT, for_backward(weight))


def _backward(scale, residuals, dy_RD):
    q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, kept, lse_BNT, weight = residuals
    dy_rows, dy_columns = quantize_rows_and_columns(pad_rows(dy_RD))
    dweight = weight_gradient(weight, input_columns(kept, 0.0), dy_columns)
    dout_RK = fp8_matmul(dy_rows, weight.backward, out_dtype=dy_RD.dtype)
    out_RK = _values(kept, q_BTNX.dtype)
    out_BTNU, dout_BTNU = (x_RK[: len(dy_RD)].reshape(*q_BTNX.shape[:3], -1) for x_RK in (out_RK, dout_RK))
    operands = (q_BTNX, kv_BTNY, k_rope_BTR, out_BTNU, lse_BNT, dout_BTNU, first_key_BT)
    gradients = attention_gradients(*operands, scale=scale)
    return *gradients, None, dweight


_attention_and_projection.defvjp(_forward, _backward)


def _values(kept: KeptInput, dtype: jnp.dtype) -> jax.Array:
    if kept.cached is None:
        return kept.x
    decode = decode_e5m6 if isinstance(kept.cached, E5M6Array) else dequantize
    return decode(kept.cached).astype(dtype)
