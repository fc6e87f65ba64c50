"""Building meshes, and where the rules put arrays."""

import dataclasses
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.sharding.mesh import AXES, BATCH_AXES, EXPERT_AXES, check_mesh, make_mesh
from dsv3_jax.sharding.rules import split_param


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


MESH = AbstractMesh((1, 2, 2, 4, 2), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    ("shape", "axes", "compute", "master"),
    [
        ((64, 16), ("vocab", "embed"), P(None, None), P(BATCH_AXES, None)),
        ((61, 16), ("vocab", "embed"), P(None, None), P(None, BATCH_AXES)),
        ((8, 16), ("layers", "embed"), P(None, None), P(None, BATCH_AXES)),  # the layer dimension is never split
        ((4, 20), ("embed", "q_latent"), P(None, None), P(("replica", "node"), "gpu")),  # 2 · 2 and 4 divide one each
        ((8, 3), ("layers", None), P(None, None), P(None, None)),  # nothing divides: whole on every device
        ((6, 8, 64), ("q_latent", "heads", None), P(None, "tensor", None), P("replica", ("tensor", "node"), "gpu")),
        ((32, 64), ("ffn", "embed"), P("tensor", None), P(("tensor", *BATCH_AXES), None)),
        ((32, 64), ("routed_experts", "embed"), P(EXPERT_AXES, None), P((*EXPERT_AXES, "replica"), None)),
    ],
)  # fmt: skip
def test_where_parameters_lie(shape, axes, compute, master):
    split = split_param(MESH, shape, axes)
    assert (_names(split.compute), _names(split.master)) == (_names(compute), _names(master))


def _names(spec: P) -> list[tuple[str, ...]]:
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


def _mesh(**sizes) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


NETWORK = ModelConfig(num_hidden_layers=2, first_k_dense_replace=1)


@pytest.mark.parametrize(
    ("axes", "fragments"),
    [
        ({"tensor": 3}, ["mesh.tensor=3", "num_attention_heads=128", "2 would"]),
        ({"tensor": 256}, ["mesh.tensor=256", "num_attention_heads=128", "128 would"]),
        ({"node": 16}, ["mesh.node=16", "n_group", "=8", "8 would"]),
        ({"gpu": 3, "node": 1}, ["mesh.replica·node·gpu=3", "sequences of a pass=32", "2 would"]),
        ({"gpu": 32, "node": 8, "replica": 1, "tensor": 2}, ["=256", "sequences of a pass=32", "32 would"]),
        ({"gpu": 32, "tensor": 16}, ["mesh.node·gpu·tensor=512", "n_routed_experts=256", "256 would"]),
        ({"tensor": 64}, ["mesh.tensor=64", "tokens per sequence=4000", "50 would"]),
    ],
)
def test_a_mesh_that_does_not_divide_the_network_is_refused(axes, fragments):
    with pytest.raises(ValueError, match="mesh") as error:
        check_mesh(NETWORK, _mesh(**axes), sequence_length=4000, num_sequences=32)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_fp8_parts_are_whole_blocks():
    network = dataclasses.replace(NETWORK, precision="fp8", num_attention_heads=8, v_head_dim=64)
    check_mesh(network, _mesh(tensor=2))
    with pytest.raises(ValueError, match=r"mesh\.tensor=8.*leaves 64 of .*v_head_dim=512.*multiple of 128"):
        check_mesh(network, _mesh(tensor=8))
