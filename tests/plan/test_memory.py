"""Memory by kind, on programs whose buffers are known by arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.plan import memory
from dsv3_jax.plan.compilation import compile_program

LAYERS, ROWS, WIDTH = 5, 512, 256
STACK = LAYERS * WIDTH * WIDTH * 4  # bytes
ACTIVATIONS = ROWS * WIDTH * 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Stands for the state of a training run: its fields' names are what the plan goes by."""

    params: dict
    optimizer: dict


@pytest.fixture(scope="module")
def peak() -> memory.Peak:
    """The peak of a step over a scan of tanh layers, which keep their output and input."""

    def step(state, x):
        def loss(params):
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0])

        grads = jax.grad(loss)(state.params)
        moments = jax.tree.map(lambda m, g: 0.9 * m + jnp.square(g), state.optimizer, grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, state.params, moments)
        return State(params, moments)

    weights = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}
    state, x = State(weights, weights), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    compilation = compile_program(jax.jit(step, donate_argnums=0).lower(state, x))
    return memory.peak(
        compilation.compiled,
        compilation.program,
        compilation.assignment,
        compilation.live_ranges,
        weight_sizes=frozenset({LAYERS * WIDTH * WIDTH}),
    )


def test_arguments_count_as_what_they_are(peak):
    assert peak.by_kind[memory.MASTERS] == STACK
    assert peak.by_kind[memory.MOMENTS] == STACK
    assert peak.by_kind[memory.INPUTS] >= ACTIVATIONS


def test_gradients_count_once(peak):
    assert peak.by_kind[memory.GRADIENTS] == STACK


def test_what_a_scan_keeps_for_the_backward_pass_is_counted_as_kept(peak):
    """A tanh layer keeps its input, its output and one minus that."""
    assert 3 * LAYERS * ACTIVATIONS <= peak.by_kind[memory.KEPT] <= (3 * LAYERS + 1) * ACTIVATIONS


def test_kinds_add_up_to_what_the_compiler_allocates(peak):
    assert sum(peak.by_kind.values()) == peak.num_bytes
    assert 0 <= peak.by_kind[memory.TEMPORARIES] <= 5 * ACTIVATIONS


def test_largest_buffers_come_first(peak):
    sizes = [buffer.num_bytes for buffer in peak.largest]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (["dsv3_jax/sharding/collectives.py", "dsv3_jax/sharding/expert_exchange.py"], True),
        (["dsv3_jax/kernels/expert_rows.py", "dsv3_jax/sharding/row_packing.py"], True),
        (["dsv3_jax/kernels/swiglu.py", "dsv3_jax/model/experts.py", "dsv3_jax/sharding/expert_exchange.py"], False),
        (["dsv3_jax/fp8/experts.py", "dsv3_jax/sharding/expert_exchange.py"], False),
        (["dsv3_jax/model/attention.py"], False),
    ],
)
def test_what_experts_compute_within_the_exchange_is_not_its_own(inside, expected):
    outside = ["dsv3_jax/model/moe.py", "dsv3_jax/train/step.py"]
    assert memory.is_exchange(tuple(f"/anywhere/{file}" for file in inside + outside)) == expected
