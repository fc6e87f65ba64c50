"""Run by test_mesh_decoding.py: decoding with one expert on each of 16 CPU devices, as §3.4.2 has it on 320 GPUs.

Exits nonzero on a difference.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import model
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.model.moe import exchange_capacity
from dsv3_jax.plan import hlo, traffic
from dsv3_jax.serve import on_mesh, placed_params
from dsv3_jax.sharding.mesh import make_mesh, num_devices
from dsv3_jax.testing.networks import random_tokens, small_config, telling_params
from dsv3_jax.testing.tolerances import assert_close

AXES, ROWS_PER_DEVICE, BUSY_EXPERT = {"node": 4, "gpu": 2, "tensor": 2}, 32, 5
BATCH = 16 * ROWS_PER_DEVICE
CONFIG = small_config(
    num_hidden_layers=2, num_attention_heads=2, n_routed_experts=12, n_redundant_experts=4, topk_group=1,
    num_experts_per_tok=2, num_nextn_predict_layers=0,
)  # fmt: skip


class Decoding:
    """One token for every row of an empty cache."""

    def __init__(self, config: ModelConfig):
        self.config, self.mesh = config, make_mesh(MeshConfig(**AXES), devices=jax.devices()[:16])
        self.capacity = exchange_capacity(config, ROWS_PER_DEVICE, functools.partial(num_devices, self.mesh))
        self.place = placed_params.make_placement(config, self.mesh, for_decoding=True)
        self.step = on_mesh.make_decode_step(config, self.mesh, batch_size=BATCH)

    def run(self, params: dict, tokens_B: np.ndarray, loads_LE: np.ndarray) -> tuple[jax.Array, np.ndarray]:
        """Returns logits and the tokens of every expert, with copies of experts as is good for such loads."""
        placed = self.place(params, placed_params.balance_experts(self.config, self.mesh, loads_LE))
        logits_BV, _, tokens_per_expert_LE = self.step(placed, tokens_B, self._cache())
        return logits_BV, np.asarray(tokens_per_expert_LE)

    def busiest_slot(self, loads_LE: np.ndarray, planned_for_LE: np.ndarray) -> float:
        """Returns the most tokens that come to a device of one expert."""
        placement_LS = placed_params.balance_experts(self.config, self.mesh, planned_for_LE)
        copies_LE = np.stack([np.bincount(slots, minlength=loads_LE.shape[1]) for slots in placement_LS])
        return np.max(loads_LE / copies_LE)

    def sent_bytes(self) -> dict[tuple[str, ...], int]:
        """Returns what one device sends by mesh axes, by the compiled program, where one round is enough."""
        params = placed_params.abstract_params(self.config, self.mesh, for_decoding=True)
        program = self.step.lower(params, jnp.zeros(BATCH, jnp.int32), self._cache()).compile().as_text()
        found = traffic.collectives(hlo.parse(program), dict(self.mesh.shape), devices_per_host=4,
                                    dynamic_trips=lambda loop: 0)  # fmt: skip
        sent = collections.Counter()
        for collective in found:
            sent[collective.axes] += collective.sent_bytes
        return sent

    def _cache(self) -> model.Cache:
        return on_mesh.make_cache(self.config, self.mesh, batch_size=BATCH, max_length=1)


def main() -> None:
    spread, tokens_B = telling_params(CONFIG, 0), random_tokens(CONFIG, 1, BATCH, 1)[:, 0]
    all_to_one = jax.tree.map(jnp.copy, spread)
    mlp = all_to_one["moe_layers"]["mlp"]
    mlp["e_score_correction_bias"] = mlp["e_score_correction_bias"].at[:, BUSY_EXPERT].set(100.0)
    few, all_ = (Decoding(dataclasses.replace(CONFIG, exchange_capacity=factor)) for factor in (1.25, 1000.0))
    assert all_.capacity.is_always_enough and few.capacity.device_rows < few.capacity.node_rows < ROWS_PER_DEVICE

    alone = jax.jit(model.decode_step, static_argnums=0)
    even_LE = np.ones((CONFIG.num_moe_layers, CONFIG.n_routed_experts))
    for params in (spread, all_to_one):
        expected_BV, _, expected_LE = alone(CONFIG, params, tokens_B, model.init_cache(CONFIG, BATCH, 1))
        for decoding in (few, all_):
            logits_BV, loads_LE = decoding.run(params, tokens_B, even_LE)
            assert_close(logits_BV, expected_BV, 1e-5, f"{decoding.capacity}")
            np.testing.assert_array_equal(loads_LE, expected_LE)
        logits_BV, _ = few.run(params, tokens_B, loads_LE)  # what was observed says where copies should be
        assert_close(logits_BV, expected_BV, 1e-5, "placed for observed loads")
    assert np.all(loads_LE[:, BUSY_EXPERT] == BATCH)
    others = np.delete(loads_LE, BUSY_EXPERT, axis=1).max()
    assert few.busiest_slot(loads_LE, even_LE) == BATCH > few.busiest_slot(loads_LE, loads_LE)
    assert few.busiest_slot(loads_LE, loads_LE) == max(BATCH / 2, others)
    assert few.step._cache_size() == 1, "compiled again for other weights"

    sent, most = few.sent_bytes(), all_.sent_bytes()
    hop = {("node",): few.capacity.node_rows / ROWS_PER_DEVICE,
           ("gpu", "tensor"): few.capacity.device_rows / ROWS_PER_DEVICE}  # fmt: skip
    for axes, share in hop.items():  # packed rows are padded by a few bytes
        assert sent[axes] <= 1.2 * share * most[axes], (axes, sent[axes], most[axes])


if __name__ == "__main__":
    main()
