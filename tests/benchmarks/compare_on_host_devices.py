"""Prints, as JSON, planned beside measured memory of a tiny step on four host devices, and its state's bytes by hand.

A process of its own, for the number of host devices is fixed when JAX starts.
"""

import json
import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax

from dsv3_jax.benchmarks.planned_memory import compare
from dsv3_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from dsv3_jax.model import param_shardings, param_specs
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import small_config


def main() -> None:
    config = RunConfig(
        model=small_config(num_nextn_predict_layers=0),
        mesh=MeshConfig(node=2, gpu=2), data=DataConfig(sequence_length=16),
        train=TrainConfig(batch_size=8, batch_ramp_tokens=0, adam_moments="fp32"),
    )  # fmt: skip
    mesh = make_mesh(config.mesh)
    specs, shardings = param_specs(config.model), param_shardings(config.model, mesh)
    parts = jax.tree.map(lambda spec, sharding: math.prod(sharding.shard_shape(spec.shape)), specs, shardings)
    tokens = 2 * 17 * 4  # two sequences a device
    by_hand = 3 * 4 * sum(jax.tree.leaves(parts)) + tokens  # weights and two moments in float32
    print(json.dumps(compare(config, mesh) | {"by_hand": by_hand}))


if __name__ == "__main__":
    main()
