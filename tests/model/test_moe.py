"""The experts: no token dropped, no row misplaced, work that follows the tokens."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.kernels import grouped_matmul as kernel
from dsv3_jax.model.experts import ExpertWeights
from dsv3_jax.model.moe import EXPERTS, MoE
from dsv3_jax.model.weights import as_rounded
from dsv3_jax.sharding.expert_exchange import serve
from dsv3_jax.testing import reference
from dsv3_jax.testing.networks import QUICK_COMPILE, small_config, telling_params
from dsv3_jax.testing.tolerances import FLOAT32_VALUES, assert_close


def _moe_weights(config, seed: int) -> dict:
    return jax.tree.map(lambda leaf: leaf[0], telling_params(config, seed)["moe_layers"]["mlp"])


def _apply(config, weights: dict, x_BTD):
    module = nnx.merge(nnx.split(MoE(config))[0], nnx.State(weights))
    return jax.jit(lambda x_BTD: module(x_BTD), compiler_options=QUICK_COMPILE)(x_BTD)


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    """A bias that beats every score sends all tokens to experts 1, 4 and 5; every output still is equation 12."""
    config = small_config()
    weights = _moe_weights(config, 0)
    bias_E = jnp.zeros(8).at[jnp.array([1, 4, 5])].set(100.0)
    weights["e_score_correction_bias"] = bias_E
    x_BTD = np.random.default_rng(1).normal(size=(2, 33, config.hidden_size)).astype(np.float32)
    y_BTD, statistics = _apply(config, weights, x_BTD)
    expected = reference.mixture_of_experts(config, weights, x_BTD.reshape(-1, config.hidden_size))
    assert_close(y_BTD, expected.reshape(x_BTD.shape), FLOAT32_VALUES)
    np.testing.assert_array_equal(statistics.tokens_per_expert_E, [0, 66, 0, 0, 66, 66, 0, 0])


@pytest.mark.parametrize("skew", ["even", "one expert"])
def test_rows_multiplied_follow_the_tokens_not_the_experts(skew):
    """From 8 to 512 experts, the live blocks hold at most twice as many rows as there are (token, choice) pairs."""
    num_pairs = 4096
    for num_experts in (8, 64, 512):
        experts_TK = np.arange(num_pairs)[:, None] % num_experts if skew == "even" else np.zeros((num_pairs, 1), int)
        alignment = kernel.row_alignment(num_pairs, num_experts)
        counts = reference.tokens_per_expert(experts_TK, num_experts)
        assert (-(-counts // alignment) * alignment).sum() <= 2 * num_pairs


def test_no_product_runs_over_the_experts():
    """Forward and backward, the matrix products of the expert layer have a block of rows and one expert's weights."""
    num_experts = 23
    config = small_config(n_routed_experts=num_experts, n_group=1, topk_group=1, n_shared_experts=0)
    weights = _moe_weights(config, 0)

    def loss(experts, x_TD):
        choices_TK = jnp.zeros((len(x_TD), 3), jnp.int32) + jnp.arange(3)
        params = ExpertWeights(*(as_rounded(experts[name]) for name in ("gate_up_proj", "down_proj")))
        return serve(EXPERTS, x_TD, x_TD, choices_TK, jnp.ones(choices_TK.shape), params, capacity=None)[0].sum()

    x_TD = jnp.ones((2 * 9, config.hidden_size))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(weights["experts"], x_TD)
    alignment = kernel.row_alignment(2 * 9 * 3, num_experts)
    products = list(_products(jaxpr.jaxpr))
    assert products
    for shapes_of_operands in products:
        for shape in shapes_of_operands:
            assert len(shape) == 2 and num_experts not in shape, shapes_of_operands
        assert any(alignment in shape for shape in shapes_of_operands), shapes_of_operands


def test_experts_that_no_token_chose_get_zero_gradients_and_spoil_none():
    """Unread weights may hold anything, also infinities."""
    config = small_config()
    weights = _moe_weights(config, 2)
    weights["e_score_correction_bias"] = jnp.zeros(8).at[jnp.array([0, 2, 3])].set(100.0)
    unread = jnp.array([1, 4, 5, 6, 7])
    x_BTD = np.random.default_rng(3).normal(size=(1, 6, config.hidden_size)).astype(np.float32)
    graphdef = nnx.split(MoE(config))[0]

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    @jax.value_and_grad
    def loss(weights):
        return nnx.merge(graphdef, nnx.State(weights))(x_BTD)[0].sum()

    weights["experts"]["down_proj"] = weights["experts"]["down_proj"].at[unread].set(jnp.inf)
    value, gradients = loss(weights)
    assert np.isfinite(float(value))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    for leaf in jax.tree.leaves(gradients["experts"]):
        np.testing.assert_array_equal(leaf[unread], 0)
        assert np.abs(leaf[0]).max() > 0


def _products(jaxpr):
    """Yields the operand shapes of every matrix product, loop bodies included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [tuple(operand.aval.shape) for operand in equation.invars]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _products(inner)
