"""Run by test_fp8_training.py in a process of its own, which sees eight CPU devices. Exits nonzero on a difference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from fp8_networks import fp8_config

from dsv3_jax import model
from dsv3_jax.config import MeshConfig
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.sharding.rules import batch_sharding, replicated
from dsv3_jax.testing.networks import QUICK_COMPILE, random_tokens, telling_params


def run(config, params, tokens_BT1):
    """Returns a loss, its gradients and the tokens per expert."""

    def loss(params):
        output = model.forward(config, params, tokens_BT1[:, :-1])
        logits_BTV = model.logits(config, params, output.h_BTD)
        chosen_BT1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT1[:, 1:, None], axis=-1)
        return -chosen_BT1.mean(), output.tokens_per_expert

    return jax.value_and_grad(loss, has_aux=True)(params)


def main():
    assert jax.device_count() == 8
    config = fp8_config()
    params, tokens_BT1 = telling_params(config, 0, init_std=0.05), random_tokens(config, 1, 8, 17)
    (expected, expected_load), expected_gradients = jax.jit(
        functools.partial(run, config), compiler_options=QUICK_COMPILE
    )(params, tokens_BT1)
    mesh = make_mesh(MeshConfig(replica=2, gpu=4))
    placed = jax.device_put(params, replicated(mesh)), jax.device_put(tokens_BT1, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        (loss, load), gradients = jax.jit(functools.partial(run, config), compiler_options=QUICK_COMPILE)(*placed)

    # Rows are quantized on their own, so what is computed forward is the same; weight gradients have tiles of one
    # device's 16 tokens instead of 128, which changes their rounding: 2.6% of each of two operands.
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_array_equal(load["moe_layers"], expected_load["moe_layers"])
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        error = np.linalg.norm(np.asarray(actual) - np.asarray(wanted))
        assert error <= 0.05 * np.linalg.norm(wanted), (jax.tree_util.keystr(path), error, np.linalg.norm(wanted))


if __name__ == "__main__":
    main()
