"""What a step reads and replaces, and where it lives."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.model import init_params, param_shardings
from dsv3_jax.sharding.rules import replicated
from dsv3_jax.train.optimizer import AdamWState, adamw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything on the device that one optimizer step leaves to the next."""

    params: dict  # float32 master weights
    optimizer: AdamWState
    step: jax.Array  # int32, steps finished, skipped ones included
    bad_steps: jax.Array  # int32, steps skipped in all
    bad_steps_in_row: jax.Array  # int32, steps skipped since the last good one
    mean_loss: jax.Array  # float32, running mean of the loss of good steps; 0 before the first


def init_state(config: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Draws the state of an untrained model, every array born where `state_shardings` puts it."""

    def init(key: jax.Array) -> TrainState:
        return fresh_state(config, init_params(config.model, key, init_std=config.train.init_std))

    # It runs once: on CPU, optimizing its machine code would take four times as long as making it (20 s, not 5).
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    jitted = jax.jit(init, out_shardings=state_shardings(config, mesh), compiler_options=options)
    return jitted(jax.random.key(config.train.seed))


def fresh_state(config: RunConfig, params: dict) -> TrainState:
    """Returns the state of step 0 around the given float32 parameters."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, adamw(config.train).init(params), zero, zero, zero, jnp.zeros((), jnp.float32))


def state_shardings(config: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the sharding of every array of the state: master weights and moments alike, scalars everywhere."""
    scalar = replicated(mesh)
    params = param_shardings(config.model, mesh)
    return TrainState(params, AdamWState(scalar, params, params), scalar, scalar, scalar, scalar)


def abstract_state(config: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns shape, dtype and sharding of every array of the state, allocating nothing."""

    def init() -> TrainState:
        return fresh_state(config, init_params(config.model, jax.random.key(0), init_std=config.train.init_std))

    def place(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(init), state_shardings(config, mesh))
