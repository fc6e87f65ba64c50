"""The router (§2.1.2): which experts a token visits, with what weight, and how balanced that is."""

import functools
import typing

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.sharding.collectives import SEQUENCE_AXIS, size, sum_over


class Routing(typing.NamedTuple):
    """The experts of every token."""

    experts_TK: jax.Array  # int32, distinct within a token
    weights_TK: jax.Array  # float32
    scores_TE: jax.Array  # float32 affinities, without bias


@jax.named_scope("router")
def route(config: ModelConfig, gate_DE: jax.Array, bias_E: jax.Array, x_TD: jax.Array) -> Routing:
    """Chooses each token's experts and weighs them, all in float32 (eqs. 12-16).

    The bias is added to choose and plays no part in the weights; it gets no gradient.
    """
    scores_TE = jax.nn.sigmoid(_logits(x_TD, gate_DE))
    biased_TE = jax.lax.stop_gradient(scores_TE + bias_E)
    _, experts_TK = jax.lax.top_k(_keep_best_groups(config, biased_TE), config.num_experts_per_tok)
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts_TK, weights_TK * config.routed_scaling_factor, scores_TE)


@functools.partial(jax.checkpoint, prevent_cse=False)  # keeps x as it came, not in float32
def _logits(x_TD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    return jnp.dot(x_TD.astype(jnp.float32), gate_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _keep_best_groups(config: ModelConfig, biased_TE: jax.Array) -> jax.Array:
    """Puts -inf on the experts outside each token's best groups; a group's score is the sum of its two best."""
    if config.topk_group == config.n_group:
        return biased_TE
    biased_TGe = biased_TE.reshape(biased_TE.shape[0], config.n_group, -1)
    group_scores_TG = jax.lax.top_k(biased_TGe, 2)[0].sum(axis=-1)
    _, kept_groups = jax.lax.top_k(group_scores_TG, config.topk_group)
    is_kept_TG = jax.nn.one_hot(kept_groups, config.n_group, dtype=jnp.bool).any(axis=1)
    return jnp.where(is_kept_TG[..., None], biased_TGe, -jnp.inf).reshape(biased_TE.shape)


def tokens_per_expert(experts_TK: jax.Array, num_experts: int, is_live_T: jax.Array | None = None) -> jax.Array:
    """Counts how many tokens, of those that are live, chose each expert, int32 [E]; not given, all tokens are."""
    if is_live_T is not None:
        experts_TK = jnp.where(is_live_T[:, None], experts_TK, num_experts)  # which adds nothing
    return jnp.zeros(num_experts, jnp.int32).at[experts_TK.reshape(-1)].add(1)


@jax.named_scope("router")
def balance_loss(config: ModelConfig, scores_BTE: jax.Array) -> jax.Array:
    """Returns the sequence-wise balance loss without its factor alpha, averaged over sequences (eqs. 17-20).

    f_i counts the tokens whose K highest affinities, without bias or group limit, include expert i. On a mesh the
    devices of the tensor axis share sequences, T tokens of each on every device: together they return the loss of the
    whole sequences, an equal part each.
    """
    _, length, num_experts = scores_BTE.shape
    top_K, num_pieces = config.num_experts_per_tok, size(SEQUENCE_AXIS)
    chosen_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), top_K)[1]
    count_chosen = jax.vmap(lambda chosen_TK: tokens_per_expert(chosen_TK, num_experts))
    count_BE = sum_over(count_chosen(chosen_BTK), SEQUENCE_AXIS)
    probability_BE = sum_over(jnp.sum(scores_BTE / scores_BTE.sum(axis=-1, keepdims=True), axis=1), SEQUENCE_AXIS)
    f_BE = count_BE * (num_experts / (top_K * length * num_pieces))
    P_BE = probability_BE / (length * num_pieces)
    return jnp.mean(jnp.sum(f_BE * P_BE, axis=-1)) / num_pieces
