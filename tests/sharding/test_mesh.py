"""Building meshes, and where the rules put arrays."""

import dataclasses
import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.sharding.mesh import AXES, BATCH_AXES, EXPERT_AXES, Work, check_mesh, make_mesh
from dsv3_jax.sharding.rules import split_param


def test_one_device_mesh_has_every_axis():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert mesh.axis_names == AXES


@pytest.mark.parametrize(
    ("axes", "fragments"),
    [
        ({"replica": 3}, ["mesh=replica=3", "8 devices do not split by 3", "replica=4, node=1, gpu=2, tensor=1"]),
        ({"replica": 2, "gpu": 2}, ["mesh=replica=2", "multiplies to 4", "8 devices", "use replica="]),
        ({"replica": -1, "gpu": -1}, ["mesh.replica·gpu=-1", "only one", "of 8 devices use"]),
        ({"gpu": 16}, ["gpu=16", "multiplies to 16", "there are 8 devices", "node=1, gpu=8"]),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_refused(axes, fragments):
    eight_devices = [None] * 8  # refused before any device is looked at
    with pytest.raises(ValueError, match="mesh") as error:
        make_mesh(MeshConfig(**axes), devices=eight_devices)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_what_is_proposed_instead_of_a_number_of_devices_splits_the_network():
    with pytest.raises(ValueError, match="there are 12 devices; of 12 devices use replica=3, node=1, gpu=2, tensor=2"):
        make_mesh(MeshConfig(gpu=2, tensor=3), devices=[None] * 12, work=Work(NETWORK, num_sequences=6))


NETWORK = ModelConfig(num_hidden_layers=2, first_k_dense_replace=1)
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


@pytest.mark.parametrize(
    ("axes", "obstacle"),
    [
        ({"tensor": 3}, "mesh.tensor=3: does not divide model.num_attention_heads=128"),
        ({"tensor": 256}, "mesh.tensor=256: does not divide model.num_attention_heads=128"),
        ({"node": 16}, "mesh.node=16: does not divide model.n_group (a group of experts lives in one node)=8"),
        ({"gpu": 3, "node": 1}, "mesh.replica·node·gpu=3: does not divide sequences of a pass=32"),
        ({"gpu": 32, "node": 8, "tensor": 2}, "mesh.replica·node·gpu=256: does not divide sequences of a pass=32"),
        ({"gpu": 32, "tensor": 16}, "mesh.node·gpu·tensor=512: does not divide model.n_routed_experts=256"),
        ({"tensor": 64}, "mesh.tensor=64: does not divide tokens per sequence=4000"),
    ],
)
def test_a_mesh_that_does_not_divide_the_network_is_refused(axes, obstacle):
    with pytest.raises(ValueError, match=re.escape(obstacle)):
        check_mesh(Work(NETWORK, sequence_length=4000, num_sequences=32), _mesh(**axes))


def test_slots_of_redundant_experts_spread_where_experts_and_groups_do_not():
    served = dataclasses.replace(NETWORK, num_nextn_predict_layers=0, n_redundant_experts=64)
    check_mesh(Work(served, num_rows=640), _mesh(node=40, gpu=2, tensor=4))
    with pytest.raises(ValueError, match=r"node·gpu·tensor=256: .*n_routed_experts \+ n_redundant_experts=320; .*use"):
        check_mesh(Work(served, num_rows=512), _mesh(gpu=128, tensor=2))


def test_fp8_parts_are_whole_blocks():
    work = Work(dataclasses.replace(NETWORK, precision="fp8", num_attention_heads=8, v_head_dim=64))
    check_mesh(work, _mesh(tensor=2))
    with pytest.raises(ValueError, match=r"mesh\.tensor=8.*leaves 64 of .*v_head_dim=512.*multiple of 128; of 8"):
        check_mesh(work, _mesh(tensor=8))


def test_rows_that_are_decoded_split_over_all_devices():
    check_mesh(Work(NETWORK, num_rows=24), _mesh(gpu=4, tensor=2))
    with pytest.raises(ValueError, match="replica·node·gpu·tensor=16: does not divide rows=24; no mesh of 16 devices"):
        check_mesh(Work(NETWORK, num_rows=24), _mesh(gpu=8, tensor=2))


def test_the_proposed_mesh_splits_all_and_uses_as_many_devices_as_can_be():
    """200 random networks and meshes; what splits is counted here by hand."""
    rng = np.random.default_rng(0)

    def splits(model, length, sequences, replica, node, gpu, tensor):
        return not any((model.num_attention_heads % tensor, length % tensor, sequences % (replica * node * gpu),
                        model.n_group % node, model.n_routed_experts % (node * gpu * tensor)))  # fmt: skip

    num_refused = 0
    for _ in range(200):
        groups, length, sequences = rng.integers(1, 7), int(rng.integers(4, 40)), int(rng.integers(1, 13))
        model = dataclasses.replace(
            NETWORK, num_attention_heads=int(rng.integers(1, 13)), n_routed_experts=int(groups * rng.integers(2, 9)),
            n_group=int(groups), topk_group=1, num_experts_per_tok=1, first_k_dense_replace=0,
        )  # fmt: skip
        axes = {axis: int(size) for axis, size in zip(AXES[1:], rng.choice([1, 1, 2, 3, 4], 4))}
        work = Work(model, length, sequences)
        if splits(model, length, sequences, **axes):
            check_mesh(work, _mesh(**axes))
            continue
        num_refused += 1
        with pytest.raises(ValueError, match="does not divide") as error:
            check_mesh(work, _mesh(**axes))
        proposed = [int(size) for size in re.findall(r"(?:replica|node|gpu|tensor)=(\d+)", str(error.value))[-4:]]
        assert splits(model, length, sequences, *proposed), str(error.value)
        number = math.prod(axes.values())
        larger = [sizes for sizes in itertools.product(range(1, number + 1), repeat=4)
                  if math.prod(proposed) < math.prod(sizes) <= number] if number <= 8 else []  # fmt: skip
        assert not any(splits(model, length, sequences, *sizes) for sizes in larger), str(error.value)
    assert num_refused > 100
