"""SwiGLU feed-forwards in E4M3.

Kept for the backward pass are the SwiGLU's inputs, in E4M3; its output is computed again from them (§3.3.3).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.fp8.formats import QuantizedArray, dequantize
from dsv3_jax.fp8.linear import (
    for_backward,
    input_columns,
    input_gradient,
    keep_input,
    pad_rows,
    quantize_input,
    weight_gradient,
)
from dsv3_jax.fp8.weight import Fp8Weight
from dsv3_jax.kernels import block_quantize
from dsv3_jax.kernels.block_quantize import quantize_rows_and_columns, swiglu_columns, swiglu_rows
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.swiglu import swiglu, swiglu_gradients


class FeedForwardWeights(NamedTuple):
    """The two weights of a feed-forward, or of one per expert."""

    gate_up: Fp8Weight  # [*batch, D, 2, F]
    down: Fp8Weight  # [*batch, F, D]; its input cache is that of the SwiGLU's inputs


def feed_forward(
    x: jax.Array,
    weights: FeedForwardWeights,
    *,
    norm_weight: jax.Array | None = None,
    eps: float = 0.0,
    quantized: QuantizedArray | None = None,
) -> jax.Array:
    """Maps [..., D] to [..., D].

    Args:
      x: tokens.
      weights: of one feed-forward.
      norm_weight: x is normalised first where it is given, see `linear.linears`.
      eps: of the norm.
      quantized: the rows of x where they are quantized already, `quantize_rows(pad_rows(x))`, which no norm follows;
        x then receives the gradient.
    """
    x_RD = x.reshape(-1, x.shape[-1])
    matrices = FeedForwardWeights(*(weight.as_matrix() for weight in weights))
    y_RD = _feed_forward(pad_rows(x_RD), quantized, norm_weight, matrices, eps)
    return y_RD[: len(x_RD)].reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _feed_forward(x_RD, quantized, norm_weight, weights: FeedForwardWeights, eps: float) -> jax.Array:
    return _feed_forward_forward(x_RD, quantized, norm_weight, weights, eps)[0]


def _feed_forward_forward(x_RD, quantized, norm_weight, weights, eps):
    rows = quantize_input(x_RD, norm_weight, eps) if quantized is None else quantized
    gate_up_R2F = fp8_matmul(rows, weights.gate_up.forward, out_dtype=x_RD.dtype)
    hidden, swiglu_inputs = quantized_swiglu(gate_up_R2F, weights.down.input_cache)
    y_RD = fp8_matmul(hidden, weights.down.forward, out_dtype=x_RD.dtype)
    kept = keep_input(x_RD, norm_weight, rows, weights.gate_up.input_cache)
    return y_RD, (kept, swiglu_inputs, FeedForwardWeights(*map(for_backward, weights)))


def _feed_forward_backward(eps, residuals, dy_RD):
    kept, swiglu_inputs, weights = residuals
    dy_rows, dy_columns = quantize_rows_and_columns(dy_RD)
    dhidden_RF = fp8_matmul(dy_rows, weights.down.backward, out_dtype=dy_RD.dtype)
    ddown = weight_gradient(weights.down, _hidden_columns(swiglu_inputs), dy_columns)
    dgate_up_rows, dgate_up_columns = swiglu_gradient(swiglu_inputs, dhidden_RF)
    dgate_up = weight_gradient(weights.gate_up, input_columns(kept, eps), dgate_up_columns)
    dx_RD = fp8_matmul(dgate_up_rows, weights.gate_up.backward, out_dtype=dy_RD.dtype)
    dx_RD, dnorm_weight = input_gradient([dx_RD], kept, eps)
    return dx_RD, None, dnorm_weight, FeedForwardWeights(dgate_up, ddown)


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def quantized_swiglu(gate_up_R2F: jax.Array, input_cache: str) -> tuple[QuantizedArray, QuantizedArray | jax.Array]:
    """Returns silu(gate) · up, row-quantized [R, F], and what is kept of gate and up, side by side, by the policy."""
    hidden, quantized = swiglu_rows(gate_up_R2F)
    return hidden, checkpoint_name(gate_up_R2F if input_cache == "bf16" else quantized, "gate_up")


def swiglu_gradient(
    swiglu_inputs: QuantizedArray | jax.Array, dhidden_RF: jax.Array
) -> tuple[QuantizedArray, QuantizedArray]:
    """Returns the gradient of gate and up side by side, in rows and in columns, given that of silu(gate) · up."""
    if isinstance(swiglu_inputs, QuantizedArray):
        return block_quantize.swiglu_gradient(swiglu_inputs, dhidden_RF)
    gradients = swiglu_gradients(*gate_and_up(swiglu_inputs), dhidden_RF.astype(jnp.float32))
    return quantize_rows_and_columns(jnp.concatenate(gradients, axis=-1).astype(swiglu_inputs.dtype))


def weighted_swiglu_gradient(
    swiglu_inputs: QuantizedArray | jax.Array, dhidden_RF: jax.Array, weights_R: jax.Array
) -> tuple[QuantizedArray, QuantizedArray, jax.Array]:
    """Returns the gradients of gate and up, like `swiglu_gradient`, and of weights that scale the rows of the product.

    Args:
      swiglu_inputs: gate and up side by side, as they are kept.
      dhidden_RF: the gradient that the product would have if all weights were 1.
      weights_R: float32.
    """
    if isinstance(swiglu_inputs, QuantizedArray):
        return block_quantize.weighted_swiglu_gradient(swiglu_inputs, dhidden_RF, weights_R)
    gate_RF, up_RF = gate_and_up(swiglu_inputs)
    dhidden_RF = dhidden_RF.astype(jnp.float32)
    gradients = swiglu_gradients(gate_RF, up_RF, dhidden_RF * weights_R[:, None])
    quantized = quantize_rows_and_columns(jnp.concatenate(gradients, axis=-1).astype(swiglu_inputs.dtype))
    return *quantized, jnp.sum(swiglu(gate_RF, up_RF) * dhidden_RF, axis=-1)


def gate_and_up(swiglu_inputs: QuantizedArray | jax.Array) -> list[jax.Array]:
    """Returns the two halves of what is kept, float32 [R, F]."""
    is_quantized = isinstance(swiglu_inputs, QuantizedArray)
    return jnp.split(dequantize(swiglu_inputs) if is_quantized else swiglu_inputs.astype(jnp.float32), 2, axis=-1)


def _hidden_columns(swiglu_inputs: QuantizedArray | jax.Array) -> QuantizedArray:
    """Returns silu(gate) · up in 128x1 tiles."""
    if isinstance(swiglu_inputs, QuantizedArray):
        return swiglu_columns(swiglu_inputs)
    hidden_RF = swiglu(*gate_and_up(swiglu_inputs))
    return block_quantize.quantize_columns(hidden_RF.astype(swiglu_inputs.dtype))
