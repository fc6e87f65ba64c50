"""Logical axes to mesh axes. The model names the dimensions of its arrays; this file alone says where they lie.

| array | where |
|---|---|
| activations | batch over (replica, node, gpu) |
| parameters as computed with | whole on every device |
| master weights, moments | ZeRO-1: the first dimension that divides, over (replica, node, gpu) |
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.sharding.mesh import BATCH_AXES

ACTIVATION_RULES = {"batch": BATCH_AXES}


def activation_spec(*axes: str | None) -> PartitionSpec:
    """Returns the partition of an activation whose dimensions have these logical names (None: unnamed)."""
    return PartitionSpec(*(ACTIVATION_RULES.get(axis) for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the rules' layout on the ambient mesh; without a mesh returns it unchanged."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(*axes))


def map_sequences(function: Callable, of_sequences: tuple, of_all: tuple = ()) -> jax.Array:
    """Calls function(*of_sequences, *of_all) on every device with its own sequences; without a mesh, once.

    For what XLA cannot split by itself, such as a kernel.

    Args:
      function: maps arrays whose first dimension is the batch, and others, to one with the batch first.
      of_sequences: arrays [B, ...].
      of_all: arrays that are whole on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*of_sequences, *of_all)
    own = activation_spec("batch")
    in_specs = (own,) * len(of_sequences) + (PartitionSpec(),) * len(of_all)
    return jax.shard_map(function, in_specs=in_specs, out_specs=own, check_vma=False)(*of_sequences, *of_all)


def batch_sharding(mesh: jax.sharding.Mesh, *, leading_dims: int = 0) -> NamedSharding:
    """Returns the sharding of a batch of sequences whose batch dimension follows `leading_dims` others."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_dims, BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(mesh: jax.sharding.Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Returns where a parameter lies while it is computed with."""
    del shape, axes
    return replicated(mesh)


def optimizer_sharding(mesh: jax.sharding.Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Returns where the master copy and the moments of a parameter lie (ZeRO-1).

    The layer dimension is never split: a scan over layers would gather it whole.
    """
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    spec = [None] * len(shape)
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis != "layers" and size % num_shards == 0:
            spec[dim] = BATCH_AXES
            break
    return NamedSharding(mesh, PartitionSpec(*spec))
