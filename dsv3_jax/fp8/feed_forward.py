"""SwiGLU feed-forwards in E4M3, dense and of routed experts.

Kept for the backward pass are the SwiGLU's inputs, in E4M3; its output is computed again from them (§3.3.3). Tokens are
quantized once: the routed experts' rows are gathered as codes and scales, one byte an element, in both passes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.fp8.formats import TILE, QuantizedArray
from dsv3_jax.fp8.linear import (
    KeptInput,
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
from dsv3_jax.kernels.block_quantize import quantize_rows_and_columns, rows_to_columns, swiglu_columns, swiglu_rows
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.grouped_matmul import grouped_fp8_matmul, grouped_fp8_weight_gradient

ALIGNMENT = TILE  # rows of one expert start at a tile of their columns' quantization


class FeedForwardWeights(NamedTuple):
    """The two weights of a feed-forward, or of one per expert."""

    gate_up: Fp8Weight  # [*batch, D, 2, F]
    down: Fp8Weight  # [*batch, F, D]; its input cache is that of the SwiGLU's inputs


class Rows(NamedTuple):
    """Where tokens lie among the rows of experts, in the layout of `kernels.grouped_matmul` with `ALIGNMENT`."""

    token_of_row_M: jax.Array  # int32; the number of tokens, or more, marks a row that holds none
    row_of_choice_TK: jax.Array  # int32
    rows_per_expert_E: jax.Array  # int32


def feed_forward(
    x: jax.Array, weights: FeedForwardWeights, *, norm_weight: jax.Array | None = None, eps: float = 0.0
) -> jax.Array:
    """Maps [..., D] to [..., D]; normalised first where a norm weight is given, see `linear.linears`."""
    x_RD = x.reshape(-1, x.shape[-1])
    y_RD = _feed_forward(pad_rows(x_RD), norm_weight, _as_matrices(weights), eps)
    return y_RD[: len(x_RD)].reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _feed_forward(x_RD, norm_weight, weights: FeedForwardWeights, eps: float) -> jax.Array:
    return _feed_forward_forward(x_RD, norm_weight, weights, eps)[0]


def _feed_forward_forward(x_RD, norm_weight, weights, eps):
    rows = quantize_input(x_RD, norm_weight, eps)
    y_RD, swiglu_inputs = _run(rows, weights, None, x_RD.dtype)
    kept = keep_input(x_RD, norm_weight, rows, weights.gate_up.input_cache)
    return y_RD, (kept, swiglu_inputs, _for_backward(weights))


def _feed_forward_backward(eps, residuals, dy_RD):
    kept, swiglu_inputs, weights = residuals
    dx_RD, dweights = _differentiate(input_columns(kept, eps), swiglu_inputs, weights, None, dy_RD)
    return *input_gradient([dx_RD], kept, eps), dweights


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def expert_feed_forwards(
    x_TD: jax.Array, rows: Rows, routed: FeedForwardWeights, shared: FeedForwardWeights | None
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the routed experts on their rows and the shared expert on all tokens; both read one quantized input.

    Args:
      x_TD: tokens.
      rows: of the routed experts.
      routed: weights with the experts as batch dimension.
      shared: weights of the shared expert, None without one.

    Returns:
      [M, D], one row per row of the layout, and [T, D] of the shared expert, None without one.
    """
    num_tokens = len(x_TD)
    shared = None if shared is None else _as_matrices(shared)
    y_MD, shared_TD = _experts(pad_rows(x_TD), rows, _as_matrices(routed), shared)
    return y_MD, None if shared_TD is None else shared_TD[:num_tokens]


@jax.custom_vjp
def _experts(x_TD, rows, routed, shared) -> tuple[jax.Array, jax.Array | None]:
    return _experts_forward(x_TD, rows, routed, shared)[0]


def _experts_forward(x_TD, rows, routed, shared):
    tokens = quantize_input(x_TD, None, 0.0)
    y_MD, swiglu_inputs_M = _run(_gather(tokens, rows), routed, rows.rows_per_expert_E, x_TD.dtype)
    kept = keep_input(x_TD, None, tokens, routed.gate_up.input_cache)
    if shared is None:
        return (y_MD, None), (kept, rows, (swiglu_inputs_M, _for_backward(routed)), None)
    y_TD, swiglu_inputs_T = _run(tokens, shared, None, x_TD.dtype)
    of_shared = (swiglu_inputs_T, _for_backward(shared))
    return (y_MD, y_TD), (kept, rows, (swiglu_inputs_M, _for_backward(routed)), of_shared)


def _experts_backward(residuals, gradients):
    kept, rows, of_routed, of_shared = residuals
    dy_MD, dy_TD = gradients
    columns_DM = _gathered_columns(kept, rows)
    dx_MD, drouted = _differentiate(columns_DM, *of_routed, rows.rows_per_expert_E, dy_MD)
    dinputs = [dx_MD.at[rows_T].get(mode="promise_in_bounds") for rows_T in rows.row_of_choice_TK.T]
    dshared = None
    if of_shared is not None:
        dx_TD, dshared = _differentiate(input_columns(kept, 0.0), *of_shared, None, dy_TD)
        dinputs = [pad_rows(dinput) for dinput in dinputs] + [dx_TD]
    dx_TD, _ = input_gradient(dinputs, kept, 0.0)
    return pad_rows(dx_TD), None, drouted, dshared


