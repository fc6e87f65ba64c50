"""Run by test_weights.py in a process of its own with eight CPU devices. Exits nonzero on a difference.

python weights_on_devices.py codes | gradients | bytes PRECISION | bytes PRECISION fsdp
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from dsv3_jax.model import param_specs, param_splits
from dsv3_jax.model.weights import Linear, gather_weight, prepare_weight
from dsv3_jax.plan import hlo, traffic
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.sharding.rules import per_device
from dsv3_jax.sharding.zero import Part, Split, as_part
from dsv3_jax.testing.networks import QUICK_COMPILE
from dsv3_jax.train.step import lower_train_step

FP8, BF16 = (ModelConfig(precision=precision) for precision in ("fp8", "bf16"))
# shape, how the linear reads it, and the axes over which every dimension is kept in parts
WEIGHTS = {
    "whole blocks": ((256, 512), Linear(), (("replica",), ("gpu",))),
    "parts of blocks": ((2, 96, 200), Linear(batch_dims=1), (None, ("replica", "gpu"), None)),
    "part of a block's columns": ((64, 2, 48), Linear(), (None, None, ("replica", "gpu"))),
    "heads in blocks": ((8, 48, 72), Linear(contracted_dims=2), (("replica",), ("gpu",), None)),
    "experts": ((3, 4, 40, 2, 64), Linear(batch_dims=2), (None, ("gpu",), ("replica",), None, None)),
    "whole": ((130, 70), Linear(), (None, None)),
}
MESH = MeshConfig(replica=2, gpu=4)


def check_codes() -> None:
    """Devices that quantize their parts get the codes and scales of the whole weight, NaN and zeros included."""
    mesh, rng = make_mesh(MESH), np.random.default_rng(0)
    for name, (shape, linear, axes) in WEIGHTS.items():
        weight = rng.normal(size=shape).astype(np.float32) * np.exp(rng.normal(size=shape[-1])).astype(np.float32)
        weight.flat[-3:], weight.flat[: math.prod(shape) // 4] = np.nan, 0
        split = Split(P(*(None,) * len(shape)), P(*axes))

        def gather(part, split=split, linear=linear):
            found = gather_weight(prepare_weight(FP8, linear, as_part(part, split)))
            return found.forward, found.backward

        found = jax.jit(per_device(gather, mesh=mesh, in_specs=split.master, out_specs=P()))(weight)
        whole = prepare_weight(FP8, linear, jnp.asarray(weight))
        for mine, wanted in zip(jax.tree.leaves(found), jax.tree.leaves((whole.forward, whole.backward)), strict=True):
            np.testing.assert_array_equal(np.asarray(mine).view(np.uint8), np.asarray(wanted).view(np.uint8), name)


def check_gradients() -> None:
    """The gradient of a weight of which parts are gathered is the float32 sum over devices, in the parts' places."""
    mesh = make_mesh(MESH)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(16, 24)).astype(np.float32)
    dweights = rng.integers(-(2**20), 2**20, (8, 16, 24)).astype(np.float32)  # more bits than BF16 has; exact sums
    split = Split(P(None, None), P("replica", "gpu"))

    def differentiate(part, dweight):
        def loss(part):
            gathered = gather_weight(prepare_weight(BF16, Linear(), Part(part, split.further())))
            assert gathered.values.dtype == jnp.bfloat16
            return jnp.sum(gathered.master * dweight[0])

        return jax.grad(loss)(part)

    devices = P(("replica", "gpu"))
    mapped = per_device(differentiate, mesh=mesh, in_specs=(split.master, devices), out_specs=split.master)
    np.testing.assert_array_equal(jax.jit(mapped)(weight, dweights), dweights.sum(axis=0))


def run_config(precision: str, *, fsdp: bool) -> RunConfig:
    """Returns a network whose experts are whole on every device, so that nothing but weights is gathered."""
    model = ModelConfig(
        vocab_size=64, hidden_size=96, intermediate_size=160, moe_intermediate_size=32, num_hidden_layers=4,
        first_k_dense_replace=2, num_nextn_predict_layers=0, num_attention_heads=4, q_lora_rank=48, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, n_group=2, topk_group=2,
        num_experts_per_tok=2, precision=precision, remat_policy="report",
    )  # fmt: skip
    train = TrainConfig(batch_size=4, microbatch_size=4, batch_ramp_tokens=0)
    mesh = MeshConfig(replica=4, gpu=1, fsdp=fsdp)
    return RunConfig(model=model, mesh=mesh, data=DataConfig(sequence_length=16), train=train)


def check_bytes(precision: str, *, fsdp: bool) -> None:
    """The compiled step gathers linears' weights as they are multiplied, other parameters in float32, and no more.

    Once a step; with FSDP once in each pass over the layers, forward and backward.
    """
    config = run_config(precision, fsdp=fsdp)
    mesh = make_mesh(config.mesh, devices=jax.devices()[:4])
    program = hlo.parse(lower_train_step(config, mesh).compile(compiler_options=QUICK_COMPILE).as_text())
    found = traffic.collectives(program, dict(mesh.shape), devices_per_host=8, dynamic_trips=lambda loop: 1)
    gathered = sum(collective.sent_bytes for collective in found if collective.kind == "all-gather")
    expected = 0
    specs, splits = param_specs(config.model), param_splits(config.model, mesh)
    for (path, spec), split in zip(jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(splits), strict=True):
        times = 2 if fsdp and path[0].key.endswith("_layers") else 1
        expected += times * sent_bytes(precision, spec, split)
    assert gathered == expected, (gathered, expected, found)


def sent_bytes(precision: str, spec, split: Split) -> int:
    """Returns what one of four devices sends of a parameter, by its shape and partition alone."""
    parts = [dim for dim, axes in enumerate(split.master) if axes is not None]
    if not parts:
        return 0
    size = math.prod(spec.shape)
    is_read_rounded = spec.linear is not None or spec.axes in (("vocab", "embed"), ("embed", "vocab"))
    if not is_read_rounded or precision == "fp32":
        return 3 * 4 * size // 4
    if precision == "bf16" or spec.linear is None:
        return 3 * 2 * size // 4
    batch, contracted = spec.linear.batch_dims, spec.linear.contracted_dims
    scales = 0
    if parts[0] < batch:  # scales of other matrices are not here
        rows, columns = (math.prod(dims) for dims in (spec.shape[batch:][:contracted], spec.shape[batch:][contracted:]))
        scales = math.prod(spec.shape[:batch]) * -(-rows // 128) * (-(-columns // 512) * 4)
    return 3 * (size + 4 * scales) // 4


if __name__ == "__main__":
    checks = {"codes": check_codes, "gradients": check_gradients}
    checks |= {"bytes": functools.partial(check_bytes, *sys.argv[2:3], fsdp="fsdp" in sys.argv)}
    checks[sys.argv[1]]()
