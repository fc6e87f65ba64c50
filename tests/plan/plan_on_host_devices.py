"""Plans small training steps for eight host devices and prints, as JSON, the plans beside bytes by arithmetic.

A process of its own, for the number of host devices is fixed when JAX starts.
"""

import json
import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from dsv3_jax.model import param_specs, param_splits
from dsv3_jax.plan import report
from dsv3_jax.plan.hardware import HARDWARE
from dsv3_jax.plan.planning import make_plan
from dsv3_jax.sharding.mesh import make_mesh

DENSE = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, first_k_dense_replace=2,
    num_nextn_predict_layers=0, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, n_group=2, topk_group=2, num_experts_per_tok=2,
    precision="fp32",
)  # fmt: skip
EXPERTS = ModelConfig(
    vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=0,
    num_nextn_predict_layers=0, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, n_group=2, topk_group=2, num_experts_per_tok=2,
    precision="fp32",
)  # fmt: skip
LENGTH, PASSES = 32, 2
CASES = {
    "zero": (DENSE, {"gpu": 8}),
    "tensor": (DENSE, {"gpu": 4, "tensor": 2}),
    "experts": (EXPERTS, {"replica": 2, "node": 2, "gpu": 2}),
}
SERVING_AXES, SERVED_ROWS = {"node": 2, "gpu": 2, "tensor": 2}, 4


def run_config(model: ModelConfig, axes: dict[str, int]) -> RunConfig:
    shards = axes.get("replica", 1) * axes.get("node", 1) * axes["gpu"]
    train = TrainConfig(batch_size=PASSES * shards, batch_ramp_tokens=0)
    return RunConfig(model=model, mesh=MeshConfig(**axes), data=DataConfig(sequence_length=LENGTH), train=train)


def stored_bytes(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Returns a device's bytes of parameters, by their partitions alone: as stored, as computed with, and whole."""
    specs, splits = (jax.tree.leaves(tree) for tree in (param_specs(config.model), param_splits(config.model, mesh)))
    sizes = dict.fromkeys(("master", "compute"), 0)
    for spec, split in zip(specs, splits, strict=True):
        for name in sizes:
            shape = list(spec.shape)
            for dim, axes in enumerate(getattr(split, name)):
                names = (axes,) if isinstance(axes, str) else axes or ()
                shape[dim] //= math.prod(mesh.shape[axis] for axis in names)
            sizes[name] += 4 * math.prod(shape)
    return sizes


def main() -> None:
    results = {}
    for name, (model, axes) in CASES.items():
        config = run_config(model, axes)
        mesh = make_mesh(config.mesh)
        plan = make_plan(config, mesh, HARDWARE["h200"])
        results[name] = report.as_json(plan) | {"stored": stored_bytes(config, mesh)}
    config = run_config(EXPERTS, SERVING_AXES)
    mesh = make_mesh(config.mesh)
    for name in ("prefill", "decode"):
        plan = make_plan(config, mesh, HARDWARE["h200"], program=name, rows=SERVED_ROWS)
        results[name] = report.as_json(plan) | {"stored": stored_bytes(config, mesh)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
