"""Prefill and decoding on a mesh: one program per device, in the layouts of §3.4."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.formats import QuantizedArray
from dsv3_jax.model import (
    Cache,
    ParamSpec,
    cast_params,
    decode_step,
    init_cache,
    is_fp8,
    param_specs,
    param_splits,
    prefill,
    split_layers,
)
from dsv3_jax.sharding.mesh import BATCH_AXES, Work, check_mesh
from dsv3_jax.sharding.rules import batch_spec, per_device, split_param
from dsv3_jax.sharding.zero import axis_names


def make_placement(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> Callable:
    """Builds `place(params) -> params`: cast for serving, every device with the parts that it computes with.

    Takes parameters of `param_specs`, any float dtype. For decoding, stacks of layers become tuples of layers.
    """
    masters = jax.tree.map(lambda split: split.compute, param_splits(config, mesh))

    def place(params: dict) -> dict:
        params = cast_params(config, params)
        return split_layers(params) if for_decoding else params

    specs = param_partition(config, mesh, for_decoding=for_decoding)
    return jax.jit(per_device(place, mesh=mesh, in_specs=(masters,), out_specs=specs))


def make_prefill(config: ModelConfig, mesh: jax.sharding.Mesh, *, batch_size: int, length: int) -> Callable:
    """Builds `prefill(params, tokens_BT, lengths_B, cache) -> (logits_BV, cache)` as `model.prefill`; cache is donated.

    Args:
      batch_size: prompts, over all devices.
      length: tokens that prompts are padded to.

    Raises:
      ValueError: the network, the prompts or their tokens do not split evenly over the mesh.
    """
    check_mesh(Work(config, sequence_length=length, num_sequences=batch_size), mesh)

    def run(params: dict, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return prefill(config, params, tokens_BT, lengths_B, cache)

    rows, cached = batch_spec(), cache_partition(config)
    in_specs = (param_partition(config, mesh, for_decoding=False), rows, rows, cached)
    return jax.jit(per_device(run, mesh=mesh, in_specs=in_specs, out_specs=(rows, cached)), donate_argnums=3)


def make_decode_step(config: ModelConfig, mesh: jax.sharding.Mesh, *, batch_size: int) -> Callable:
    """Builds `decode(params, tokens_B, cache) -> (logits_BV, cache)` as `model.decode_step`; cache is donated.

    Args:
      batch_size: rows, over all devices; the devices of a tensor axis share the feed-forward work of their rows.

    Raises:
      ValueError: the network or the rows do not split evenly over the mesh.
    """
    check_mesh(Work(config, num_rows=batch_size), mesh)

    def run(params: dict, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return decode_step(config, params, tokens_B, cache)

    rows, cached = batch_spec(), cache_partition(config)
    in_specs = (param_partition(config, mesh, for_decoding=True), rows, cached)
    return jax.jit(per_device(run, mesh=mesh, in_specs=in_specs, out_specs=(rows, cached)), donate_argnums=2)


def make_cache(config: ModelConfig, mesh: jax.sharding.Mesh, *, batch_size: int, max_length: int) -> Cache:
    """Returns an empty cache as `model.init_cache`, every device with its rows."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_partition(config))
    return jax.jit(lambda: init_cache(config, batch_size, max_length), out_shardings=shardings)()


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> dict:
    """Returns shape, dtype and sharding of what `make_placement` places, allocating nothing."""
    masters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), param_specs(config))
    placed = jax.eval_shape(make_placement(config, mesh, for_decoding=for_decoding), masters)
    specs = param_partition(config, mesh, for_decoding=for_decoding)
    return jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
        placed, specs,
    )  # fmt: skip


def cache_partition(config: ModelConfig) -> Cache:
    """Returns how a cache lies: rows over the batch axes, each with its latents whole."""
    return Cache((PartitionSpec(BATCH_AXES),) * config.num_hidden_layers, PartitionSpec(BATCH_AXES))


def param_partition(config: ModelConfig, mesh: jax.sharding.Mesh, *, for_decoding: bool) -> dict:
    """Returns the tree of partitions of what `make_placement` places."""

    def prepare(params: dict) -> dict:
        params = cast_params(config, params)
        return split_layers(params) if for_decoding else params

    masters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), param_specs(config))
    return _partition(mesh, param_specs(config), jax.eval_shape(prepare, masters))


def _partition(mesh: jax.sharding.Mesh, specs: dict | ParamSpec, placed: Any) -> Any:
    if isinstance(placed, tuple):
        unstacked = jax.tree.map(lambda spec: spec.unstacked(), specs)
        return tuple(_partition(mesh, unstacked, layer) for layer in placed)
    if isinstance(placed, dict):
        return {name: _partition(mesh, specs[name], value) for name, value in placed.items()}
    axes = tuple(split_param(mesh, specs.shape, specs.axes).compute)
    if not is_fp8(placed):
        return PartitionSpec(*axes)
    first, last = specs.linear.batch_dims, specs.linear.batch_dims + specs.linear.contracted_dims
    contracted, outputs = (sum(map(axis_names, dims), ()) or None for dims in (axes[first:last], axes[last:]))
    blocks = PartitionSpec(*axes[:first], outputs, contracted)
    forward = QuantizedArray(blocks, blocks, placed.forward.tile)
    own_dims = NamedSharding(mesh, PartitionSpec(*axes)).shard_shape(specs.shape)[last:]
    return dataclasses.replace(placed, forward=forward, output_dims=own_dims)
