"""Routed experts in E4M3: what a device computes for the rows that reach it.

Tokens and the gradients of their outputs are quantized once, before they travel and before they are copied for their
experts (§3.3.2), on one device too: numbers do not depend on the mesh. Kept for the backward pass are the rows that
arrived, one byte an element, and the SwiGLU's inputs in E4M3.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.feed_forward import FeedForwardWeights, gate_and_up, quantized_swiglu, weighted_swiglu_gradient
from dsv3_jax.fp8.formats import E4M3, FLOAT32_MANTISSA_BITS, TILE, QuantizedArray
from dsv3_jax.fp8.linear import pad_rows
from dsv3_jax.fp8.weight import Fp8Weight
from dsv3_jax.kernels.block_quantize import quantize_columns, quantize_rows, rows_to_columns, swiglu_columns
from dsv3_jax.kernels.expert_rows import (
    ExpertRows,
    gather_choices,
    gather_rows,
    gather_weights,
    plan_rows,
    sum_rows,
    sum_weighted_rows,
)
from dsv3_jax.kernels.grouped_matmul import (
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    grouped_fp8_weight_gradient_with_squares,
)
from dsv3_jax.kernels.swiglu import swiglu

ALIGNMENT = TILE  # rows of one expert start at a tile of their columns' quantization


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes_RD", "exponents_Rd"), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True)
class Payload:
    """Quantized rows as they travel; a row of zero bytes is a row of zeros."""

    codes_RD: jax.Array  # uint8, the bytes of E4M3
    exponents_Rd: jax.Array  # uint8 per 128 columns, biased by 127: the scale is 2^(exponent - 127)
    dtype: jnp.dtype  # of what was quantized: that of the results


class Kept(NamedTuple):
    """What the backward pass needs besides the weights."""

    x: Payload
    weights_RK: jax.Array
    rows: ExpertRows
    swiglu_inputs: QuantizedArray | jax.Array


def pack(quantized: QuantizedArray, like_TD: jax.Array) -> Payload:
    """Returns what travels of tokens, given them and their row-quantized values with power-of-two scales."""
    codes_RD = jax.lax.bitcast_convert_type(quantized.codes, jnp.uint8)
    exponents_dR = jax.lax.bitcast_convert_type(quantized.scales, jnp.int32) >> FLOAT32_MANTISSA_BITS
    num_tokens = len(like_TD)
    return Payload(codes_RD[:num_tokens], exponents_dR.astype(jnp.uint8).T[:num_tokens], like_TD.dtype)


def forward(
    x: Payload, experts_RK: jax.Array, weights_RK: jax.Array, params: FeedForwardWeights, max_choices: int
) -> tuple[jax.Array, Kept]:
    """Sums each row's chosen experts with their weights, in float32; [R, D], and what is kept.

    Args:
      x: rows.
      experts_RK: int32 index among the experts here; their number marks a choice whose expert is not here.
      weights_RK: float32 gate weights.
      params: weights with the experts that are here as batch dimension.
      max_choices: at least as many as there are choices whose expert is here.
    """
    num_experts = len(params.down.forward.codes)
    rows = plan_rows(experts_RK, num_experts=num_experts, alignment=ALIGNMENT, max_choices=max_choices)
    gate_up_M2F = _multiply(_unpack(x, rows), params.gate_up.forward, rows, x.dtype)
    hidden, swiglu_inputs = quantized_swiglu(gate_up_M2F, params.down.input_cache)
    y_MD = _multiply(hidden, params.down.forward, rows, x.dtype)
    return sum_weighted_rows(y_MD, weights_RK, rows), Kept(x, weights_RK, rows, swiglu_inputs)


def encode_gradient(dy_TD: jax.Array) -> Payload:
    """Quantizes the gradient of the tokens' outputs."""
    return pack(quantize_rows(pad_rows(dy_TD)), dy_TD)


