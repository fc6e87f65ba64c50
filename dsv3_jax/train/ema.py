"""Exponential moving average of the parameters, kept in host memory (§3.2.3)."""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig

LEAVES_IN_FLIGHT = 2  # averages that are on the device at one time


def init_ema(params: dict) -> dict:
    """Copies the parameters to pinned host memory, each sharded as it is on the devices."""
    return jax.tree.map(lambda param: jax.device_put(param, _on_host(param.sharding)), params)


def host_structs(params: dict) -> dict:
    """Returns shape, dtype and host sharding of the average, from those of the parameters."""
    return jax.tree.map(
        lambda param: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=_on_host(param.sharding)), params
    )


def update_ema(config: RunConfig, ema: dict, params: dict, *, is_good: jax.Array) -> dict:
    """Returns decay · ema + (1 - decay) · params in host memory, or the same numbers after a bad step.

    A parameter's average comes to the device, is updated there and goes back; at most two do so at one time, which
    bounds the device memory taken. Nothing waits for the last of them: the next step is dispatched meanwhile.
    """
    updated = []
    for average, param in zip(jax.tree.leaves(ema), jax.tree.leaves(params), strict=True):
        if len(updated) >= LEAVES_IN_FLIGHT:
            updated[-LEAVES_IN_FLIGHT].block_until_ready()
        on_device = jax.device_put(average, param.sharding)
        average_on_device = _average(on_device, param, is_good, decay=config.train.ema_decay)
        updated.append(jax.device_put(average_on_device, average.sharding))
    return jax.tree.unflatten(jax.tree.structure(ema), updated)


@functools.partial(jax.jit, static_argnames="decay", donate_argnums=0)
def _average(average: jax.Array, param: jax.Array, is_good: jax.Array, *, decay: float) -> jax.Array:
    return jnp.where(is_good, average + (1 - decay) * (param - average), average)


def _on_host(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    return sharding.with_memory_kind("pinned_host")
