"""One optimizer step: gradients of the whole batch in passes, one update, one move of the correction biases."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from dsv3_jax.config import RunConfig, require
from dsv3_jax.model import (
    gather_params,
    masters_of,
    param_splits,
    prepare_params,
    square_slots,
    with_masters,
    with_squares,
)
from dsv3_jax.sharding.collectives import max_over, size, sum_over
from dsv3_jax.sharding.mesh import AXES, Work, check_mesh
from dsv3_jax.sharding.rules import batch_sharding, batch_spec, per_device, replicated
from dsv3_jax.sharding.zero import as_part, is_part, reduce_gradient
from dsv3_jax.train import schedule
from dsv3_jax.train.loss import Losses, Routing, training_loss
from dsv3_jax.train.optimizer import CORRECTION_BIAS, adamw, clip_factor, global_norm
from dsv3_jax.train.schedule import StepSettings
from dsv3_jax.train.state import TrainState, abstract_state, state_shardings

# What a scan stacks is zero until every iteration has written its part: 18 GB of zeros in three layers of the 671B
# network. XLA's GPU compiler leaves them out where a loop does nothing with an array but overwrite all of it.
COMPILER_OPTIONS = {"xla_gpu_enable_dus_accumulator_zero_init_elimination": True}
LOSS_MEAN_DECAY = 0.98  # the running mean that a spike is measured against remembers about 50 steps

TrainStep = Callable[[TrainState, jax.Array, StepSettings], tuple[TrainState, dict]]


def make_train_step(config: RunConfig, mesh: jax.sharding.Mesh) -> TrainStep:
    """Builds `step(state, tokens_ABT, settings) -> (state, metrics)`, compiled once for all batch sizes of the ramp.

    tokens_ABT is what `split_batch` returns. The state is donated. The caller enters `jax.set_mesh(mesh)`.

    A step whose loss or gradient is not finite, or whose loss exceeds `train.spike_factor` times its running mean,
    changes no parameter, moment or bias: it only counts as bad.

    Metrics, on the device: loss (mean cross-entropy, nats), mtp_loss, balance_loss, total_loss, grad_norm (before
    clipping), is_good, bad_steps, bad_steps_in_row, tokens_per_expert (int32, by stack, of the whole batch),
    exchange_further_rounds (int32: rounds of the expert exchange beyond the first, summed over MoE layers and passes,
    forward only; of the replica that ran most).

    Raises:
      ValueError: the network or a pass does not split evenly over the mesh.
    """
    jitted = _jit_step(config, mesh)

    def call(state: TrainState, tokens_ABT: np.ndarray, settings: StepSettings) -> tuple[TrainState, dict]:
        return jitted(state, tokens_ABT, as_scalars(config, settings))

    return call


def training_work(config: RunConfig) -> Work:
    """Returns what a mesh has to split evenly for a training step.

    Raises:
      ValueError: redundant experts, which only serving has.
    """
    require(config.model.n_redundant_experts == 0, "model.n_redundant_experts", config.model.n_redundant_experts,
            "is for prefill and decoding; train with 0")  # fmt: skip
    return Work(config.model, config.data.sequence_length, num_sequences=config.train.rows_per_pass)


def lower_train_step(config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Returns the step of `make_train_step` lowered for the mesh's devices, which need not exist."""
    return trace_train_step(config, mesh).lower()


def trace_train_step(config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """Returns the step of `make_train_step` traced for the mesh: its jaxpr, and how to lower it."""
    settings = schedule.at(config.train, step=0, tokens=0)
    scalars = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), as_scalars(config, settings))
    shape_ABT = (config.train.max_passes, config.train.rows_per_pass, config.data.sequence_length + 1)
    tokens_ABT = jax.ShapeDtypeStruct(shape_ABT, jnp.int32)
    with jax.set_mesh(mesh):
        return _jit_step(config, mesh).trace(abstract_state(config, mesh), tokens_ABT, scalars)