def backward(kept: Kept, dy: Payload, params: FeedForwardWeights) -> tuple[jax.Array, jax.Array, FeedForwardWeights]:
    """Returns the gradients of x, of the gate weights (float32) and of the weights' masters (float32).

    A gate weight scales the expert's hidden row as well as its output, so its gradient is the product of that row,
    computed again from the SwiGLU's inputs, with the gradient that the row has before it is scaled. For the
    gradient of the down projection it scales the hidden rows before they are quantized, and nothing is rounded
    twice: the quantized dy becomes columns without loss but underflow.
    """
    rows, swiglu_inputs = kept.rows, kept.swiglu_inputs
    weights_M = gather_weights(kept.weights_RK, rows)
    dy_MD = _unpack(dy, rows)
    dhidden_MF = _multiply(dy_MD, params.down.backward, rows, dy.dtype)
    weighted_columns = _weighted_columns(swiglu_inputs, weights_M, dy.dtype)
    ddown = _weight_gradient(params.down, weighted_columns, rows_to_columns(dy_MD), rows)
    dgate_up_rows, dgate_up_columns, dweights_M = weighted_swiglu_gradient(swiglu_inputs, dhidden_MF, weights_M)
    x_columns = rows_to_columns(_unpack(kept.x, rows))
    dgate_up = _weight_gradient(params.gate_up, x_columns, dgate_up_columns, rows)
    dx_MD = _multiply(dgate_up_rows, params.gate_up.backward, rows, dy.dtype)
    return sum_rows(dx_MD, rows), gather_choices(dweights_M, rows), FeedForwardWeights(dgate_up, ddown)


def _multiply(x: QuantizedArray, weight: QuantizedArray, rows: ExpertRows, dtype: jnp.dtype) -> jax.Array:
    return grouped_fp8_matmul(x, weight, rows.rows_per_expert_E, alignment=rows.alignment, out_dtype=dtype)


def _weight_gradient(weight: Fp8Weight, x: QuantizedArray, dy: QuantizedArray, rows: ExpertRows) -> Fp8Weight:
    """Returns the gradient of a weight, given input and output gradient in columns."""
    operands, squares = (x, dy, rows.rows_per_expert_E), None
    if weight.squares is None:
        dmaster_EKN = grouped_fp8_weight_gradient(*operands, alignment=rows.alignment, out_dtype=jnp.float32)
    else:
        dmaster_EKN, squares = grouped_fp8_weight_gradient_with_squares(*operands, alignment=rows.alignment)
    return weight.gradient(dmaster_EKN.reshape(*dmaster_EKN.shape[:2], *weight.output_dims), squares)


def _unpack(payload: Payload, rows: ExpertRows) -> QuantizedArray:
    """Copies every row that travelled to the rows of its experts; rows without a token are zero."""
    num_rows, width = payload.codes_RD.shape
    # Four codes at a time: XLA copies as many elements per thread whatever their size.
    words_RW = jax.lax.bitcast_convert_type(payload.codes_RD.reshape(num_rows, width // 4, 4), jnp.uint32)
    codes_MD = jax.lax.bitcast_convert_type(gather_rows(words_RW, rows), E4M3).reshape(-1, width)
    scale_bits_dM = gather_rows(payload.exponents_Rd, rows).T.astype(jnp.int32) << FLOAT32_MANTISSA_BITS
    return QuantizedArray(codes_MD, jax.lax.bitcast_convert_type(scale_bits_dM, jnp.float32), "row")


def _weighted_columns(
    swiglu_inputs: QuantizedArray | jax.Array, weights_M: jax.Array, dtype: jnp.dtype
) -> QuantizedArray:
    """Returns the hidden rows, each times its gate weight, in 128x1 tiles."""
    is_quantized = isinstance(swiglu_inputs, QuantizedArray)
    tiles_of_gate, is_partial = divmod(swiglu_inputs.codes.shape[1] // 2, TILE) if is_quantized else (0, True)
    if is_partial:
        hidden_MF = swiglu(*gate_and_up(swiglu_inputs))
        return quantize_columns((hidden_MF * weights_M[:, None]).astype(dtype))
    # The kernel multiplies with up last: the weights go into the scales of up.
    scales_fM = swiglu_inputs.scales.at[tiles_of_gate:].multiply(weights_M)
    return swiglu_columns(dataclasses.replace(swiglu_inputs, scales=scales_fM))
