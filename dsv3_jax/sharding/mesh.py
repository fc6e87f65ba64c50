"""The device mesh: pipe, replica, node, gpu, tensor."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax

from dsv3_jax.config import MeshConfig, ModelConfig

AXES = ("pipe", "replica", "node", "gpu", "tensor")
BATCH_AXES = ("replica", "node", "gpu")  # sequences spread over these
EXPERT_AXES = ("node", "gpu", "tensor")  # routed experts spread over these
INNER_AXES = ("gpu", "tensor")  # the devices of one node


@dataclasses.dataclass(frozen=True)
class Work:
    """What a mesh has to split evenly."""

    model: ModelConfig
    sequence_length: int | None = None  # tokens, where pieces of a sequence belong to the devices of the tensor axis
    num_sequences: int | None = None  # of a pass, over all devices
    num_rows: int | None = None  # decoded at a time, over all devices; those of the tensor axis share them

    def obstacle(self, sizes: dict[str, int]) -> str:
        """Says which axis of a mesh of these sizes does not split what, with both numbers; empty where all do."""
        for axes, count, counted in self._counts():
            devices = math.prod(sizes[axis] for axis in axes)
            if count % devices:
                return f"mesh.{'·'.join(axes)}={devices}: does not divide {counted}={count}"
        return self._fp8_obstacle(sizes["tensor"]) if self.model.precision == "fp8" else ""

    def _counts(self) -> Iterator[tuple[tuple[str, ...], int, str]]:
        """Yields (axes, number, its name) of everything that the devices of these axes share."""
        model = self.model
        yield ("tensor",), model.num_attention_heads, "model.num_attention_heads"
        if model.num_dense_layers:
            yield ("tensor",), model.intermediate_size, "model.intermediate_size"
        if self.sequence_length is not None:
            yield ("tensor",), self.sequence_length, "tokens per sequence"
        if self.num_sequences is not None:
            yield BATCH_AXES, self.num_sequences, "sequences of a pass"
        if self.num_rows is not None:
            yield (*BATCH_AXES, "tensor"), self.num_rows, "rows"
        if model.num_moe_layers or model.num_nextn_predict_layers:
            if model.n_redundant_experts:  # experts lie in slots, in the order of their placement
                slots = model.n_routed_experts + model.n_redundant_experts
                yield EXPERT_AXES, slots, "model.n_routed_experts + n_redundant_experts"
            else:
                yield ("node",), model.n_group, "model.n_group (a group of experts lives in one node)"
                yield EXPERT_AXES, model.n_routed_experts, "model.n_routed_experts"

    def _fp8_obstacle(self, tensor: int) -> str:
        """Says which weight's parts would not be whole 128x128 blocks, so that a mesh would not round as one device."""
        if tensor == 1:
            return ""
        model = self.model
        heads = model.num_attention_heads // tensor
        parts = {
            "model.num_attention_heads · v_head_dim": heads * model.v_head_dim,
            "model.num_attention_heads · (qk_nope_head_dim + qk_rope_head_dim)": heads * model.qk_head_dim,
            "model.num_attention_heads · (qk_nope_head_dim + v_head_dim)": heads
            * (model.qk_nope_head_dim + model.v_head_dim),
        }
        if model.num_dense_layers:
            parts["model.intermediate_size"] = model.intermediate_size // tensor
        for name, part in parts.items():
            if part % 128:
                return (f"mesh.tensor={tensor}: leaves {part} of {name}={part * tensor} to a device, where "
                        "precision=fp8 needs a multiple of 128")  # fmt: skip
        return ""


def make_mesh(config: MeshConfig, *, devices: list[jax.Device] | None = None, work: Work | None = None
              ) -> jax.sharding.Mesh:  # fmt: skip
    """Builds the mesh over all devices, or those given.

    Args:
      work: what it will have to split, for the proposal of another mesh where this one cannot be.

    Raises:
      ValueError: the axes do not multiply to the number of devices; names a mesh that does.
    """
    devices = jax.devices() if devices is None else devices
    asked = {axis: getattr(config, axis) for axis in AXES}
    sizes = dict(asked)
    open_axes = [axis for axis in AXES if asked[axis] == -1]
    named = math.prod(size for size in asked.values() if size != -1)
    if len(open_axes) == 1 and len(devices) % named == 0:
        sizes[open_axes[0]] = len(devices) // named
    elif len(open_axes) > 1:
        _refuse(f"mesh.{'·'.join(open_axes)}=-1: only one axis may be what the others leave", asked, len(devices), work)
    elif open_axes:
        _refuse(f"mesh={_in_words(asked)}: {len(devices)} devices do not split by {named}", asked, len(devices), work)
    elif named != len(devices):
        _refuse(f"mesh={_in_words(asked)}: multiplies to {named}, but there are {len(devices)} devices", asked,
                len(devices), work)  # fmt: skip
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)


def num_devices(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, axes: str | tuple[str, ...]) -> int:
    """Returns over how many devices the named axes spread."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def num_batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns over how many devices the sequences of a batch spread."""
    return num_devices(mesh, BATCH_AXES)


def check_mesh(work: Work, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ValueError, which names the axis, both numbers and a mesh that would do, unless a mesh splits the work."""
    sizes = dict(mesh.shape)
    if obstacle := work.obstacle(sizes):
        _refuse(obstacle, sizes, math.prod(sizes.values()), work)


def nearest_mesh(asked: dict[str, int], most_devices: int, work: Work | None = None) -> dict[str, int]:
    """Returns the sizes of a mesh that splits the work, over as many devices as can be, as much like that asked for.

    Args:
      asked: sizes; -1 for any.
    """

    def distance(sizes: dict[str, int]) -> float:
        return sum(abs(math.log(size / asked[axis])) for axis, size in sizes.items() if asked[axis] > 0)

    for number in range(most_devices, 0, -1):
        meshes = [sizes for sizes in _meshes(number) if work is None or not work.obstacle(sizes)]
        if meshes:
            return min(meshes, key=distance)
    raise AssertionError("one device splits everything")


def _refuse(obstacle: str, asked: dict[str, int], number: int, work: Work | None) -> None:
    proposal = nearest_mesh(asked, number, work)
    found = math.prod(proposal.values())
    of_fewer = "" if found == number else f"no mesh of {number} devices splits the work, "
    devices = "1 device" if found == 1 else f"{found} devices"
    raise ValueError(f"{obstacle}; {of_fewer}of {devices} use {_in_words(proposal)}")


def _meshes(number: int) -> Iterator[dict[str, int]]:
    """Yields the sizes of all meshes without pipeline over so many devices."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    for replica, node, gpu in itertools.product(divisors, repeat=3):
        if number % (replica * node * gpu) == 0:
            yield dict(zip(AXES, (1, replica, node, gpu, number // (replica * node * gpu))))


def _in_words(sizes: dict[str, int]) -> str:
    """Writes the sizes of the axes as a run's settings name them."""
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "pipe")
