"""The mixture of experts (§2.1.2): rows sorted by expert, one grouped product per projection, no token dropped."""

import functools
import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.feed_forward import ALIGNMENT, FeedForwardWeights, Rows, expert_feed_forwards
from dsv3_jax.fp8.weight import Fp8Weight
from dsv3_jax.kernels import grouped_matmul as kernel
from dsv3_jax.model.layers import FeedForward, Normed, swiglu
from dsv3_jax.model.params import Linear, declare
from dsv3_jax.model.router import balance_loss, route, tokens_per_expert


class MoEStatistics(typing.NamedTuple):
    """What training needs to know of one layer's routing."""

    tokens_per_expert_E: jax.Array  # int32, over the whole batch
    balance_loss: jax.Array  # float32 scalar, without alpha


class MoE(nnx.Module):
    """Routed experts beside shared ones."""

    def __init__(self, config: ModelConfig):
        self.config = config
        routed = ("router_outputs", config.n_routed_experts)
        self.gate = declare(("embed", config.hidden_size), routed)
        self.e_score_correction_bias = declare(routed, init="zeros")
        self.experts = Experts(config)
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = FeedForward(config.hidden_size, width, ffn_axis="shared_ffn")

    def __call__(self, x_BTD: jax.Array | Normed) -> tuple[jax.Array, MoEStatistics]:
        """Maps [B, T, D] to [B, T, D] and reports the routing."""
        x_BTD = x_BTD.value() if isinstance(x_BTD, Normed) else x_BTD
        batch, length, _ = x_BTD.shape
        x_TD = x_BTD.reshape(batch * length, -1)
        routing = route(self.config, self.gate[...], self.e_score_correction_bias[...], x_TD)
        shape_BTK = (batch, length, self.config.num_experts_per_tok)
        choices = routing.experts_TK.reshape(shape_BTK), routing.weights_TK.reshape(shape_BTK)
        y_BTD = self._run_experts(x_BTD, *choices)
        statistics = MoEStatistics(
            tokens_per_expert(routing.experts_TK, self.config.n_routed_experts),
            balance_loss(self.config, routing.scores_TE.reshape(batch, length, -1)),
        )
        return y_BTD, statistics

    def _run_experts(self, x_BTD, experts_BTK, weights_BTK) -> jax.Array:
        if isinstance(self.experts.gate_up_proj[...], Fp8Weight):
            shared = self.shared_experts.weights() if self.config.n_shared_experts else None
            return _serve_fp8(x_BTD, experts_BTK, weights_BTK, self.experts.weights(), shared)
        y_BTD = self.experts(x_BTD, experts_BTK, weights_BTK)
        return y_BTD + self.shared_experts(x_BTD) if self.config.n_shared_experts else y_BTD


class Experts(nnx.Module):
    """The routed experts' SwiGLU feed-forwards."""

    def __init__(self, config: ModelConfig):
        self.config = config
        routed, ffn = ("routed_experts", config.n_routed_experts), ("expert_ffn", config.moe_intermediate_size)
        embed = ("embed", config.hidden_size)
        self.gate_up_proj = declare(routed, embed, (None, 2), ffn, linear=Linear(batch_dims=1))
        after_swiglu = Linear(batch_dims=1, cache_setting="fp8_swiglu_cache")
        self.down_proj = declare(routed, ffn, embed, linear=after_swiglu)

    def weights(self) -> FeedForwardWeights:
        """Returns both weights, as FP8 feed-forwards take them."""
        return FeedForwardWeights(self.gate_up_proj[...], self.down_proj[...])

    def __call__(self, x_BTD: jax.Array, experts_BTK: jax.Array, weights_BTK: jax.Array) -> jax.Array:
        """Sums each token's chosen experts with their weights, in float32; returns [B, T, D] in x's dtype.

        On a mesh every device serves its own sequences with all experts.
        """
        return _serve(x_BTD, experts_BTK, weights_BTK, self.gate_up_proj[...], self.down_proj[...])


def _serve(x_BTD, experts_BTK, weights_BTK, gate_up_ED2F, down_EFD) -> jax.Array:
    num_experts, hidden_size = gate_up_ED2F.shape[:2]
    top_K = experts_BTK.shape[-1]
    x_TD, weights_TK = x_BTD.reshape(-1, hidden_size), weights_BTK.reshape(-1, top_K)
    alignment = kernel.row_alignment(weights_TK.size, num_experts)
    plan = plan_rows(experts_BTK.reshape(-1, top_K), num_experts, alignment)
    x_MD = gather_rows(x_TD, plan)
    gate_up_M2F = grouped_linear(x_MD, gate_up_ED2F, plan.rows_per_expert_E, alignment)
    hidden_MF = swiglu(checkpoint_name(gate_up_M2F, "gate_up"))
    y_MD = grouped_linear(hidden_MF, down_EFD, plan.rows_per_expert_E, alignment)
    return combine_rows(checkpoint_name(y_MD, "expert_out"), weights_TK, plan).reshape(x_BTD.shape)


