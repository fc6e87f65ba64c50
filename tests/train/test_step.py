import contextlib
import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import override
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train.ema import init_ema, update_ema
from dsv3_jax.train.schedule import StepSettings
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_train_step, move_correction_biases, split_batch, trace_train_step, training_work

BATCH = np.random.default_rng(0).integers(0, 61, (4, 13)).astype(np.int32)
SETTINGS = StepSettings(learning_rate=0.01, batch_size=4, mtp_loss_weight=0.3, bias_update_speed=0.5)


@contextlib.contextmanager
def count_compilations():
    """Counts what XLA compiles inside the block."""
    events = []

    def note(event: str, duration: float, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="module")
def in_one_pass(micro):
    config = override(micro, {"train.spike_factor": 2.0})
    return config, make_train_step(config, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def in_passes_of_one(micro):
    config = override(micro, {"train.microbatch_size": 1})
    return config, make_train_step(config, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def first_state(micro):
    return init_state(micro, make_mesh(micro.mesh))


@pytest.fixture
def state(first_state):
    return jax.tree.map(jnp.copy, first_state)


def run(config_and_step, state, tokens=BATCH, settings=SETTINGS):
    config, step = config_and_step
    with jax.set_mesh(make_mesh(config.mesh)):
        return step(jax.tree.map(jnp.copy, state), split_batch(config, tokens), settings)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_accumulated_passes_equal_one_pass(state, in_one_pass, in_passes_of_one):
    """Losses, gradients (seen through the first moment), loads and biases of 4 passes are those of the whole batch."""
    whole, whole_metrics = run(in_one_pass, state)
    parts, parts_metrics = run(in_passes_of_one, state)
    for name in ("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    for expected, actual in zip(jax.tree.leaves(whole.optimizer.mu), jax.tree.leaves(parts.optimizer.mu), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    for stack, load_LE in whole_metrics["tokens_per_expert"].items():
        np.testing.assert_array_equal(parts_metrics["tokens_per_expert"][stack], load_LE)
    for name in ("moe_layers", "mtp_layers"):
        assert bits(bias_of(whole.params, name)) == bits(bias_of(parts.params, name))


def bias_of(params: dict, stack: str):
    block = params[stack]["block"] if stack == "mtp_layers" else params[stack]
    return block["mlp"]["e_score_correction_bias"]


def test_bias_moves_once_by_the_sign_of_the_whole_batchs_load(state, in_passes_of_one):
    after, metrics = run(in_passes_of_one, state)
    for stack, load_LE in metrics["tokens_per_expert"].items():
        load_LE = np.asarray(load_LE, np.float64)
        assert load_LE.sum(-1).tolist() == [4 * 12 * 2]
        expected = np.asarray(bias_of(state.params, stack)) + 0.5 * np.sign(load_LE.mean(-1, keepdims=True) - load_LE)
        np.testing.assert_array_equal(bias_of(after.params, stack), expected)


def test_bias_compares_with_the_exact_mean():
    """Loads near 2^24 and a mean between two integers: float32 could not tell them apart."""
    loads = np.array([[2**24 + 1, 2**24 + 2, 2**24 + 1, 2**24 + 1], [5, 5, 5, 5]], np.int32)
    params = {"moe_layers": {"mlp": {"e_score_correction_bias": jnp.zeros((2, 4))}}}
    moved = move_correction_biases(params, {"moe_layers": jnp.asarray(loads)}, speed=jnp.float32(1))
    np.testing.assert_array_equal(bias_of(moved, "moe_layers"), [[1, -1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("reason", ["spike", "not finite"])
def test_bad_step_leaves_the_state_bitwise_unchanged(state, in_one_pass, reason):
    state, _ = run(in_one_pass, state)
    if reason == "spike":
        state = dataclasses.replace(state, mean_loss=state.mean_loss / 100)
    else:
        state.params["norm"] = state.params["norm"].at[0].set(jnp.inf)
    after, metrics = run(in_one_pass, state)
    assert not metrics["is_good"]
    for name in ("params", "optimizer", "mean_loss"):
        assert bits(getattr(after, name)) == bits(getattr(state, name)), name
    assert [int(x) for x in (after.step, after.bad_steps, after.bad_steps_in_row)] == [2, 1, 1]

    twice, _ = run(in_one_pass, after)
    assert [int(x) for x in (twice.step, twice.bad_steps, twice.bad_steps_in_row)] == [3, 2, 2]
    mended = dataclasses.replace(twice, mean_loss=jnp.float32(100), params=jax.tree.map(jnp.nan_to_num, twice.params))
    mended.params["norm"] = jnp.ones_like(mended.params["norm"])
    good, metrics = run(in_one_pass, mended)
    assert metrics["is_good"]
    assert [int(x) for x in (good.step, good.bad_steps, good.bad_steps_in_row)] == [4, 2, 0]


def test_a_growing_batch_compiles_nothing(state, in_passes_of_one):
    config, step = in_passes_of_one
    with jax.set_mesh(make_mesh(config.mesh)):
        tokens = [split_batch(config, BATCH[:rows]) for rows in (2, 4)]
        state, _ = step(state, tokens[1], SETTINGS)
        with count_compilations() as compilations:
            smaller = dataclasses.replace(SETTINGS, batch_size=2, learning_rate=0.02, mtp_loss_weight=0.1)
            state, metrics = step(state, tokens[0], smaller)
    assert compilations == []
    assert metrics["tokens_per_expert"]["moe_layers"].sum() == 2 * 12 * 2
    assert metrics["exchange_further_rounds"] == 0, "one device exchanges nothing"


def test_steps_learn_a_batch_by_heart(state, in_one_pass):
    config, step = in_one_pass
    losses = []
    with jax.set_mesh(make_mesh(config.mesh)):
        for _ in range(40):
            state, metrics = step(state, split_batch(config, BATCH), SETTINGS)
            losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(61), abs=0.5)
    assert losses[-1] < 1.0


def test_moving_average_follows_numpy_in_host_memory(state, micro):
    config = override(micro, {"train.ema_decay": 0.9})
    ema, expected = init_ema(state.params), jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    params = state.params
    for _ in range(3):
        params = jax.tree.map(lambda param: param * 1.5 + 1, params)
        ema = update_ema(config, ema, params, is_good=jnp.bool_(True))
        expected = jax.tree.map(lambda average, param: 0.9 * average + 0.1 * np.asarray(param), expected, params)
    before_bad_step = bits(ema)
    ema = update_ema(config, ema, jax.tree.map(lambda param: param * jnp.nan, params), is_good=jnp.bool_(False))
    assert bits(ema) == before_bad_step
    for average, exact in zip(jax.tree.leaves(ema), jax.tree.leaves(expected), strict=True):
        assert average.sharding.memory_kind == "pinned_host"
        np.testing.assert_allclose(average, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_backward_pass_reads_the_weights_themselves(micro, precision):
    """A copy that a scan over layers keeps of them would be as large as all weights."""
    # With this length no activation has a weight's shape.
    config = override(micro, {"model.precision": precision, "data.sequence_length": 11})
    mesh = make_mesh(config.mesh)
    traced = trace_train_step(config, mesh)
    params = abstract_state(config, mesh).params
    stacks = [stack for name, stack in params.items() if name.endswith("_layers")]
    stacked = [array.shape for array in jax.tree.leaves(stacks) if array.ndim > 2]
    assert len(stacked) > 15
    written = [shape for scan in scans(traced.jaxpr.jaxpr) for shape in stacked_outputs(scan)]
    for shape in stacked:
        assert written.count(shape) == stacked.count(shape), f"{shape}: gradients are stacked, and nothing else"


def scans(jaxpr):
    """Yields every scan of a jaxpr, and of the jaxprs inside."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from scans(inner)


def stacked_outputs(scan) -> list[tuple[int, ...]]:
    return [output.aval.shape for output in scan.outvars[scan.params["num_carry"] :]]


def test_a_pass_must_spread_over_the_devices(micro):
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 3, 1), ("pipe", "replica", "node", "gpu", "tensor"))
    with pytest.raises(ValueError, match=r"mesh.replica·node·gpu=3: does not divide sequences of a pass=4"):
        make_train_step(micro, mesh)


def test_redundant_experts_are_refused(micro):
    config = override(micro, {"model.num_nextn_predict_layers": 0, "model.n_redundant_experts": 2})
    with pytest.raises(ValueError, match=r"model.n_redundant_experts=2: .*train with 0"):
        training_work(config)
