"""Run by test_mesh_serving.py: prefill and decoding on 8 CPU devices beside one. Exits nonzero on a difference."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import model
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.serve import on_mesh, placed_params
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import random_tokens, small_config, telling_params

BATCH, LENGTH, NUM_NEW = 24, 8, 2
# Axes, and slots besides one for each of the 16 experts; 3 nodes of 2 divide neither experts nor groups, only slots.
# FP8, in whose reference products are slow, tries the first two and one placement: slots are the same for all weights.
MESHES = (
    ({"gpu": 1, "tensor": 4}, 0),
    ({"node": 2, "gpu": 2, "tensor": 2}, 8),
    ({"node": 3, "gpu": 2}, 2),
)
# Of the norm of a row's logits, for half of the rows and for all. FP8 rounds sums over other parts of the heads, and a
# token that finds two experts equally good may take the other one.
TOLERANCES = {"fp32": (1e-5, 1e-5), "fp8": (0.06, 0.5)}


def network(precision: str) -> ModelConfig:
    """Returns a network that every axis splits; for FP8 into whole blocks."""
    changes = {"num_attention_heads": 4, "n_routed_experts": 16, "num_nextn_predict_layers": 0, "precision": precision}
    if precision == "fp8":
        changes |= dict(num_attention_heads=8, hidden_size=64, intermediate_size=512, moe_intermediate_size=32,
                        kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=64, qk_nope_head_dim=64,
                        v_head_dim=64)  # fmt: skip
    return small_config(**changes)


class Programs:
    """Prefill and decoding on a mesh, compiled once for all parameters and placements of experts."""

    def __init__(self, config: ModelConfig, axes: dict[str, int]):
        devices = jax.devices()[: int(np.prod(list(axes.values())))]
        self.config, self.mesh = config, make_mesh(MeshConfig(**axes), devices=devices)
        self.place = [placed_params.make_placement(config, self.mesh, for_decoding=choice) for choice in (False, True)]
        self.prefill = on_mesh.make_prefill(config, self.mesh, batch_size=BATCH, length=LENGTH)
        self.decode = on_mesh.make_decode_step(config, self.mesh, batch_size=BATCH)

    def serve(self, params, placement, tokens_BT, lengths_B, tokens_BN) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (logits, tokens of every expert) of the prompts and of each further token."""
        cache = on_mesh.make_cache(self.config, self.mesh, batch_size=BATCH, max_length=LENGTH + NUM_NEW)
        placed, for_decoding = (place(params, placement) for place in self.place)
        expected = placed_params.abstract_params(self.config, self.mesh, for_decoding=True)
        assert jax.tree.all(jax.tree.map(is_like, for_decoding, expected))
        logits_BV, cache, loads_LE = self.prefill(placed, tokens_BT, lengths_B, cache)
        found = [(logits_BV, loads_LE)]
        for tokens_B in tokens_BN.T:
            logits_BV, cache, loads_LE = self.decode(for_decoding, tokens_B, cache)
            found.append((logits_BV, loads_LE))
        assert self.prefill._cache_size() == self.decode._cache_size() == 1, "compiled again for other weights"
        return jax.device_get(found)


def is_like(array: jax.Array, expected: jax.ShapeDtypeStruct) -> bool:
    has_type = (array.shape, array.dtype) == (expected.shape, expected.dtype)
    return has_type and array.sharding.is_equivalent_to(expected.sharding, array.ndim)


def serve_alone(config, params, tokens_BT, lengths_B, tokens_BN) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns what `serve` does, by the functions of the network alone."""
    params = model.cast_params(config, params)
    cache = model.init_cache(config, BATCH, LENGTH + NUM_NEW)
    logits_BV, cache, loads_LE = jax.jit(model.prefill, static_argnums=0)(config, params, tokens_BT, lengths_B, cache)
    found, step = [(logits_BV, loads_LE)], jax.jit(model.decode_step, static_argnums=0)
    for tokens_B in tokens_BN.T:
        logits_BV, cache, loads_LE = step(config, params, tokens_B, cache)
        found.append((logits_BV, loads_LE))
    return jax.device_get(found)


def placements(config: ModelConfig, mesh: jax.sharding.Mesh) -> list[np.ndarray | None]:
    """Returns placements balanced for loads, with all copies of one expert, and in no order; None without slots."""
    redundant, experts = config.n_redundant_experts, config.n_routed_experts
    if not redundant:
        return [None]
    rng = np.random.default_rng(4)
    shape = (config.num_moe_layers, experts)
    copies_of_one = np.concatenate([np.arange(experts), np.full(redundant, 5)])
    random = np.concatenate([np.arange(experts), rng.integers(0, experts, redundant)])
    return [
        placed_params.balance_experts(config, mesh, rng.gamma(0.5, size=shape)),
        np.stack([copies_of_one] * config.num_moe_layers),
        np.stack([rng.permutation(random) for _ in range(config.num_moe_layers)]),
    ]


def main(precision: str) -> None:
    network_ = network(precision)
    spread = telling_params(network_, 0, init_std=0.1)
    all_to_one = jax.tree.map(jnp.copy, spread)
    experts_mlp = all_to_one["moe_layers"]["mlp"]
    experts_mlp["e_score_correction_bias"] = experts_mlp["e_score_correction_bias"].at[:, 5].set(100.0)
    tokens_BT, tokens_BN = random_tokens(network_, 1, BATCH, LENGTH), random_tokens(network_, 2, BATCH, NUM_NEW)
    lengths_B = jnp.asarray(np.random.default_rng(3).integers(1, LENGTH + 1, BATCH), jnp.int32)
    requests = tokens_BT, lengths_B, tokens_BN
    expected = [serve_alone(network_, params, *requests) for params in (spread, all_to_one)]
    for axes, redundant in MESHES[:2] if precision == "fp8" else MESHES:
        config = dataclasses.replace(network_, n_redundant_experts=redundant)
        programs = Programs(config, axes)
        for params, wanted in zip((spread, all_to_one), expected, strict=True):
            chosen = placements(config, programs.mesh)
            for index, placement in enumerate(chosen[:1] if precision == "fp8" else chosen):
                found = programs.serve(params, placement, *requests)
                check(found, wanted, TOLERANCES[precision], (axes, index))


def check(found: list[tuple], expected: list[tuple], tolerance: tuple[float, float], case: tuple) -> None:
    """Compares logits and, where no token can find two experts equally good, the tokens of every expert."""
    for step, ((actual, loads_LE), (wanted, wanted_LE)) in enumerate(zip(found, expected, strict=True)):
        if tolerance == TOLERANCES["fp32"]:
            np.testing.assert_array_equal(loads_LE, wanted_LE, err_msg=f"{case} {step}")
        assert loads_LE.shape == wanted_LE.shape and loads_LE.sum() == wanted_LE.sum(), (case, step)
        errors_B = np.linalg.norm(actual - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        found_errors = np.median(errors_B), errors_B.max()
        assert np.all(found_errors <= np.array(tolerance)), (case, step, found_errors)


if __name__ == "__main__":
    main(*sys.argv[1:])
