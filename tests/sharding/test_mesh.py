"""Building meshes, and where the rules put arrays."""

import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.sharding.mesh import AXES, BATCH_AXES, make_mesh
from dsv3_jax.sharding.rules import activation_spec, optimizer_sharding, param_sharding


def test_one_device_mesh_has_every_axis():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert mesh.axis_names == AXES


@pytest.mark.parametrize(
    ("axes", "fragments"),
    [
        ({"replica": 3}, ["mesh=", "'replica': 3", "8 devices do not split by 3", "change the axes"]),
        ({"replica": 2, "gpu": 2}, ["mesh=", "'gpu': 2", "multiplies to 4", "8 devices", "set one axis to -1"]),
        ({"replica": -1, "gpu": -1}, ["mesh=", "at most one axis may be -1"]),
        ({"gpu": 16}, ["mesh=", "'gpu': 16", "multiplies to 16"]),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_refused(axes, fragments):
    eight_devices = [None] * 8  # refused before any device is looked at
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        make_mesh(MeshConfig(**axes), devices=eight_devices)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((64, 16), ("vocab", "embed"), PartitionSpec(BATCH_AXES, None)),
        ((61, 16), ("vocab", "embed"), PartitionSpec(None, BATCH_AXES)),
        ((8, 16), ("layers", "embed"), PartitionSpec(None, BATCH_AXES)),  # the layer dimension is never split
        ((8, 3), ("layers", None), PartitionSpec(None, None)),  # nothing divides: whole on every device
    ],
)
def test_optimizer_state_is_split_along_the_first_dimension_that_divides(shape, axes, expected):
    mesh = AbstractMesh((1, 2, 1, 4, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    assert optimizer_sharding(mesh, shape, axes).spec == expected
    assert param_sharding(mesh, shape, axes).spec == PartitionSpec()


def test_activations_are_split_by_sequences_over_every_batch_axis():
    assert activation_spec("batch", None, None) == PartitionSpec(("replica", "node", "gpu"), None, None)
