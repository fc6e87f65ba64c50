"""Prefill and decoding as programs that can be planned."""

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig, require
from dsv3_jax.model import Cache, init_cache
from dsv3_jax.plan.programs import Program, outside_layers
from dsv3_jax.serve import on_mesh, placed_params
from dsv3_jax.sharding.mesh import Work, check_mesh, num_batch_shards
from dsv3_jax.sharding.rules import batch_sharding


def prefill(config: RunConfig, mesh: jax.sharding.Mesh, *, rows: int | None) -> Program:
    """Traces reading prompts of data.sequence_length tokens, `rows` (by default one) per batch shard."""
    length, shards = config.data.sequence_length, num_batch_shards(mesh)
    check_mesh(Work(config.model, length), mesh)
    batch_size = shards * (1 if rows is None else rows)
    step = on_mesh.make_prefill(config.model, mesh, batch_size=batch_size, length=length)
    params = placed_params.abstract_params(config.model, mesh, for_decoding=False)
    tokens_BT = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=batch_sharding(mesh))
    lengths_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=batch_sharding(mesh))
    cache = _abstract_cache(config, mesh, batch_size)
    work = f"reading {batch_size:,} prompts of {length:,} tokens"
    return _program(
        "prefill", step.trace(params, tokens_BT, lengths_B, cache), work, config, mesh, tokens=batch_size * length
    )


def decode(config: RunConfig, mesh: jax.sharding.Mesh, *, rows: int | None) -> Program:
    """Traces one token for `rows` sequences (by default one per tensor device) per batch shard.

    Caches have room for data.sequence_length tokens.
    """
    length, shards, tensor = config.data.sequence_length, num_batch_shards(mesh), mesh.shape["tensor"]
    check_mesh(Work(config.model), mesh)
    rows = tensor if rows is None else rows
    require(rows % tensor == 0, "--rows", rows, f"must be a multiple of mesh.tensor={tensor}, whose devices share them")
    batch_size = shards * rows
    step = on_mesh.make_decode_step(config.model, mesh, batch_size=batch_size)
    params = placed_params.abstract_params(config.model, mesh, for_decoding=True)
    tokens_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=batch_sharding(mesh))
    cache = _abstract_cache(config, mesh, batch_size)
    work = f"one token for {batch_size:,} sequences with caches of {length:,} tokens"
    return _program("decode", step.trace(params, tokens_B, cache), work, config, mesh, tokens=batch_size)


def _abstract_cache(config: RunConfig, mesh: jax.sharding.Mesh, batch_size: int) -> Cache:
    """Returns shape, dtype and sharding of a cache with room for data.sequence_length tokens."""
    cache = jax.eval_shape(lambda: init_cache(config.model, batch_size, config.data.sequence_length))
    rows = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows), cache)


def _program(
    name: str, traced: jax.stages.Traced, work: str, config: RunConfig, mesh: jax.sharding.Mesh, *, tokens: int
) -> Program:
    return Program(
        name=name,
        traced=traced,
        work=work,
        tokens=tokens,
        needed_flops=None,
        expert_rows=tokens * config.model.num_experts_per_tok // mesh.size,
        num_passes=1,
        weight_sizes=frozenset(),  # nothing is differentiated
        outside_layers=outside_layers(config, mesh),
        is_differentiated=False,
    )
