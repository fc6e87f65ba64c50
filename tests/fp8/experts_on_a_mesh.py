"""Run by test_fp8_experts.py in a process of its own with eight CPU devices. Exits nonzero on a difference.

One layer of experts in FP8, router and shared expert included, its output and all gradients on a mesh and on one
device. Activations are float32, so that what travels back is not rounded.
"""

import jax
import numpy as np
from flax import nnx
from float64_tiles import assert_near, random
from fp8_networks import fp8_config
from jax.sharding import PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.params import declared, prepare_from_specs, with_masters
from dsv3_jax.sharding.mesh import BATCH_AXES, EXPERT_AXES, make_mesh
from dsv3_jax.sharding.rules import per_device, split_param
from dsv3_jax.testing.networks import telling_params

# Scales are powers of two: which other rows share a tile changes a code only where it underflows. What is left is the
# order of float32 sums, and a code in a few thousand that falls on the other side of a boundary by it.
TOLERANCE = 1e-5
# Room for a quarter of what uniform routing needs: several rounds. And for all of it.
CAPACITIES = {0.25: MeshConfig(node=2, gpu=2, tensor=2), 1.25: MeshConfig(node=2, gpu=4)}


def differentiate(config, masters, x_BTD, dy_BTD):
    """Returns a layer's output and the gradients of its input and of its parameters."""
    layer = MoE(config)
    params = prepare_from_specs(config, declared(layer), masters)
    graphdef = nnx.split(layer)[0]

    def run(masters, x_BTD):
        return nnx.merge(graphdef, nnx.State(with_masters(params, masters)))(x_BTD)[0]

    y_BTD, vjp = jax.vjp(run, masters, x_BTD)
    dmasters, dx_BTD = vjp(dy_BTD)
    return y_BTD, dx_BTD, dmasters


def on_mesh(config, mesh, masters, x_BTD, dy_BTD):
    parts = jax.tree.map(lambda spec: split_param(mesh, spec.shape, spec.axes).compute, declared(MoE(config)))
    tokens = PartitionSpec(BATCH_AXES, "tensor")

    def own_share(masters, x_BTD, dy_BTD):
        y_BTD, dx_BTD, dmasters = differentiate(config, masters, x_BTD, dy_BTD)

        def sum_copies(gradient, part):
            return jax.lax.psum(gradient, EXPERT_AXES) if part == PartitionSpec(*(None,) * gradient.ndim) else gradient

        return y_BTD, dx_BTD, jax.tree.map(sum_copies, dmasters, parts)

    return jax.jit(
        per_device(own_share, mesh=mesh, in_specs=(parts, tokens, tokens), out_specs=(tokens, tokens, parts))
    )(masters, x_BTD, dy_BTD)


def main():
    assert jax.device_count() == 8
    operands = random((8, 16, 96), 0), random((8, 16, 96), 1)
    for capacity, mesh in CAPACITIES.items():
        config = fp8_config(
            n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, exchange_capacity=capacity
        )
        stacked = telling_params(config, 0, init_std=0.1)["moe_layers"]["mlp"]
        masters = jax.tree.map(lambda leaf: leaf[0], stacked)
        expected = jax.jit(differentiate, static_argnums=0)(config, masters, *operands)
        actual = on_mesh(config, make_mesh(mesh), masters, *operands)
        for (path, mine), wanted in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            name = f"{mesh}, capacity {capacity}: {jax.tree_util.keystr(path)}"
            if np.any(wanted):
                assert_near(mine, wanted, TOLERANCE, name)
            else:  # the correction bias
                assert not np.any(mine), name


if __name__ == "__main__":
    main()
