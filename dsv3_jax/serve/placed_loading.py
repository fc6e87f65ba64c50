"""Parameters for serving read from disk, layer by layer: every device holds its own parts and no others (§3.4).

A block of a parameter, such as one expert, goes from disk to the devices whose slots it fills. Besides what it will
serve with, a device holds its part of one layer as it is stored, a host one parameter of a layer. Each process reads
what its own devices need, so that a network is placed on any number of them, in any number of slots.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.fp8.weight import warn_without_kernels
from dsv3_jax.model import ParamSpec, param_specs, slot_specs, split_layers
from dsv3_jax.model.params import cast_from_specs
from dsv3_jax.serve.placed_params import (
    SLOTS,
    Slots,
    abstract_params,
    check_placement,
    partition_placed,
    with_experts,
)
from dsv3_jax.sharding.mesh import Work, check_mesh
from dsv3_jax.sharding.rules import per_device, split_param


def load_placed(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    stored: dict,
    expert_of_slot_LS: np.ndarray | None = None,
    *,
    for_decoding: bool,
) -> dict:
    """Returns what `placed_params.make_placement` makes of parameters on disk; all processes of the mesh call.

    Args:
      stored: tree of `param_specs`, or more. Leaves have a `shape` and return an array for `leaf[()]`, of stacks for
        `leaf[(layer,)]` and of their experts for `leaf[(layer, expert)]`: those of `checkpoint.stored_params` and
        `checkpoint.hf_stored` do, which read one such block at a time, and numpy arrays.
      expert_of_slot_LS: see `make_placement`.

    Raises:
      ValueError: a mesh that does not split the network, a placement that does not fit, a parameter that is missing or
        has another shape.
    """
    check_mesh(Work(config), mesh)
    _require_stored(param_specs(config), stored, "")
    slots, placed = check_placement(config, expert_of_slot_LS), {}
    if config.precision == "fp8":
        warn_without_kernels()
    abstract = abstract_params(config, mesh, for_decoding=for_decoding)
    for name, spec in slot_specs(config).items():
        if isinstance(spec, dict):
            layers = _load_layers(config, mesh, name, spec, stored, slots, for_decoding=for_decoding)
            is_split = isinstance(abstract[name], tuple)
            placed[name] = sum(layers, ()) if is_split else _fill_stack(abstract[name], layers)
        else:
            arrange = _arrangement(config, mesh, {name: spec}, for_decoding=for_decoding)
            placed |= arrange(_read(mesh, {name: spec}, stored, None, None), None)
    return placed


def _load_layers(
    config: ModelConfig, mesh: jax.sharding.Mesh, name: str, specs: dict, stored: dict, slots: Slots | None, *,
    for_decoding: bool,
) -> Iterator[Any]:  # fmt: skip
    """Yields the layers of a stack as they are computed with, each as a stack, or a tuple, of one."""
    of_layer = {name: jax.tree.map(lambda spec: dataclasses.replace(spec, shape=(1, *spec.shape[1:])), specs)}
    arrange = _arrangement(config, mesh, of_layer, for_decoding=for_decoding)
    for layer in range(jax.tree.leaves(specs)[0].shape[0]):
        if slots is None or name != "moe_layers":
            experts_S, slots_1EC = np.arange(config.n_routed_experts), None
        else:
            experts_S, slots_1EC = slots.expert_of_slot_LS[layer], slots.slots_of_expert_LEC[layer : layer + 1]
        yield arrange(_read(mesh, of_layer, stored, layer, experts_S), slots_1EC)[name]


def _arrangement(config: ModelConfig, mesh: jax.sharding.Mesh, specs: dict, *, for_decoding: bool) -> Callable:
    """Returns the program that casts what was read: (params, slots of every expert or None) -> params."""

    def run(params: dict, slots_1EC: jax.Array | None) -> dict:
        params = cast_from_specs(config, specs, params)
        if slots_1EC is not None:
            params = with_experts(params, params["moe_layers"]["mlp"]["experts"] | {SLOTS: slots_1EC})
        return split_layers(params) if for_decoding else params

    def run_placed(params: dict, slots_1EC: np.ndarray | None) -> dict:
        partition = jax.tree.map(lambda spec: split_param(mesh, spec.shape, spec.axes).compute, _on_disk(specs))
        placed_partition = partition_placed(mesh, specs, jax.eval_shape(run, params, slots_1EC))
        in_specs = (partition, PartitionSpec())
        return per_device(run, mesh=mesh, in_specs=in_specs, out_specs=placed_partition)(params, slots_1EC)

    return jax.jit(run_placed)


def _read(mesh: jax.sharding.Mesh, specs: dict, stored: dict, layer: int | None, experts_S: np.ndarray | None) -> dict:
    """Reads parameters, one layer of those of stacks, experts by slots, onto the devices that compute with them."""
    return {
        name: _read(mesh, spec, stored[name], layer, experts_S)
        if isinstance(spec, dict)
        else _read_leaf(mesh, spec, stored[name], layer, experts_S)
        for name, spec in _on_disk(specs).items()
    }


def _on_disk(specs: dict) -> dict:
    """Returns the declarations of what is stored: without the slots of experts, which a placement says."""
    return {name: _on_disk(spec) if isinstance(spec, dict) else spec for name, spec in specs.items() if name != SLOTS}


def _read_leaf(mesh: jax.sharding.Mesh, spec: ParamSpec, stored: Any, layer: int | None, experts_S) -> jax.Array:
    """Reads each part that devices of this process compute with once, and gives it to all that do."""

    def read(region: tuple[slice, ...]) -> np.ndarray:
        if layer is None:
            return np.asarray(stored[()])[region]
        if "routed_experts" not in spec.axes:
            return np.asarray(stored[(layer,)])[region[1:]][None]
        return np.stack([np.asarray(stored[(layer, int(expert))])[region[2:]] for expert in experts_S[region[1]]])[None]

    sharding = NamedSharding(mesh, split_param(mesh, spec.shape, spec.axes).compute)
    devices_of_region = collections.defaultdict(list)
    for device, region in sharding.addressable_devices_indices_map(spec.shape).items():
        devices_of_region[tuple((part.start, part.stop) for part in region)].append(device)
    parts = []
    for region, devices in devices_of_region.items():
        values = read(tuple(itertools.starmap(slice, region)))
        parts += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, parts)


def _fill_stack(abstract: Any, layers: Iterator[Any]) -> Any:
    """Writes stacks of one layer into one stack, in place."""
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    make = jax.jit(lambda: jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), abstract),
                   out_shardings=shardings)  # fmt: skip
    write = jax.jit(
        lambda stack, layer, index: jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, index, 0), stack, layer
        ),
        donate_argnums=0, out_shardings=shardings,
    )  # fmt: skip
    stack = make()
    for index in range(jax.tree.leaves(abstract)[0].shape[0]):
        stack = write(stack, next(layers), index)  # no name keeps a layer alive while the next is read
    return stack


def _require_stored(specs: dict | ParamSpec, stored: Any, path: str) -> None:
    """Raises ValueError unless a tree has all parameters in their shapes."""
    if not isinstance(specs, dict):
        require(tuple(stored.shape) == specs.shape, path, tuple(stored.shape), f"the configuration needs {specs.shape}")
        return
    for name, spec in specs.items():
        inner = f"{path}/{name}" if path else name
        require(name in stored, inner, None, "this parameter of the configuration is missing")
        _require_stored(spec, stored[name], inner)
