"""Run by test_mesh_serving.py: prefill and decoding on 8 CPU devices beside one. Exits nonzero on a difference."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import model
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.serve import on_mesh
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import random_tokens, small_config, telling_params

BATCH, LENGTH, NUM_NEW = 8, 8, 3
# Of the norm of a row's logits, for half of the rows and for all. FP8 rounds sums over other parts of the heads, and a
# token that finds two experts equally good may take the other one.
TOLERANCES = {"fp32": (1e-5, 1e-5), "fp8": (0.06, 0.5)}


def network(precision: str) -> ModelConfig:
    """Returns a network that every axis splits; for FP8 into whole blocks."""
    changes = {"num_attention_heads": 4, "n_routed_experts": 16, "precision": precision}
    if precision == "fp8":
        changes |= dict(num_attention_heads=8, hidden_size=64, intermediate_size=512, moe_intermediate_size=32,
                        kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=64, qk_nope_head_dim=64,
                        v_head_dim=64)  # fmt: skip
    return small_config(**changes)


def serve(config, mesh, params, tokens_BT, lengths_B, tokens_BN) -> list[np.ndarray]:
    """Returns the logits after the prompts and after each further token."""
    prefill = on_mesh.make_prefill(config, mesh, batch_size=BATCH, length=LENGTH)
    decode = on_mesh.make_decode_step(config, mesh, batch_size=BATCH)
    cache = on_mesh.make_cache(config, mesh, batch_size=BATCH, max_length=LENGTH + NUM_NEW)
    placed = on_mesh.make_placement(config, mesh, for_decoding=False)(params)
    for_decoding = on_mesh.make_placement(config, mesh, for_decoding=True)(params)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), on_mesh.abstract_params(config, mesh, for_decoding=True))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), for_decoding) == expected
    logits_BV, cache = prefill(placed, tokens_BT, lengths_B, cache)
    found = [logits_BV]
    for tokens_B in tokens_BN.T:
        logits_BV, cache = decode(for_decoding, tokens_B, cache)
        found.append(logits_BV)
    return jax.device_get(found)


def serve_alone(config, params, tokens_BT, lengths_B, tokens_BN) -> list[np.ndarray]:
    """Returns what `serve` does, by the functions of the network alone."""
    params = model.cast_params(config, params)
    cache = model.init_cache(config, BATCH, LENGTH + NUM_NEW)
    logits_BV, cache = jax.jit(model.prefill, static_argnums=0)(config, params, tokens_BT, lengths_B, cache)
    found, step = [logits_BV], jax.jit(model.decode_step, static_argnums=0)
    for tokens_B in tokens_BN.T:
        logits_BV, cache = step(config, params, tokens_B, cache)
        found.append(logits_BV)
    return jax.device_get(found)


def main(precision: str) -> None:
    config = network(precision)
    params = telling_params(config, 0, init_std=0.1)
    tokens_BT, tokens_BN = random_tokens(config, 1, BATCH, LENGTH), random_tokens(config, 2, BATCH, NUM_NEW)
    lengths_B = jnp.asarray(np.random.default_rng(3).integers(1, LENGTH + 1, BATCH), jnp.int32)
    expected = serve_alone(config, params, tokens_BT, lengths_B, tokens_BN)
    for axes in ({"gpu": 1, "tensor": 4}, {"node": 2, "gpu": 2, "tensor": 2}):
        devices = jax.devices()[: int(np.prod(list(axes.values())))]
        mesh = make_mesh(MeshConfig(**axes), devices=devices)
        found = serve(config, mesh, params, tokens_BT, lengths_B, tokens_BN)
        for step, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            errors_B = np.linalg.norm(actual - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
            found_errors = np.median(errors_B), errors_B.max()
            assert np.all(found_errors <= np.array(TOLERANCES[precision])), (axes, step, found_errors)


if __name__ == "__main__":
    main(*sys.argv[1:])
