"""The device mesh: pipe, replica, node, gpu, tensor."""

import math

import jax

from dsv3_jax.config import MeshConfig, ModelConfig, require

AXES = ("pipe", "replica", "node", "gpu", "tensor")
BATCH_AXES = ("replica", "node", "gpu")  # sequences spread over these
EXPERT_AXES = ("node", "gpu", "tensor")  # routed experts spread over these
INNER_AXES = ("gpu", "tensor")  # the devices of one node


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


def num_devices(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, axes: str | tuple[str, ...]) -> int:
    """Returns over how many devices the named axes spread."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def num_batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns over how many devices the sequences of a batch spread."""
    return num_devices(mesh, BATCH_AXES)


def check_mesh(config: ModelConfig, mesh: jax.sharding.Mesh, *, sequence_length: int | None = None,
               num_sequences: int | None = None) -> None:  # fmt: skip
    """Raises ValueError, which names both numbers and a mesh that would work, unless the network splits over the mesh.

    Args:
      sequence_length: tokens of a sequence, where its pieces belong to the devices of the tensor axis.
      num_sequences: sequences of a pass, over all devices.
    """
    axes = mesh.shape
    tensor, nodes = axes["tensor"], axes["node"]
    require_divides("mesh.tensor", tensor, config.num_attention_heads, "model.num_attention_heads")
    if config.num_dense_layers:
        require_divides("mesh.tensor", tensor, config.intermediate_size, "model.intermediate_size")
    if sequence_length is not None:
        require_divides("mesh.tensor", tensor, sequence_length, "tokens per sequence")
    if num_sequences is not None:
        require_divides("mesh.replica·node·gpu", num_batch_shards(mesh), num_sequences, "sequences of a pass")
    if config.precision == "fp8":
        _check_fp8_tiles(config, tensor)
    if config.num_moe_layers or config.num_nextn_predict_layers:
        require_divides(
            "mesh.node·gpu·tensor", num_devices(mesh, EXPERT_AXES), config.n_routed_experts, "model.n_routed_experts"
        )
        require_divides("mesh.node", nodes, config.n_group, "model.n_group (a group of experts lives in one node)")


def require_divides(axis: str, devices: int, count: int, counted: str) -> None:
    """Raises ValueError unless a count splits evenly over the devices of an axis; proposes the largest that would."""
    best = max(size for size in range(1, min(devices, count) + 1) if count % size == 0)
    require(count % devices == 0, axis, devices, f"does not divide {counted}={count}; {best} would")


def _check_fp8_tiles(config: ModelConfig, tensor: int) -> None:
    """Requires that every device's part of a weight consists of whole 128x128 blocks, so that a mesh rounds as one."""
    if tensor == 1:
        return
    heads = config.num_attention_heads // tensor
    parts = {
        "model.num_attention_heads · v_head_dim": heads * config.v_head_dim,
        "model.num_attention_heads · (qk_nope_head_dim + qk_rope_head_dim)": heads * config.qk_head_dim,
        "model.num_attention_heads · (qk_nope_head_dim + v_head_dim)": heads
        * (config.qk_nope_head_dim + config.v_head_dim),
    }
    if config.num_dense_layers:
        parts["model.intermediate_size"] = config.intermediate_size // tensor
    for name, part in parts.items():
        require(part % 128 == 0, "mesh.tensor", tensor,
                f"leaves {part} of {name}={part * tensor} to a device; precision=fp8 needs a multiple of 128: "
                "use fewer devices on this axis, or bf16")  # fmt: skip
