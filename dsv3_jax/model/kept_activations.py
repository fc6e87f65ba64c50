"""Counts what blocks keep for the backward pass, from the program itself: nothing is computed or allocated."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import rope
from dsv3_jax.model.block import SAVED_NAMES, Block
from dsv3_jax.model.params import compute_dtype, prepare_from_specs, with_masters
from dsv3_jax.sharding.collectives import SEQUENCE_AXIS
from dsv3_jax.sharding.mesh import BATCH_AXES
from dsv3_jax.sharding.rules import per_device, split_param


def kept_bytes(
    config: ModelConfig, *, batch_size: int, length: int, mesh: jax.sharding.Mesh | None = None
) -> dict[str, dict[str, int]]:
    """Returns the bytes that one block of each kind keeps of a pass over batch_size sequences of the given length.

    Args:
      mesh: counted is what each device keeps of its part of the sequences; None: what one device keeps of all.

    Returns:
      By kind of block ("dense", "moe"; those that exist), then by what is kept: "block_input", the names of
      `model.remat_policy`, and "intermediate" for what has no name: everything under "none". Weights, which the
      backward pass reads where they are, do not count.
    """
    kinds = {"dense": (False, config.num_dense_layers), "moe": (True, config.num_moe_layers)}
    return {
        kind: _block_bytes(config, is_moe, batch_size, length, mesh)
        for kind, (is_moe, number) in kinds.items()
        if number
    }


def _block_bytes(
    config: ModelConfig, is_moe: bool, batch_size: int, length: int, mesh: jax.sharding.Mesh | None
) -> dict[str, int]:
    graphdef, state = nnx.split(Block(config, is_moe=is_moe))
    specs = nnx.to_pure_dict(state)
    masters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs)
    x_BTD = jax.ShapeDtypeStruct((batch_size, length, config.hidden_size), compute_dtype(config))
    rotation = jax.eval_shape(functools.partial(rope.rotation, config), jax.ShapeDtypeStruct((length,), jnp.int32))
    named = []  # (name, shape, dtype) of what the policy would save
    found = []  # the block's input, if it is kept as it is, and what else is kept

    def run(params, x_BTD, rotation):
        y_BTD, _, statistics = nnx.merge(graphdef, nnx.State(params))(x_BTD, *rotation)
        return y_BTD, statistics

    def residuals(masters, x_BTD, rotation):
        params = prepare_from_specs(config, specs, masters)
        layer = _recording_remat(run, SAVED_NAMES[config.remat_policy], named)

        def block(masters, x_BTD):
            return layer(with_masters(params, masters), x_BTD, rotation)

        _, backward = jax.vjp(block, masters, x_BTD)
        shared = {id(leaf) for leaf in jax.tree.leaves((params, masters, rotation))}
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in shared}
        block_input = leaves.pop(id(x_BTD), None)  # None: only a reshaped one is kept, among the others
        found.append((_struct(block_input), [_struct(leaf) for leaf in leaves.values()]))
        return jnp.zeros(())

    if mesh is not None:
        parts = jax.tree.map(lambda spec: split_param(mesh, spec.shape, spec.axes).compute, specs)
        in_specs = (parts, PartitionSpec(BATCH_AXES, SEQUENCE_AXIS), PartitionSpec())
        residuals = per_device(residuals, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec())
    jax.eval_shape(residuals, masters, x_BTD, rotation)
    return _sum_by_name(*found[-1], named)


def _struct(array: jax.Array | None) -> jax.ShapeDtypeStruct | None:
    return None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)


def _recording_remat(layer_function, names: tuple[str, ...] | None, named: list):
    """Wraps a layer as `block.remat` does and notes what the policy saves."""
    if names is None:
        return layer_function

    def is_saved(primitive, *avals, **params) -> bool:
        if primitive.name != "name" or params["name"] not in names:
            return False
        named.append((params["name"], avals[0].shape, avals[0].dtype))
        return True

    return jax.checkpoint(layer_function, policy=is_saved, prevent_cse=False)


def _sum_by_name(
    block_input: jax.ShapeDtypeStruct | None, kept: list[jax.ShapeDtypeStruct], named: list
) -> dict[str, int]:
    """Adds up arrays by the name under which one of their shape and dtype was saved; each name serves once."""
    total = {} if block_input is None else {"block_input": _num_bytes(block_input)}
    unclaimed = list(named)
    for array in kept:
        same = [entry for entry in unclaimed if entry[1:] == (array.shape, array.dtype)]
        name = same[0][0] if same else "intermediate"
        if same:
            unclaimed.remove(same[0])
        total[name] = total.get(name, 0) + _num_bytes(array)
    return total


def _num_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