def _jit_step(config: RunConfig, mesh: jax.sharding.Mesh) -> Callable:
    check_mesh(training_work(config), mesh)
    shardings = state_shardings(config, mesh)
    param_parts = jax.tree.map(lambda sharding: sharding.spec, shardings.params)
    share = per_device(
        functools.partial(_device_share, config, mesh),
        mesh=mesh,
        in_specs=(param_parts, batch_spec(leading_dims=1), PartitionSpec()),
        out_specs=(param_parts, PartitionSpec(), PartitionSpec(), PartitionSpec()),
    )

    def step(state: TrainState, tokens_ABT: jax.Array, scalars: dict) -> tuple[TrainState, dict]:
        grads, squares, losses, routing = share(state.params, tokens_ABT, scalars)
        return update_state(config, state, grads, squares, losses, routing, scalars)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, leading_dims=1), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=COMPILER_OPTIONS,
    )


def _device_share(
    config: RunConfig, mesh: jax.sharding.Mesh, masters: dict, tokens_ABT: jax.Array, scalars: dict
) -> tuple[dict, dict, Losses, Routing]:
    """Computes on one device: its part of the summed gradients, sums of their squares; losses and routing of the batch.

    A gradient's sum of squares stands in its place, or None where only reading the gradient tells it. The kernels tell
    it of FP8 weights, where what they write is final: no passes, devices, or rounds of an exchange are added up.
    """
    splits = param_splits(config.model, mesh)
    is_layered = {name: config.mesh.fsdp and name.endswith("_layers") for name in masters}
    with jax.named_scope("prepare_weights"):
        parts = prepare_params(config.model, jax.tree.map(as_part, masters, splits))  # once, for all passes
    params = {name: tree if is_layered[name] else gather_params(tree) for name, tree in parts.items()}

    def loss_of_masters(masters_and_squares, tokens_BT1):
        masters, squares = masters_and_squares
        weights = with_squares(with_masters(params, masters), squares)
        return training_loss(config, weights, tokens_BT1, mtp_loss_weight=scalars["mtp_loss_weight"])

    is_final = len(tokens_ABT) == 1 and size(AXES) == 1
    unknown = jax.tree.map(lambda _: None, masters)
    masters_and_squares = masters_of(params), square_slots(params) if is_final else unknown
    gradient = jax.grad(loss_of_masters, has_aux=True)
    (grads, squares), losses, routing = _sum_over_passes(
        gradient, masters_and_squares, tokens_ABT, scalars["num_passes"]
    )
    with jax.named_scope("sum_gradients"):
        squares = jax.tree.map(jnp.sum, squares)
        grads = jax.tree.map(reduce_gradient, grads, splits, is_leaf=is_part)
    with jax.named_scope("metrics"):
        losses = jax.tree.map(lambda value: sum_over(value / scalars["num_passes"], AXES), losses)
        rounds = max_over(routing.further_rounds, "replica")  # the devices of a replica all count the same
        return grads, squares, losses, Routing(sum_over(routing.tokens_per_expert, AXES), rounds)