_experts.defvjp(_experts_forward, _experts_backward)


def _run(rows, weights: FeedForwardWeights, group_sizes_E, dtype) -> tuple[jax.Array, QuantizedArray | jax.Array]:
    """Returns the output and what is kept of the SwiGLU's inputs, gate and up side by side."""
    gate_up_R2F = _multiply(rows, weights.gate_up.forward, group_sizes_E, dtype)
    hidden, swiglu_inputs = swiglu_rows(gate_up_R2F)
    if weights.down.input_cache == "bf16":
        swiglu_inputs = gate_up_R2F
    return _multiply(hidden, weights.down.forward, group_sizes_E, dtype), checkpoint_name(swiglu_inputs, "gate_up")


def _differentiate(
    columns_DR, swiglu_inputs, weights: FeedForwardWeights, group_sizes_E, dy_RD
) -> tuple[jax.Array, FeedForwardWeights]:
    """Returns the gradients of the input's rows and of the weights, given the input in 128x1 tiles."""
    dtype = dy_RD.dtype
    dy_rows, dy_columns = quantize_rows_and_columns(dy_RD)
    dhidden_RF = _multiply(dy_rows, weights.down.backward, group_sizes_E, dtype)
    if isinstance(swiglu_inputs, QuantizedArray):
        hidden_columns = swiglu_columns(swiglu_inputs)
        dgate_up_rows, dgate_up_columns = block_quantize.swiglu_gradient(swiglu_inputs, dhidden_RF)
    else:
        hidden_columns, (dgate_up_rows, dgate_up_columns) = _swiglu_gradient(swiglu_inputs, dhidden_RF)
    ddown = _weight_product(hidden_columns, dy_columns, group_sizes_E)
    dgate_up = _weight_product(columns_DR, dgate_up_columns, group_sizes_E)
    dx_RD = _multiply(dgate_up_rows, weights.gate_up.backward, group_sizes_E, dtype)
    return dx_RD, FeedForwardWeights(weight_gradient(weights.gate_up, dgate_up), weight_gradient(weights.down, ddown))


def _swiglu_gradient(gate_up_R2F: jax.Array, dhidden_RF: jax.Array):
    """Returns the hidden columns and the gate-up gradient's rows and columns where the inputs are kept unquantized."""
    gate_RF, up_RF = jnp.split(gate_up_R2F.astype(jnp.float32), 2, axis=-1)
    sigmoid_RF, dhidden_RF = jax.nn.sigmoid(gate_RF), dhidden_RF.astype(jnp.float32)
    silu_RF = gate_RF * sigmoid_RF
    dgate_RF = dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    dgate_up_R2F = jnp.concatenate([dgate_RF, dhidden_RF * silu_RF], axis=-1).astype(gate_up_R2F.dtype)
    hidden_columns = block_quantize.quantize_columns((silu_RF * up_RF).astype(gate_up_R2F.dtype))
    return hidden_columns, quantize_rows_and_columns(dgate_up_R2F)


def _multiply(rows: QuantizedArray, weight: QuantizedArray, group_sizes_E: jax.Array | None, dtype) -> jax.Array:
    if group_sizes_E is None:
        return fp8_matmul(rows, weight, out_dtype=dtype)
    return grouped_fp8_matmul(rows, weight, group_sizes_E, alignment=ALIGNMENT, out_dtype=dtype)


def _weight_product(a: QuantizedArray, b: QuantizedArray, group_sizes_E: jax.Array | None) -> jax.Array:
    if group_sizes_E is None:
        return fp8_matmul(a, b, out_dtype=jnp.float32)
    return grouped_fp8_weight_gradient(a, b, group_sizes_E, alignment=ALIGNMENT, out_dtype=jnp.float32)


def _gather(tokens: QuantizedArray, rows: Rows) -> QuantizedArray:
    """Copies the codes and scales of every token to the rows of its experts; rows without a token are zero."""
    codes_TD = jax.lax.bitcast_convert_type(tokens.codes, jnp.uint8)
    codes_MD = codes_TD.at[rows.token_of_row_M].get(mode="fill", fill_value=0)
    scales_dM = tokens.scales.at[:, rows.token_of_row_M].get(mode="fill", fill_value=1)
    return QuantizedArray(jax.lax.bitcast_convert_type(codes_MD, tokens.codes.dtype), scales_dM, "row")


def _gathered_columns(kept: KeptInput, rows: Rows) -> QuantizedArray:
    if isinstance(kept.cached, QuantizedArray):
        return rows_to_columns(_gather(kept.cached, rows))
    return block_quantize.quantize_columns(kept.x.at[rows.token_of_row_M].get(mode="fill", fill_value=0))


def _as_matrices(weights: FeedForwardWeights) -> FeedForwardWeights:
    return FeedForwardWeights(*(weight.as_matrix() for weight in weights))


def _for_backward(weights: FeedForwardWeights) -> FeedForwardWeights:
    return FeedForwardWeights(*(for_backward(weight) for weight in weights))
