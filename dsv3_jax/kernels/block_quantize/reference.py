"""The quantizers in plain JAX: the oracle of the kernels and the CPU path. All arithmetic is float32."""

import jax
import jax.numpy as jnp

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import E5M6Array, QuantizedArray
from dsv3_jax.kernels.swiglu import swiglu, swiglu_gradients

quantize_rows = formats.quantize_rows
quantize_columns = formats.quantize_columns
rows_to_columns = formats.rows_to_columns


@jax.jit
def quantize_rows_and_columns(x_RK: jax.Array) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes in 1x128 and in 128x1 tiles."""
    return formats.quantize_rows(x_RK), formats.quantize_columns(x_RK)


@jax.jit
def quantize_rows_and_encode(x_RK: jax.Array) -> tuple[QuantizedArray, E5M6Array]:
    """Quantizes in 1x128 tiles to E4M3 and to E5M6."""
    return formats.quantize_rows(x_RK), formats.encode_e5m6(x_RK)


@jax.jit
def decode_columns(encoded: E5M6Array) -> QuantizedArray:
    """Quantizes E5M6 in 128x1 tiles."""
    return formats.quantize_columns(formats.decode_e5m6(encoded))


@jax.jit
def rms_norm_rows(x_RD: jax.Array, weight_D: jax.Array, eps: float) -> QuantizedArray:
    """Normalises rows and quantizes them."""
    x_RD = x_RD.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_RD), axis=-1, keepdims=True) + eps)
    return formats.quantize_rows(x_RD * inverse_rms * weight_D)


@jax.jit
def swiglu_rows(gate_up_MX: jax.Array) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes silu(gate) · up and, for the backward pass, gate and up."""
    gate, up = jnp.split(gate_up_MX.astype(jnp.float32), 2, axis=-1)
    return formats.quantize_rows(swiglu(gate, up)), formats.quantize_rows(gate_up_MX)


@jax.jit
def swiglu_columns(gate_up: QuantizedArray) -> QuantizedArray:
    """Recomputes silu(gate) · up and quantizes its columns."""
    gate, up = jnp.split(formats.dequantize(gate_up), 2, axis=-1)
    return formats.quantize_columns(swiglu(gate, up))


@jax.jit
def swiglu_gradient(gate_up: QuantizedArray, dhidden_MF: jax.Array) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes rows and columns of the gradients of gate and up."""
    gate, up = jnp.split(formats.dequantize(gate_up), 2, axis=-1)
    gradients = swiglu_gradients(gate, up, dhidden_MF.astype(jnp.float32))
    return quantize_rows_and_columns(jnp.concatenate(gradients, axis=-1))


@jax.jit
def weighted_swiglu_gradient(
    gate_up: QuantizedArray, dhidden_MF: jax.Array, weights_M: jax.Array
) -> tuple[QuantizedArray, QuantizedArray, jax.Array]:
    """Quantizes rows and columns of the gradients of gate and up; and returns the gradients of the rows' weights."""
    gate, up = jnp.split(formats.dequantize(gate_up), 2, axis=-1)
    dhidden_MF = dhidden_MF.astype(jnp.float32)
    gradients = swiglu_gradients(gate, up, dhidden_MF * weights_M[:, None])
    quantized = quantize_rows_and_columns(jnp.concatenate(gradients, axis=-1))
    return *quantized, jnp.sum(swiglu(gate, up) * dhidden_MF, axis=-1)


@jax.jit
def quantize_weights(weight_KN: jax.Array) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes in blocks, transposed and as it is."""
    backward = formats.quantize_weight_blocks(weight_KN)
    return formats.transpose_blocks(backward), backward
