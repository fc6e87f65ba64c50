"""Prints, as JSON, kind and `op_name` of every collective in a training step compiled for eight host devices.

A process of its own, for the number of host devices is fixed when JAX starts.
"""

import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from dsv3_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from dsv3_jax.plan import hlo
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import QUICK_COMPILE, small_config
from dsv3_jax.train.step import lower_train_step

COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


def main() -> None:
    config = RunConfig(
        model=small_config(
            num_hidden_layers=2, num_attention_heads=2, n_routed_experts=32, num_experts_per_tok=4,
            exchange_capacity=0.3, remat_policy="full", precision="bf16",
        ),
        mesh=MeshConfig(node=2, gpu=2, tensor=2), data=DataConfig(sequence_length=32),
        train=TrainConfig(batch_size=8, microbatch_size=4, batch_ramp_tokens=0),
    )  # fmt: skip
    lowered = lower_train_step(config, make_mesh(config.mesh))
    program = hlo.parse(lowered.compile(QUICK_COMPILE).as_text())
    collectives = [i for i in program.instructions.values() if i.opcode.startswith(COLLECTIVES)]
    print(json.dumps([(instruction.opcode, instruction.op_name) for instruction in collectives]))


if __name__ == "__main__":
    main()
