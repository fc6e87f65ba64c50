"""The router and the balance loss against numpy, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.router import balance_loss, route, tokens_per_expert
from dsv3_jax.testing import reference
from dsv3_jax.testing.networks import small_config
from dsv3_jax.testing.tolerances import FLOAT32_VALUES, assert_close

ROUTERS = {
    "groups": {},
    "one group": {"n_group": 1, "topk_group": 1},
    "one kept group": {"topk_group": 1, "num_experts_per_tok": 2},
    "all groups kept": {"topk_group": 4, "num_experts_per_tok": 5},
    "every kept expert chosen": {"topk_group": 2, "num_experts_per_tok": 4},
    "every expert chosen": {"topk_group": 4, "num_experts_per_tok": 8},
    "one expert": {"num_experts_per_tok": 1},
    "not normalised": {"norm_topk_prob": False},
}


def _router(config, seed: int, *, bias: tuple[float, float] = (-1, 0.5), num_tokens: int = 50):
    rng = np.random.default_rng(seed)
    gate_DE = rng.normal(0, 0.3, (config.hidden_size, config.n_routed_experts)).astype(np.float32)
    bias_E = rng.uniform(*bias, config.n_routed_experts).astype(np.float32)
    return gate_DE, bias_E, rng.normal(size=(num_tokens, config.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("bias", [(-1, 0.5), (-2, -1), (5, 6)], ids=["mixed", "all scores negative", "all positive"])
def test_chooses_and_weighs(name, bias):
    config = small_config(**ROUTERS[name])
    gate_DE, bias_E, x_TD = _router(config, 0, bias=bias)
    experts_TK, weights_TK, margin = reference.route(config, gate_DE, bias_E, x_TD)
    assert margin > 1e-5
    routing = route(config, gate_DE, bias_E, x_TD)
    order = np.argsort(routing.experts_TK, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(routing.experts_TK), order, axis=-1), experts_TK)
    ours_TK = np.take_along_axis(np.asarray(routing.weights_TK), order, axis=-1)
    assert_close(ours_TK, weights_TK, FLOAT32_VALUES)
    np.testing.assert_array_equal(
        tokens_per_expert(routing.experts_TK, config.n_routed_experts),
        reference.tokens_per_expert(experts_TK, config.n_routed_experts),
    )


def test_ties_choose_distinct_experts_within_the_kept_groups():
    """Equal scores everywhere: any choice is right that names K experts of topk_group groups, once each."""
    config = small_config()
    gate_DE = jnp.zeros((config.hidden_size, config.n_routed_experts))
    routing = route(config, gate_DE, jnp.zeros(config.n_routed_experts), jnp.ones((5, config.hidden_size)))
    group_size = config.n_routed_experts // config.n_group
    for experts in np.asarray(routing.experts_TK):
        assert len(set(experts)) == config.num_experts_per_tok
        assert len(set(experts // group_size)) <= config.topk_group
    np.testing.assert_allclose(routing.weights_TK, config.routed_scaling_factor / config.num_experts_per_tok, rtol=1e-6)


def test_bfloat16_input_is_routed_in_float32():
    """A router that rounds its product to bfloat16 cannot tell two experts apart that differ in the 12th bit."""
    config = small_config(n_group=1, topk_group=1, num_experts_per_tok=1)
    gate_DE = np.full((config.hidden_size, config.n_routed_experts), 0.125, np.float32)
    gate_DE[0, 5] += 2**-12
    x_TD = jnp.ones((3, config.hidden_size), jnp.bfloat16)
    routing = route(config, gate_DE, jnp.zeros(config.n_routed_experts), x_TD)
    np.testing.assert_array_equal(routing.experts_TK, 5)
    assert routing.weights_TK.dtype == routing.scores_TE.dtype == jnp.float32


def test_correction_bias_has_no_gradient_and_no_part_in_the_weights():
    config = small_config()
    gate_DE, bias_E, x_TD = _router(config, 1)
    cotangent_TK = np.random.default_rng(2).normal(size=(len(x_TD), config.num_experts_per_tok))

    def weigh(gate_DE, bias_E):
        return jnp.sum(route(config, gate_DE, bias_E, x_TD).weights_TK * cotangent_TK)

    gate_gradient, bias_gradient = jax.grad(weigh, argnums=(0, 1))(gate_DE, bias_E)
    np.testing.assert_array_equal(bias_gradient, 0)
    assert np.abs(gate_gradient).max() > 0
    shifted = route(config, gate_DE, bias_E + 0.25, x_TD)  # the same for every expert: nothing may change
    np.testing.assert_array_equal(shifted.weights_TK, route(config, gate_DE, bias_E, x_TD).weights_TK)


@pytest.mark.parametrize("shape", [(1, 1), (2, 17), (3, 8)])
def test_balance_loss_is_equations_17_to_20(shape):
    config = small_config()
    scores_BTE = np.random.default_rng(3).uniform(0.01, 1, (*shape, config.n_routed_experts)).astype(np.float32)
    expected = reference.balance_loss(scores_BTE, config.num_experts_per_tok)
    assert_close(balance_loss(config, scores_BTE), expected, FLOAT32_VALUES)


def test_balance_loss_is_per_sequence_and_one_when_balanced():
    """Two sequences that each use their own half of the experts are unbalanced, however even their sum is."""
    config = small_config(num_experts_per_tok=4)
    half = np.where(np.arange(8) < 4, 0.9, 1e-4).astype(np.float32)
    skewed_BTE = np.stack([np.tile(half, (6, 1)), np.tile(half[::-1], (6, 1))])
    assert float(balance_loss(config, skewed_BTE)) == pytest.approx(2, rel=1e-3)
    alternating_BTE = np.stack([np.stack([half, half[::-1]] * 3)] * 2)
    assert float(balance_loss(config, alternating_BTE)) == pytest.approx(1, rel=1e-3)


def test_balance_loss_gradient_flows_through_the_probabilities_only():
    """With f constant, dL/ds of equation 20 in closed form."""
    config = dataclasses.replace(small_config(), num_experts_per_tok=2)
    scores_TE = np.random.default_rng(4).uniform(0.1, 1, (5, 8))
    f_E = np.zeros(8)
    for scores in scores_TE:
        f_E[np.argsort(-scores)[:2]] += 8 / (2 * 5)
    totals_T1 = scores_TE.sum(axis=1, keepdims=True)
    expected_TE = (f_E - (f_E * scores_TE).sum(axis=1, keepdims=True) / totals_T1) / totals_T1 / 5
    gradient_BTE = jax.grad(lambda scores: balance_loss(config, scores))(jnp.asarray(scores_TE[None], jnp.float32))
    assert_close(gradient_BTE[0], expected_TE, FLOAT32_VALUES)
