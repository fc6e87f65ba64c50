"""Parameters as serving computes with them, every device with its part: cast, and experts in slots (§3.4).

With `model.n_redundant_experts`, experts lie in slots as a placement says, see `sharding.expert_placement`. When loads
have changed, parameters are placed once more: prefill and decoding take them without being compiled again. What is
placed here is on the devices already, which share it; `serve.placed_loading` reads more than they could share.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.fp8.formats import QuantizedArray
from dsv3_jax.model import ParamSpec, cast_params, is_fp8, param_specs, slot_specs, split_layers
from dsv3_jax.sharding.collectives import size
from dsv3_jax.sharding.expert_placement import place_experts, slots_of_experts
from dsv3_jax.sharding.mesh import EXPERT_AXES, INNER_AXES, num_devices
from dsv3_jax.sharding.rules import per_device, split_param
from dsv3_jax.sharding.zero import axis_names

SLOTS = "slots_of_expert"  # beside the weights of experts


class Slots(NamedTuple):
    """A placement of experts in slots, layer by layer, see `sharding.expert_placement`."""

    expert_of_slot_LS: Any  # int32
    slots_of_expert_LEC: Any  # int32


def make_placement(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> Callable:
    """Builds `place(params, expert_of_slot_LS=None) -> params`: cast for serving, every device with its parts.

    Takes parameters of `param_specs`, any float dtype, and, if there are redundant experts, the expert of every slot of
    every MoE layer, such as `balance_experts` returns; another placement needs no other program. Devices exchange one
    layer's experts at a time. For decoding, stacks of layers become tuples of layers.

    `place` raises ValueError for a placement without redundant experts or none with them, of other numbers of layers or
    slots, or without every expert.
    """
    run = _jit_placement(config, mesh, for_decoding=for_decoding)

    def place(params: dict, expert_of_slot_LS: np.ndarray | None = None) -> dict:
        return run(params, check_placement(config, expert_of_slot_LS))

    return place


def balance_experts(config: ModelConfig, mesh: jax.sharding.Mesh, tokens_per_expert_LE: np.ndarray) -> np.ndarray:
    """Returns a placement for observed loads: the expert of every slot, int32 [L, S].

    Args:
      tokens_per_expert_LE: of the MoE layers, as `model.forward` counts them, summed over batches.

    Raises:
      ValueError: see `place_experts`.
    """
    return place_experts(
        tokens_per_expert_LE,
        num_redundant=config.n_redundant_experts,
        n_group=config.n_group,
        num_nodes=mesh.shape["node"],
        devices_per_node=num_devices(mesh, INNER_AXES),
    )


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> dict:
    """Returns shape, dtype and sharding of what `make_placement` places, allocating nothing."""
    placed = jax.eval_shape(_jit_placement(config, mesh, for_decoding=for_decoding), *_abstract_masters(config))
    return jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
        placed, param_partition(config, mesh, for_decoding=for_decoding),
    )  # fmt: skip


def param_partition(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> dict:
    """Returns the tree of partitions of what `make_placement` places."""
    placed = jax.eval_shape(functools.partial(_arrange, config, for_decoding=for_decoding), *_abstract_masters(config))
    return partition_placed(mesh, slot_specs(config), placed)


def _jit_placement(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> Callable:
    """Returns the program of `make_placement`: (params, Slots or None) -> params."""
    return jax.jit(
        per_device(
            functools.partial(_arrange, config, for_decoding=for_decoding),
            mesh=mesh,
            in_specs=(_master_partition(config, mesh), PartitionSpec()),
            out_specs=param_partition(config, mesh, for_decoding=for_decoding),
        )
    )


def _master_partition(config: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
    """Returns the tree of partitions of what `place` takes: experts lie over the inner axes that divide them."""

    def partition(spec: ParamSpec) -> PartitionSpec:
        dims = split_param(mesh, spec.shape, spec.axes).compute
        shares = (_sharing(axis_names(axes), count, size_of) for axes, count in zip(dims, spec.shape, strict=True))
        return PartitionSpec(*(axes or None for axes in shares))

    size_of = functools.partial(num_devices, mesh)
    return jax.tree.map(partition, param_specs(config))


def _sharing(axes: tuple[str, ...], count: int, size_of: Callable) -> tuple[str, ...]:
    """Returns the last of the axes, as many as divide the count evenly; `size_of` tells how many devices axes have."""
    while count % size_of(axes):
        axes = axes[1:]
    return axes


def _abstract_masters(config: ModelConfig) -> tuple[dict, Slots | None]:
    """Returns shapes and dtypes of what is placed, and of a placement where experts lie in slots."""
    masters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), param_specs(config))
    if not config.n_redundant_experts:
        return masters, None
    num_slots = config.n_routed_experts + config.n_redundant_experts
    shapes = (num_slots,), (config.n_routed_experts, 1 + config.n_redundant_experts)
    return masters, Slots(*(jax.ShapeDtypeStruct((config.num_moe_layers, *shape), jnp.int32) for shape in shapes))


def _arrange(config: ModelConfig, params: dict, slots: Slots | None, *, for_decoding: bool) -> dict:
    """Returns parameters as they are computed with; inside `per_device` this device's part."""
    params = cast_params(config, params)
    if slots is not None:
        layers = params["moe_layers"]
        axes = _sharing(EXPERT_AXES, config.n_routed_experts, size)
        fill = functools.partial(_fill_slots, axes)
        experts = jax.lax.map(fill, (layers["mlp"]["experts"], slots.expert_of_slot_LS))
        params = with_experts(params, experts | {SLOTS: slots.slots_of_expert_LEC})
    return split_layers(params) if for_decoding else params


