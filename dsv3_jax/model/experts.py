"""Routed experts in BF16 or float32: what a device computes for the rows that reach it (§2.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels.expert_rows import (
    ExpertRows,
    gather_choices,
    gather_rows,
    gather_weights,
    plan_rows,
    sum_rows,
    sum_weighted_rows,
)
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_gradients, row_alignment
from dsv3_jax.model.layers import swiglu
from dsv3_jax.model.weights import RoundedWeight


class ExpertWeights(NamedTuple):
    """The weights of the experts that are here."""

    gate_up: RoundedWeight  # [E, D, 2, F]
    down: RoundedWeight  # [E, F, D]


class Kept(NamedTuple):
    """What the backward pass needs besides the weights."""

    x_RD: jax.Array
    weights_RK: jax.Array
    rows: ExpertRows
    gate_up_M2F: jax.Array


def forward(
    x_RD: jax.Array, experts_RK: jax.Array, weights_RK: jax.Array, params: ExpertWeights, max_choices: int
) -> tuple[jax.Array, Kept]:
    """Sums each row's chosen experts with their weights, in float32; [R, D] in x's dtype, and what is kept.

    Args:
      x_RD: rows.
      experts_RK: int32 index among the experts here; their number marks a choice whose expert is not here.
      weights_RK: float32 gate weights.
      params: weights of the experts, rounded to x's dtype where they are multiplied.
      max_choices: at least as many as there are choices whose expert is here.
    """
    num_experts = len(params.gate_up.values)
    alignment = row_alignment(max_choices, num_experts)
    rows = plan_rows(experts_RK, num_experts=num_experts, alignment=alignment, max_choices=max_choices)
    gate_up_M2F = checkpoint_name(_multiply(gather_rows(x_RD, rows), params.gate_up, rows), "gate_up")
    y_MD = _multiply(swiglu(gate_up_M2F), params.down, rows)
    return sum_weighted_rows(y_MD, weights_RK, rows), Kept(x_RD, weights_RK, rows, gate_up_M2F)


def encode_gradient(dy_TD: jax.Array) -> jax.Array:
    """Returns what travels of the gradient of the tokens' outputs."""
    return dy_TD


def backward(kept: Kept, dy_RD: jax.Array, params: ExpertWeights) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """Returns the gradients of x, of the gate weights (float32) and of the weights (in their masters' dtypes).

    The outputs of experts are not needed: a gate weight scales the expert's hidden row as well as its output, so
    its gradient is the product of that row with the gradient that the row has before it is scaled.
    """
    rows = kept.rows
    weights_M1 = gather_weights(kept.weights_RK, rows)[:, None]
    hidden_MF, swiglu_vjp = jax.vjp(swiglu, kept.gate_up_M2F)
    weighted_MF = (hidden_MF.astype(jnp.float32) * weights_M1).astype(hidden_MF.dtype)
    dy_MD = gather_rows(dy_RD, rows)
    dhidden_MF, ddown = _differentiate(weighted_MF, params.down, rows, dy_MD)
    dhidden_MF = dhidden_MF.astype(jnp.float32)
    dweights_M = jnp.sum(hidden_MF.astype(jnp.float32) * dhidden_MF, axis=-1)
    (dgate_up_M2F,) = swiglu_vjp((dhidden_MF * weights_M1).astype(hidden_MF.dtype))
    dx_MD, dgate_up = _differentiate(gather_rows(kept.x_RD, rows), params.gate_up, rows, dgate_up_M2F)
    return sum_rows(dx_MD, rows), gather_choices(dweights_M, rows), ExpertWeights(dgate_up, ddown)


def _multiply(x_MK: jax.Array, weight: RoundedWeight, rows: ExpertRows) -> jax.Array:
    """Multiplies each expert's rows with its weight [E, K, *N]; returns [M, *N]."""
    y_MN = grouped_matmul(x_MK, _as_matrices(weight), rows.rows_per_expert_E, alignment=rows.alignment)
    return y_MN.reshape(-1, *weight.values.shape[2:])


def _differentiate(
    x_MK: jax.Array, weight: RoundedWeight, rows: ExpertRows, dy: jax.Array
) -> tuple[jax.Array, RoundedWeight]:
    """Returns the gradients of rows and weight from that of their product."""
    dx_MK, dweight_EKN = grouped_matmul_gradients(
        x_MK, _as_matrices(weight), rows.rows_per_expert_E, dy.reshape(len(dy), -1), alignment=rows.alignment,
        weight_dtype=weight.master.dtype,
    )  # fmt: skip
    return dx_MK, weight.gradient(dweight_EKN.reshape(weight.values.shape))


def _as_matrices(weight: RoundedWeight) -> jax.Array:
    return weight.values.reshape(*weight.values.shape[:2], -1)
