"""Stacks of layers: scanning, depth, recomputation, precision."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import model
from dsv3_jax.config import REMAT_POLICIES
from dsv3_jax.testing.networks import (
    QUICK_COMPILE,
    random_tokens,
    run_layer_by_layer,
    small_config,
    telling_params,
)
from dsv3_jax.testing.tolerances import (
    BFLOAT16_VALUES,
    FLOAT32_REORDERED,
    assert_close,
    assert_trees_close,
)


def _loss(config, params, tokens_BT1):
    """Adds up every output of `forward`, weighted at random."""
    output = model.forward(config, params, tokens_BT1[:, :-1], next_tokens_BT=tokens_BT1[:, 1:])
    rng = np.random.default_rng(0)
    weigh = functools.partial(jnp.vdot, rng.normal(size=output.h_BTD.shape).astype(np.float32))
    return weigh(output.h_BTD) + sum(weigh(h_BTD) for h_BTD in output.mtp_h) + output.balance_loss


def test_scanned_stack_equals_a_loop_over_its_layers():
    config = small_config(num_hidden_layers=5, first_k_dense_replace=2, num_nextn_predict_layers=0)
    params, tokens_BT = telling_params(config, 0), random_tokens(config, 1, 2, 9)
    norm_free = params | {"norm": jnp.ones_like(params["norm"])}
    run = jax.jit(functools.partial(run_layer_by_layer, config), compiler_options=QUICK_COMPILE)
    hidden, loads = run(params, tokens_BT)
    expected = hidden[-1] / np.sqrt(np.square(hidden[-1]).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
    scanned = jax.jit(functools.partial(model.forward, config), compiler_options=QUICK_COMPILE)(norm_free, tokens_BT)
    assert_close(scanned.h_BTD, expected, FLOAT32_REORDERED)
    np.testing.assert_array_equal(scanned.tokens_per_expert["moe_layers"], np.stack(loads))


def test_program_does_not_grow_with_depth():
    """The StableHLO text of 4 and of 16 layers, forward and backward, differs in numbers only."""

    def program(num_layers):
        config = small_config(num_hidden_layers=num_layers, first_k_dense_replace=num_layers // 2)
        specs = model.param_specs(config)
        params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs)
        tokens_BT1 = random_tokens(config, 0, 1, 5)
        text = jax.jit(jax.grad(functools.partial(_loss, config))).lower(params, tokens_BT1).as_text()
        return re.sub(r"\d+", "0", text)

    assert program(4) == program(16)


def test_every_output_is_there_when_all_layers_are_dense_or_all_have_experts():
    for first_k_dense_replace, depth in ((3, 0), (0, 2), (3, 1)):
        config = small_config(first_k_dense_replace=first_k_dense_replace, num_nextn_predict_layers=depth)
        tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model.param_specs(config))
        forward = functools.partial(model.forward, config)
        output = jax.eval_shape(lambda p, t, n, f=forward: f(p, t, next_tokens_BT=n), params, tokens, tokens)
        num_moe = 3 - first_k_dense_replace
        expected = ({"moe_layers": (num_moe, 8)} if num_moe else {}) | ({"mtp_layers": (depth, 8)} if depth else {})
        assert {name: load.shape for name, load in output.tokens_per_expert.items()} == expected
        assert [h.shape for h in output.mtp_h] == [(2, 5, config.hidden_size)] * depth
        assert output.balance_loss.shape == () and output.balance_loss.dtype == jnp.float32


def test_remat_policies_change_memory_only():
    """Losses and gradients are equal; the bytes kept for the backward pass fall from none to report to full."""
    base = small_config(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
    params, tokens_BT1 = telling_params(base, 0), random_tokens(base, 1, 2, 10)
    results = {}
    for policy in REMAT_POLICIES:
        loss = functools.partial(_loss, dataclasses.replace(base, remat_policy=policy))
        results[policy] = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK_COMPILE)(params, tokens_BT1)
    for policy in ("report", "full"):
        assert_close(results[policy][0], results["none"][0], FLOAT32_REORDERED, policy)
        assert_trees_close(results[policy][1], results["none"][1], FLOAT32_REORDERED)


@pytest.mark.parametrize(
    "changes",
    [{"num_nextn_predict_layers": 0, "first_k_dense_replace": 0}, {"num_nextn_predict_layers": 0,
     "first_k_dense_replace": 3}, {"num_nextn_predict_layers": 2}],
    ids=["experts", "dense", "all with MTP"],
)  # fmt: skip
def test_bytes_kept_for_the_backward_pass_fall_from_none_to_report_to_full(changes):
    kept_bytes = {}
    for policy in REMAT_POLICIES:
        config = small_config(remat_policy=policy, **changes)
        tokens_BT1 = random_tokens(config, 1, 2, 40)
        params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model.param_specs(config))
        loss = functools.partial(_loss, config, tokens_BT1=tokens_BT1)
        residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        kept_bytes[policy] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
    assert kept_bytes["none"] > kept_bytes["report"] > kept_bytes["full"], kept_bytes


def test_report_policy_keeps_no_up_projection_and_no_norm():
    """Under "report" no residual of a layer has the width of expanded keys, values or queries (§3.2.3)."""
    config = small_config(remat_policy="report", first_k_dense_replace=3, num_nextn_predict_layers=0)
    params, tokens_BT = telling_params(config, 0), random_tokens(config, 1, 2, 10)
    _, backward = jax.vjp(lambda p: model.forward(config, p, tokens_BT).h_BTD, params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
    activations = [shape for shape in shapes if shape[:3] == (3, 2, 10)]
    assert activations
    expanded = {config.qk_head_dim, config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim}
    assert not [shape for shape in activations if len(shape) == 5 and shape[-1] in expanded], activations


@pytest.mark.parametrize("remat_policy", ["none", "report"])
def test_bfloat16_stays_close_to_float32_with_the_same_routing(remat_policy):
    """Biases far apart force the routing; what is left is rounding."""
    config = small_config(remat_policy=remat_policy)
    params, tokens_BT1 = telling_params(config, 0), random_tokens(config, 1, 2, 10)
    forced = jnp.tile(10.0 * jnp.arange(8), (2, 1))
    params["moe_layers"]["mlp"]["e_score_correction_bias"] = forced
    params["mtp_layers"]["block"]["mlp"]["e_score_correction_bias"] = forced[:1]
    rounded = dataclasses.replace(config, precision="bf16")

    def logits(config, params):
        params = model.cast_params(config, params)
        output = model.forward(config, params, tokens_BT1[:, :-1], next_tokens_BT=tokens_BT1[:, 1:])
        return [model.logits(config, params, h_BTD) for h_BTD in (output.h_BTD, *output.mtp_h)]

    exact = jax.jit(functools.partial(logits, config), compiler_options=QUICK_COMPILE)(params)
    coarse = jax.jit(functools.partial(logits, rounded), compiler_options=QUICK_COMPILE)(params)
    for expected, actual in zip(exact, coarse, strict=True):
        assert actual.dtype == jnp.float32
        assert_close(actual, expected, BFLOAT16_VALUES)
        assert not np.array_equal(actual, expected)


def test_float32_weights_get_float32_gradients_in_bfloat16_mode():
    """No gradient of a float32 master weight passes through bfloat16 (§3.3.2).

    Every token occurs several times: the gradient of a token that occurs once is a bfloat16 value by itself.
    """
    config = dataclasses.replace(small_config(), precision="bf16")
    params, tokens_BT1 = telling_params(config, 0), random_tokens(config, 1, 2, 16) % 4

    def loss(params):
        output = model.forward(config, params, tokens_BT1[:, :-1], next_tokens_BT=tokens_BT1[:, 1:])
        assert output.h_BTD.dtype == jnp.bfloat16
        return sum(jnp.square(h_BTD.astype(jnp.float32)).sum() for h_BTD in (output.h_BTD, *output.mtp_h))

    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)(params)
    del gradients["lm_head"]  # used by `train.loss`, not here
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name, gradient = jax.tree_util.keystr(path), np.asarray(leaf)
        assert gradient.dtype == np.float32, name
        if path[-1].key == "e_score_correction_bias":
            continue
        values = gradient[gradient != 0]
        assert values.size, name
        share_rounded = np.mean(values.view(np.uint32) & 0xFFFF == 0)
        assert share_rounded < 0.1, f"{name}: {share_rounded:.0%} of its values are bfloat16 values"


def test_initial_parameters():
    """Weights have the wanted spread, norms are 1 and biases 0, no two weights are alike; all float32."""
    config = small_config(hidden_size=64, vocab_size=512)
    draw = jax.jit(lambda key: model.init_params(config, key, init_std=0.05), compiler_options=QUICK_COMPILE)
    params = jax.tree.map(np.asarray, draw(jax.random.key(0)))
    specs = model.param_specs(config)
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    first_numbers = []
    for (path, value), spec in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        name = jax.tree_util.keystr(path)
        assert value.shape == spec.shape and value.dtype == jnp.float32 and len(spec.axes) == len(spec.shape), name
        if "norm" in path[-1].key:
            np.testing.assert_array_equal(value, 1, err_msg=name)
        elif path[-1].key == "e_score_correction_bias":
            np.testing.assert_array_equal(value, 0, err_msg=name)
        else:
            assert abs(float(value.std()) / 0.05 - 1) < 5 / np.sqrt(2 * value.size), name
            assert abs(float(value.mean())) < 0.05 * 5 / np.sqrt(value.size), name
            first_numbers.append(float(value.ravel()[0]))
    assert len(set(first_numbers)) == len(first_numbers)


def test_a_sequence_longer_than_the_positions_is_refused():
    config = small_config(max_position_embeddings=8)
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), model.param_specs(config))
    with pytest.raises(ValueError, match=r"sequence length=9: exceeds model.max_position_embeddings=8"):
        model.forward(config, params, jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"cache length=9: exceeds model.max_position_embeddings=8"):
        model.init_cache(config, 1, 9)


def test_one_sequence_of_one_head_is_computed_as_among_others():
    config = small_config(num_attention_heads=1, num_hidden_layers=1, num_nextn_predict_layers=0)
    params, tokens_BT = telling_params(config, 7), random_tokens(config, 1, 2, 6)
    run = jax.jit(lambda tokens_BT: model.forward(config, params, tokens_BT).h_BTD)
    np.testing.assert_allclose(run(tokens_BT[:1])[0], run(tokens_BT)[0], atol=1e-5)
