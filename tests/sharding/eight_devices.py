"""Run by test_mesh_forward.py in a process of its own, which sees eight CPU devices. Exits nonzero on a difference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import model
from dsv3_jax.config import MeshConfig
from dsv3_jax.sharding.mesh import make_mesh, num_batch_shards
from dsv3_jax.sharding.rules import batch_sharding, replicated
from dsv3_jax.testing.networks import QUICK_COMPILE, random_tokens, small_config, telling_params
from dsv3_jax.testing.tolerances import FLOAT32_REORDERED, assert_close, assert_trees_close


def run_everything(config, params, tokens_BT1):
    """Returns loss, gradients, logits and loads of one pass, MTP and balance loss included."""

    def loss(params):
        output = model.forward(config, params, tokens_BT1[:, :-1], next_tokens_BT=tokens_BT1[:, 1:])
        logits_BTV = model.logits(config, params, output.h_BTD)
        total = jnp.square(logits_BTV).sum() + sum(jnp.square(h).sum() for h in output.mtp_h) + output.balance_loss
        return total, (logits_BTV, output.tokens_per_expert, output.balance_loss)

    return jax.value_and_grad(loss, has_aux=True)(params)


def main():
    assert jax.device_count() == 8
    config = small_config(num_hidden_layers=2)
    params, tokens_BT1 = telling_params(config, 0), random_tokens(config, 1, 8, 6)
    expected = jax.jit(functools.partial(run_everything, config), compiler_options=QUICK_COMPILE)(params, tokens_BT1)

    for axes in ({"replica": 2, "gpu": 4}, {"node": 2, "gpu": -1}):
        mesh = make_mesh(MeshConfig(**axes))
        assert num_batch_shards(mesh) == 8
        placed = jax.device_put(params, replicated(mesh))
        tokens = jax.device_put(tokens_BT1, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            step = jax.jit(functools.partial(run_everything, config), compiler_options=QUICK_COMPILE)
            actual = step(placed, tokens)
        (loss, (logits_BTV, loads, balance_loss)), gradients = actual
        (expected_loss, (expected_logits_BTV, expected_loads, expected_balance)), expected_gradients = expected
        assert_close(loss, expected_loss, FLOAT32_REORDERED, "loss")
        assert_close(balance_loss, expected_balance, FLOAT32_REORDERED, "balance loss")
        assert_close(logits_BTV, expected_logits_BTV, FLOAT32_REORDERED, "logits")
        assert_trees_close(gradients, expected_gradients, 4 * FLOAT32_REORDERED)
        assert loads.keys() == expected_loads.keys() == {"moe_layers", "mtp_layers"}
        for name, load in loads.items():
            np.testing.assert_array_equal(load, expected_loads[name], err_msg=name)
            assert np.all(np.asarray(load).sum(axis=-1) == tokens_BT1[:, 1:].size * config.num_experts_per_tok)
        assert logits_BTV.sharding.shard_shape(logits_BTV.shape)[0] == 1, "the batch did not stay spread"


if __name__ == "__main__":
    main()