def with_experts(params: dict, experts: dict) -> dict:
    """Returns parameters with other routed experts."""
    layers = params["moe_layers"]
    return params | {"moe_layers": layers | {"mlp": layers["mlp"] | {"experts": experts}}}


def _fill_slots(axes: tuple[str, ...], layer: tuple[dict, jax.Array]) -> dict:
    """Returns the weights in this device's slots, given one layer's experts, spread over the axes, and its slots."""
    experts, expert_of_slot_S = layer
    if size(EXPERT_AXES) > 1:
        expert_of_slot_S = expert_of_slot_S.reshape(size(EXPERT_AXES), -1)[jax.lax.axis_index(EXPERT_AXES)]

    def fill(part: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(part, axes, tiled=True) if size(axes) > 1 else part
        return whole[expert_of_slot_S]

    return jax.tree.map(fill, experts)


def check_placement(config: ModelConfig, expert_of_slot_LS: np.ndarray | None) -> Slots | None:
    """Returns a placement with its inverse, None without redundant experts; raises what `make_placement` does."""
    redundant = config.n_redundant_experts
    if expert_of_slot_LS is None:
        require(not redundant, "expert_of_slot", None,
                f"model.n_redundant_experts={redundant} need a placement, such as balance_experts returns")  # fmt: skip
        return None
    expert_of_slot_LS = np.asarray(expert_of_slot_LS, np.int32)
    expected = (config.num_moe_layers, config.n_routed_experts + redundant)
    require(redundant > 0 and expert_of_slot_LS.shape == expected, "expert_of_slot", expert_of_slot_LS.shape,
            f"must be [MoE layers, slots] = {list(expected)}, with model.n_redundant_experts > 0")  # fmt: skip
    return Slots(expert_of_slot_LS, slots_of_experts(expert_of_slot_LS, config.n_routed_experts))


def partition_placed(mesh: jax.sharding.Mesh, specs: dict | ParamSpec, placed: Any) -> Any:
    """Returns the tree of partitions of parameters as they are computed with, given their declarations and shapes."""
    if isinstance(placed, tuple):
        unstacked = jax.tree.map(lambda spec: spec.unstacked(), specs)
        return tuple(partition_placed(mesh, unstacked, layer) for layer in placed)
    if isinstance(placed, dict):
        return {name: partition_placed(mesh, specs[name], value) for name, value in placed.items()}
    axes = tuple(split_param(mesh, specs.shape, specs.axes).compute)
    if not is_fp8(placed):
        return PartitionSpec(*axes)
    first, last = specs.linear.batch_dims, specs.linear.batch_dims + specs.linear.contracted_dims
    contracted, outputs = (sum(map(axis_names, dims), ()) or None for dims in (axes[first:last], axes[last:]))
    blocks = PartitionSpec(*axes[:first], outputs, contracted)
    forward = QuantizedArray(blocks, blocks, placed.forward.tile)
    own_dims = NamedSharding(mesh, PartitionSpec(*axes)).shard_shape(specs.shape)[last:]
    return dataclasses.replace(placed, forward=forward, output_dims=own_dims)
