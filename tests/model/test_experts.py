"""Routed experts without quantization: what a device computes for its rows, and the gradients, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import experts
from dsv3_jax.model.weights import RoundedWeight
from dsv3_jax.testing.networks import QUICK_COMPILE
from dsv3_jax.testing.tolerances import BFLOAT16_VALUES, FLOAT32_VALUES, assert_close

NUM_ROWS, WIDTH, HIDDEN, NUM_EXPERTS, TOP_K = 29, 16, 8, 4, 3


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE, static_argnames="max_choices")
def run(x_RD, dy_RD, experts_RK, weights_RK, params, max_choices):
    y_RD, kept = experts.forward(x_RD, experts_RK, weights_RK, params, max_choices)
    return y_RD, *experts.backward(kept, experts.encode_gradient(dy_RD), params)


@pytest.mark.parametrize("dtype, tolerance", [("float32", FLOAT32_VALUES), ("bfloat16", BFLOAT16_VALUES)])
def test_rows_and_gradients_are_those_of_float64_autodiff(dtype, tolerance):
    """Some choices are elsewhere, some rows have none here, one expert has no row; max_choices is exact."""
    rng = np.random.default_rng(0)
    others = [0, 1, 3, NUM_EXPERTS]  # nobody chooses expert 2
    experts_RK = np.stack([rng.permutation(others)[:TOP_K] for _ in range(NUM_ROWS)]).astype(np.int32)
    experts_RK[5] = experts_RK[-1] = NUM_EXPERTS
    shapes = [(NUM_ROWS, WIDTH), (NUM_ROWS, WIDTH), (NUM_ROWS, TOP_K), (NUM_EXPERTS, WIDTH, 2, HIDDEN),
              (NUM_EXPERTS, HIDDEN, WIDTH)]  # fmt: skip
    x, dy, weights, gate_up, down = (rng.normal(size=shape) for shape in shapes)
    x, dy = (np.asarray(jnp.asarray(array, dtype), np.float64) for array in (x, dy))
    # Masters of zeros: nothing but their dtype is read.
    params = experts.ExpertWeights(
        *(RoundedWeight(jnp.asarray(array, dtype), jnp.zeros(array.shape)) for array in (gate_up, down))
    )
    operands = (jnp.asarray(x, dtype), jnp.asarray(dy, dtype), experts_RK, jnp.asarray(weights, jnp.float32), params)
    y_RD, dx_RD, dweights_RK, dparams = run(*operands, max_choices=int((experts_RK < NUM_EXPERTS).sum()))
    with jax.enable_x64(True):

        def plain(x, weights, gate_up, down):
            gate_up_RE2F = jnp.einsum("rd,edcf->recf", x, gate_up)
            hidden_REF = jax.nn.silu(gate_up_RE2F[:, :, 0]) * gate_up_RE2F[:, :, 1]
            y_RED = jnp.pad(jnp.einsum("ref,efd->red", hidden_REF, down), ((0, 0), (0, 1), (0, 0)))
            return jnp.sum(y_RED[np.arange(NUM_ROWS)[:, None], experts_RK] * weights[..., None], axis=1)

        expected, vjp = jax.vjp(plain, *map(jnp.asarray, (x, weights, gate_up, down)))
        gradients = vjp(jnp.asarray(dy))
    assert y_RD.dtype == dx_RD.dtype == dtype
    dgate_up, ddown = (gradient.master for gradient in dparams)
    assert dweights_RK.dtype == dgate_up.dtype == ddown.dtype == jnp.float32
    names = ("y", "dx", "dweights", "dgate_up", "ddown")
    found = (y_RD, dx_RD, dweights_RK, dgate_up, ddown)
    for name, mine, wanted in zip(names, found, (expected, *gradients), strict=True):
        assert_close(mine, wanted, tolerance, name)
    np.testing.assert_array_equal(ddown[2], 0)
    np.testing.assert_array_equal(np.asarray(dweights_RK)[experts_RK == NUM_EXPERTS], 0)
