"""Prefill and decoding on a mesh: one program per device, in the layouts of §3.4.

Both tell how many tokens chose each expert, on the devices, so that nothing waits for it. With redundant experts a
server adds that up, and now and then it places copies of what has become busy (§3.4.1); nothing is compiled again:

    place = placed_params.make_placement(config, mesh, for_decoding=True)
    decode = make_decode_step(config, mesh, batch_size=batch_size)
    params = place(masters, placed_params.balance_experts(config, mesh, loads_LE))
    loads_LE = 0
    for tokens_B in ...:
        logits_BV, cache, tokens_per_expert_LE = decode(params, tokens_B, cache)
        loads_LE += tokens_per_expert_LE
    params = place(masters, placed_params.balance_experts(config, mesh, jax.device_get(loads_LE)))
"""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Cache, decode_step, init_cache, prefill
from dsv3_jax.serve.placed_params import param_partition
from dsv3_jax.sharding.mesh import BATCH_AXES, Work, check_mesh
from dsv3_jax.sharding.rules import batch_spec, per_device


def make_prefill(config: ModelConfig, mesh: jax.sharding.Mesh, *, batch_size: int, length: int) -> Callable:
    """Builds `prefill(params, tokens_BT, lengths_B, cache) -> (logits_BV, cache, tokens_per_expert_LE)`.

    As `model.prefill`; cache is donated. The experts' tokens are those of the whole batch, a copy on every device.

    Args:
      batch_size: prompts, over all devices.
      length: tokens that prompts are padded to.

    Raises:
      ValueError: the network, the prompts or their tokens do not split evenly over the mesh.
    """
    check_mesh(Work(config, sequence_length=length, num_sequences=batch_size), mesh)

    def run(params: dict, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple:
        return prefill(config, params, tokens_BT, lengths_B, cache)

    rows, cached = batch_spec(), cache_partition(config)
    in_specs = (param_partition(config, mesh, for_decoding=False), rows, rows, cached)
    out_specs = (rows, cached, PartitionSpec())
    return jax.jit(per_device(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs), donate_argnums=3)


def make_decode_step(config: ModelConfig, mesh: jax.sharding.Mesh, *, batch_size: int) -> Callable:
    """Builds `decode(params, tokens_B, cache) -> (logits_BV, cache, tokens_per_expert_LE)`.

    As `model.decode_step`; cache is donated. The experts' tokens are those of the whole batch, a copy on every device.

    Args:
      batch_size: rows, over all devices; the devices of a tensor axis share the feed-forward work of their rows.

    Raises:
      ValueError: the network or the rows do not split evenly over the mesh.
    """
    check_mesh(Work(config, num_rows=batch_size), mesh)

    def run(params: dict, tokens_B: jax.Array, cache: Cache) -> tuple:
        return decode_step(config, params, tokens_B, cache)

    rows, cached = batch_spec(), cache_partition(config)
    in_specs = (param_partition(config, mesh, for_decoding=True), rows, cached)
    out_specs = (rows, cached, PartitionSpec())
    return jax.jit(per_device(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs), donate_argnums=2)


def make_cache(config: ModelConfig, mesh: jax.sharding.Mesh, *, batch_size: int, max_length: int) -> Cache:
    """Returns an empty cache as `model.init_cache`, every device with its rows."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_partition(config))
    return jax.jit(lambda: init_cache(config, batch_size, max_length), out_shardings=shardings)()


def cache_partition(config: ModelConfig) -> Cache:
    """Returns how a cache lies: rows over the batch axes, each with its latents whole."""
    return Cache((PartitionSpec(BATCH_AXES),) * config.num_hidden_layers, PartitionSpec(BATCH_AXES))