def _serve_fp8(x_BTD, experts_BTK, weights_BTK, routed: FeedForwardWeights, shared: FeedForwardWeights | None):
    """Returns the weighted sum of the routed experts plus the shared one, which read the same quantized tokens."""
    num_experts, top_K = routed.gate_up.forward.codes.shape[0], experts_BTK.shape[-1]
    x_TD, weights_TK = x_BTD.reshape(-1, x_BTD.shape[-1]), weights_BTK.reshape(-1, top_K)
    plan = plan_rows(experts_BTK.reshape(-1, top_K), num_experts, ALIGNMENT)
    y_MD, shared_TD = expert_feed_forwards(x_TD, plan, routed, shared)
    y_TD = combine_rows(checkpoint_name(y_MD, "expert_out"), weights_TK, plan)
    return (y_TD if shared_TD is None else y_TD + shared_TD).reshape(x_BTD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_linear(x_MK: jax.Array, weight: jax.Array, rows_per_expert_E: jax.Array, alignment: int) -> jax.Array:
    """Multiplies each expert's rows with its weight [E, K, *N], as `layers.linear` does; returns [M, *N].

    What the backward pass keeps of the weight is the parameter itself, never a rounded or reshaped copy.
    """
    weight_EKN = weight.reshape(*weight.shape[:2], -1)
    y_MN = kernel.grouped_matmul(x_MK, weight_EKN, rows_per_expert_E, alignment=alignment)
    return y_MN.reshape(-1, *weight.shape[2:])


def _grouped_linear_forward(x_MK, weight, rows_per_expert_E, alignment):
    return grouped_linear(x_MK, weight, rows_per_expert_E, alignment), (x_MK, weight, rows_per_expert_E)


def _grouped_linear_backward(alignment, residuals, dy):
    x_MK, weight, rows_per_expert_E = residuals
    weight_EKN = weight.reshape(*weight.shape[:2], -1)

    def multiply(x_MK, weight_EKN):
        return kernel.grouped_matmul(x_MK, weight_EKN, rows_per_expert_E, alignment=alignment)

    dx_MK, dweight_EKN = jax.vjp(multiply, x_MK, weight_EKN)[1](dy.reshape(len(x_MK), -1))
    return dx_MK, dweight_EKN.reshape(weight.shape), None


grouped_linear.defvjp(_grouped_linear_forward, _grouped_linear_backward)


def plan_rows(experts_TK: jax.Array, num_experts: int, alignment: int) -> Rows:
    """Sorts the (token, choice) pairs by expert, stably, into the layout of `kernels.grouped_matmul`."""
    num_tokens, top_K = experts_TK.shape
    experts_P = experts_TK.reshape(-1)
    rows_per_expert_E = tokens_per_expert(experts_TK, num_experts)
    num_rows = kernel.padded_rows(num_tokens * top_K, num_experts, alignment)
    order_P = jnp.argsort(experts_P, stable=True)
    sorted_experts_P = experts_P[order_P]
    first_pair_E = jnp.cumsum(rows_per_expert_E) - rows_per_expert_E
    shift_E = kernel.group_starts(rows_per_expert_E, alignment) - first_pair_E
    rows_P = jnp.arange(num_tokens * top_K, dtype=jnp.int32) + shift_E[sorted_experts_P].astype(jnp.int32)
    token_of_row_M = jnp.full(num_rows, num_tokens, jnp.int32).at[rows_P].set(order_P // top_K, unique_indices=True)
    row_of_choice_P = jnp.zeros_like(rows_P).at[order_P].set(rows_P, unique_indices=True)
    return Rows(token_of_row_M, row_of_choice_P.reshape(num_tokens, top_K), rows_per_expert_E)


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, plan: Rows) -> jax.Array:
    """Copies every token to the rows of its experts, zeros elsewhere; the gradient gathers too, in float32."""
    return x_TD.at[plan.token_of_row_M].get(mode="fill", fill_value=0)


def _gather_rows_forward(x_TD, plan):
    return gather_rows(x_TD, plan), plan


def _gather_rows_backward(plan, dx_MD):
    dx_of_choice = (dx_MD[rows_T].astype(jnp.float32) for rows_T in plan.row_of_choice_TK.T)
    return sum(dx_of_choice).astype(dx_MD.dtype), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine_rows(y_MD: jax.Array, weights_TK: jax.Array, plan: Rows) -> jax.Array:
    """Sums every token's rows with its gate weights in float32, rounded once to y's dtype."""
    y_of_choice = (y_MD[rows_T].astype(jnp.float32) for rows_T in plan.row_of_choice_TK.T)
    return sum(y_TD * weights_T[:, None] for y_TD, weights_T in zip(y_of_choice, weights_TK.T)).astype(y_MD.dtype)


def _combine_rows_forward(y_MD, weights_TK, plan):
    return combine_rows(y_MD, weights_TK, plan), (y_MD, weights_TK, plan)


def _combine_rows_backward(residuals, dout_TD):
    y_MD, weights_TK, plan = residuals
    weight_of_row_M = jnp.zeros(y_MD.shape[0], weights_TK.dtype).at[plan.row_of_choice_TK].set(weights_TK)
    dout_MD = dout_TD.at[plan.token_of_row_M].get(mode="fill", fill_value=0)
    dy_MD = (dout_MD.astype(jnp.float32) * weight_of_row_M[:, None]).astype(y_MD.dtype)
    y_of_choice = (y_MD[rows_T].astype(jnp.float32) for rows_T in plan.row_of_choice_TK.T)
    dweights_KT = jnp.stack([jnp.sum(y_TD * dout_TD.astype(jnp.float32), axis=-1) for y_TD in y_of_choice])
    return dy_MD, dweights_KT.T.astype(weights_TK.dtype), None


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)
