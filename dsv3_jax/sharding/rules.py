"""Logical axes to mesh axes. The model names the dimensions of its arrays; this file alone says where they lie.

| array | where |
|---|---|
| tokens of a batch | sequences over (replica, node, gpu) |
| activations between blocks | besides, the tokens of a sequence over tensor (SP) |
| heads of attention, columns of dense feed-forwards | tensor (TP) |
| routed experts | node, gpu, tensor (EP) |
| other parameters | whole on every device |
| master weights, moments | besides, ZeRO-1: over what is left of (replica, node, gpu) |
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.sharding.mesh import AXES, BATCH_AXES, EXPERT_AXES, num_devices
from dsv3_jax.sharding.zero import Split

PARAM_RULES = {"heads": ("tensor",), "ffn": ("tensor",), "routed_experts": EXPERT_AXES}


def per_device(function: Callable, *, mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Returns a function of whole arrays that runs `function` on every device with its parts of them.

    Inside, parts travel by `sharding.collectives` alone.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(AXES), check_vma=False
    )


def batch_spec(*, leading_dims: int = 0) -> PartitionSpec:
    """Returns the partition of a batch of sequences whose batch dimension follows `leading_dims` others."""
    return PartitionSpec(*(None,) * leading_dims, BATCH_AXES)


def batch_sharding(mesh: jax.sharding.Mesh, *, leading_dims: int = 0) -> NamedSharding:
    """Returns the sharding of a batch of sequences whose batch dimension follows `leading_dims` others."""
    return NamedSharding(mesh, batch_spec(leading_dims=leading_dims))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_param(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> Split:
    """Returns how a parameter is split where it is computed with, and where its master copy and moments are kept.

    Every batch axis that does not hold different parts of the parameter already splits the first dimension that it
    divides; one that divides none keeps copies. The layer dimension is never split: a scan runs over it.
    """
    compute = [PARAM_RULES.get(axis, ()) for axis in axes]
    master = list(compute)
    left = [size // num_devices(mesh, parts) for size, parts in zip(shape, compute, strict=True)]
    for batch_axis in BATCH_AXES:
        if any(batch_axis in parts for parts in compute):
            continue
        for dim, axis in enumerate(axes):
            if axis != "layers" and left[dim] % mesh.shape[batch_axis] == 0:
                master[dim] += (batch_axis,)
                left[dim] //= mesh.shape[batch_axis]
                break
    return Split(_spec(compute), _spec(master))


def _spec(parts: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes or None for axes in parts))
