"""The device mesh: pipe, replica, node, gpu, tensor."""

import math

import jax

from dsv3_jax.config import MeshConfig, require

AXES = ("pipe", "replica", "node", "gpu", "tensor")
BATCH_AXES = ("replica", "node", "gpu")  # one sequence lives on one device of these


def make_mesh(config: MeshConfig, *, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Builds the mesh over all devices, or those given.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        require(sizes.count(-1) == 1, "mesh", sizes, "at most one axis may be -1")
        named = math.prod(size for size in sizes if size != -1)
        require(len(devices) % named == 0, "mesh", dict(zip(AXES, sizes)),
                f"{len(devices)} devices do not split by {named}; change the axes")  # fmt: skip
        sizes[sizes.index(-1)] = len(devices) // named
    require(math.prod(sizes) == len(devices), "mesh", dict(zip(AXES, sizes)),
            f"multiplies to {math.prod(sizes)}, but there are {len(devices)} devices; set one axis to -1")  # fmt: skip
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def num_batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns over how many devices the sequences of a batch spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