def as_scalars(config: RunConfig, settings: StepSettings) -> dict:
    """Returns the settings of a step as the arrays that the compiled step takes."""
    scalars = {name: np.float32(value) for name, value in dataclasses.asdict(settings).items() if name != "batch_size"}
    return scalars | {"num_passes": np.int32(settings.batch_size // config.train.rows_per_pass)}


def split_batch(config: RunConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Arranges a batch as passes: int32 [A, B/passes, T+1], A those of the largest batch, unused ones zero."""
    rows = config.train.rows_per_pass
    tokens_ABT = tokens_BT.reshape(-1, rows, tokens_BT.shape[1])
    unused = config.train.max_passes - len(tokens_ABT)
    return np.pad(tokens_ABT, ((0, unused), (0, 0), (0, 0))) if unused else tokens_ABT


@jax.named_scope("optimizer")
def update_state(config: RunConfig, state: TrainState, grads: dict, squares: dict, losses: Losses,
                 routing: Routing, scalars: dict) -> tuple[TrainState, dict]:  # fmt: skip
    """Applies the summed gradients of a batch, unless the step is bad; returns the state and the step's metrics."""
    grad_norm = global_norm(grads, squares) / scalars["num_passes"]
    is_good = jnp.isfinite(losses.total) & jnp.isfinite(grad_norm) & ~_is_spike(config, state, losses.main)

    grad_scale = clip_factor(grad_norm, clip_norm=config.train.clip_norm) / scalars["num_passes"]
    updates, optimizer = adamw(config.train).update(
        grads, state.optimizer, state.params, learning_rate=scalars["learning_rate"], grad_scale=grad_scale
    )
    params = optax.apply_updates(state.params, updates)
    params = move_correction_biases(params, routing.tokens_per_expert, speed=scalars["bias_update_speed"])
    memory = jnp.where(state.optimizer.count == 0, 0.0, LOSS_MEAN_DECAY)
    mean_loss = memory * state.mean_loss + (1 - memory) * losses.main

    changed = (params, optimizer, mean_loss)
    unchanged = (state.params, state.optimizer, state.mean_loss)
    params, optimizer, mean_loss = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), changed, unchanged)
    bad_steps = state.bad_steps + ~is_good
    bad_steps_in_row = jnp.where(is_good, 0, state.bad_steps_in_row + 1)
    metrics = {
        "loss": losses.main, "mtp_loss": losses.mtp, "balance_loss": losses.balance, "total_loss": losses.total,
        "grad_norm": grad_norm, "is_good": is_good, "bad_steps": bad_steps, "bad_steps_in_row": bad_steps_in_row,
        "tokens_per_expert": routing.tokens_per_expert, "exchange_further_rounds": routing.further_rounds,
    }  # fmt: skip
    return TrainState(params, optimizer, state.step + 1, bad_steps, bad_steps_in_row, mean_loss), metrics


def move_correction_biases(params: dict, tokens_per_expert: dict, *, speed: jax.Array) -> dict:
    """Returns the parameters with every router's bias moved by speed · sign(mean load - load) (§2.1.2)."""
    for stack, tokens_LE in tokens_per_expert.items():
        path = (stack, "block", "mlp", CORRECTION_BIAS) if stack == "mtp_layers" else (stack, "mlp", CORRECTION_BIAS)
        params = _replace(params, path, lambda bias_LE, load=tokens_LE: bias_LE + speed * _lack_sign(load))
    return params


def _sum_over_passes(gradient: Callable, params: dict, tokens_ABT: jax.Array, num_passes: jax.Array) -> tuple:
    """Sums (gradients, losses, routing) over the first num_passes passes, gradients in float32.

    The number of passes is data, so a growing batch compiles nothing. Where one pass is all, nothing is summed.
    """

    def one_pass(tokens_BT):
        grads, (losses, routing) = gradient(params, tokens_BT)
        return grads, losses, routing

    if tokens_ABT.shape[0] == 1:
        return one_pass(tokens_ABT[0])

    def add_pass(index, total):
        return jax.tree.map(lambda sum_, value: sum_ + value.astype(sum_.dtype), total, one_pass(tokens_ABT[index]))

    def zeros(value):
        dtype = jnp.float32 if jnp.issubdtype(value.dtype, jnp.floating) else value.dtype
        return jnp.zeros(value.shape, dtype)

    start = jax.tree.map(zeros, jax.eval_shape(one_pass, tokens_ABT[0]))
    return jax.lax.fori_loop(0, num_passes, add_pass, start)


def _is_spike(config: RunConfig, state: TrainState, loss: jax.Array) -> jax.Array:
    if not config.train.spike_factor:
        return jnp.zeros((), bool)
    return (state.optimizer.count > 0) & (loss > config.train.spike_factor * state.mean_loss)


def _lack_sign(tokens_LE: jax.Array) -> jax.Array:
    """Returns sign(mean - tokens) per layer as float32, in exact integer arithmetic."""
    total_L1 = jnp.sum(tokens_LE, axis=-1, keepdims=True)
    quotient_L1, remainder_L1 = total_L1 // tokens_LE.shape[-1], total_L1 % tokens_LE.shape[-1]
    at_quotient = jnp.where(remainder_L1 > 0, 1, 0)
    return jnp.where(tokens_LE == quotient_L1, at_quotient, jnp.sign(quotient_L1 - tokens_LE)).astype(jnp.float32)


def _replace(tree: dict, path: tuple[str, ...], change: Callable) -> dict:
    """Returns the tree with the leaf at the path changed."""
    name, *rest = path
    return tree | {name: _replace(tree[name], tuple(rest), change) if rest else change(tree[name])}
