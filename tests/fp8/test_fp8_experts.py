"""Routed experts in FP8: what is rounded when, against a float64 loop over experts; what travels; what is absent."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_tiles import E4M3_ERROR, assert_near, e4m3_tiles, random, swiglu_in_float64, weight

from dsv3_jax.fp8 import experts
from dsv3_jax.fp8.feed_forward import FeedForwardWeights, feed_forward
from dsv3_jax.fp8.linear import pad_rows
from dsv3_jax.kernels.block_quantize import quantize_rows
from dsv3_jax.testing.networks import QUICK_COMPILE

# Rounding flips where float32 and float64 sums lie on two sides of a boundary: of a value in a few thousand, by a step.
ROUNDED_AGAIN = 2e-3
NUM_EXPERTS, WIDTH, TOP_K = 4, 128, 2


def routed_weights(hidden, **caches):
    return FeedForwardWeights(
        weight((NUM_EXPERTS, WIDTH, 2, hidden), 1, batch_dims=1, spread=0.1),
        weight((NUM_EXPERTS, hidden, WIDTH), 2, batch_dims=1, **caches),
    )


def skewed_experts(num_tokens, *, absent_every=None):
    """Expert 0 serves all tokens, expert 1 none; every so often a token's second choice is elsewhere."""
    experts_TK = np.stack([np.zeros(num_tokens, np.int32), np.arange(num_tokens, dtype=np.int32) % 2 + 2], axis=1)
    if absent_every is not None:
        experts_TK[::absent_every, 1] = NUM_EXPERTS
    return experts_TK


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE, static_argnames="max_choices")
def serve(x_TD, dy_TD, experts_TK, weights_TK, params, max_choices):
    """Returns the output and all gradients, as a device that has all these experts computes them."""
    payload = experts.pack(quantize_rows(pad_rows(x_TD)), x_TD)
    y_TD, kept = experts.forward(payload, experts_TK, weights_TK, params, max_choices)
    return y_TD, *experts.backward(kept, experts.encode_gradient(dy_TD), params)


def operands(num_tokens):
    weights_TK = np.random.default_rng(5).uniform(0.05, 1, (num_tokens, TOP_K)).astype(np.float32)
    return random((num_tokens, WIDTH), 0), random((num_tokens, WIDTH), 1), jnp.asarray(weights_TK)


def silu_gradients(gate, up):
    """Returns silu(gate) · up and its derivatives by gate and up."""
    sigmoid = 1 / (1 + np.exp(-gate))
    return gate * sigmoid * up, up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid


def loop_over_experts(x_TD, dy_TD, experts_TK, weights_TK, params, rounds_gate_up):
    """Computes everything in float64, rounding as documented."""
    x_TD, dy_TD, weights_TK = (np.asarray(array, np.float64) for array in (x_TD, dy_TD, weights_TK))
    x_TD, dy_TD = e4m3_tiles(x_TD, 1), e4m3_tiles(dy_TD, 1)
    y_TD, dx_TD, dweights_TK = np.zeros_like(x_TD), np.zeros_like(x_TD), np.zeros_like(weights_TK)
    dgate_ups, ddowns = [], []
    matrices = (np.asarray(w.dequantize((w.forward.codes.shape[-1],), jnp.float32), np.float64) for w in params)
    for expert, (gate_up, down) in enumerate(zip(*matrices, strict=True)):
        gate_up = gate_up.reshape(WIDTH, -1)
        tokens, choices = np.nonzero(experts_TK == expert)
        scale = weights_TK[tokens, choices][:, None]
        inputs = x_TD[tokens] @ gate_up
        hidden, _, _ = silu_gradients(*np.split(inputs, 2, axis=1))
        np.add.at(y_TD, tokens, scale * (e4m3_tiles(hidden, 1) @ down))

        kept = e4m3_tiles(inputs, 1) if rounds_gate_up else inputs
        hidden, by_gate, by_up = silu_gradients(*np.split(kept, 2, axis=1))
        dy, dhidden = dy_TD[tokens], dy_TD[tokens] @ down.T
        dweights_TK[tokens, choices] = np.sum(hidden * dhidden, axis=1)
        dinputs = np.concatenate([scale * dhidden * by_gate, scale * dhidden * by_up], axis=1)
        np.add.at(dx_TD, tokens, e4m3_tiles(dinputs, 1) @ gate_up.T)
        dgate_ups.append(e4m3_tiles(x_TD[tokens], 0).T @ e4m3_tiles(dinputs, 0))
        ddowns.append(e4m3_tiles(scale * hidden, 0).T @ e4m3_tiles(dy, 0))
    return y_TD, dx_TD, dweights_TK, np.stack(dgate_ups), np.stack(ddowns)


NAMES = ("y", "dx", "dweights", "dgate_up", "ddown")


def flat(y_TD, dx_TD, dweights_TK, dparams):
    dgate_up = dparams.gate_up.master
    return y_TD, dx_TD, dweights_TK, dgate_up.reshape(*dgate_up.shape[:2], -1), dparams.down.master


@pytest.mark.parametrize(
    "num_tokens, hidden, swiglu_cache, absent_every",
    [(150, 128, "e4m3", None), (37, 64, "e4m3", 3), (37, 128, "bf16", 3)],
    ids=["an expert of two tiles", "half a tile wide, experts elsewhere", "unquantized cache, experts elsewhere"],
)
def test_every_rounding_is_the_documented_one(num_tokens, hidden, swiglu_cache, absent_every):
    """Outputs and all gradients are those of a float64 loop that rounds in the same places, and nowhere else."""
    params = routed_weights(hidden, input_cache=swiglu_cache)
    x_TD, dy_TD, weights_TK = operands(num_tokens)
    experts_TK = skewed_experts(num_tokens, absent_every=absent_every)
    max_choices = int((experts_TK < NUM_EXPERTS).sum())
    actual = serve(x_TD, dy_TD, experts_TK, weights_TK, params, max_choices)
    expected = loop_over_experts(x_TD, dy_TD, experts_TK, weights_TK, params, swiglu_cache == "e4m3")
    for name, mine, wanted in zip(NAMES, flat(*actual), expected, strict=True):
        assert_near(mine, wanted, ROUNDED_AGAIN, name)
        assert np.asarray(mine).dtype == np.float32
    np.testing.assert_array_equal(actual[3].down.master[1], 0)
    np.testing.assert_array_equal(np.asarray(actual[2])[experts_TK == NUM_EXPERTS], 0)


def test_experts_and_shared_expert_are_the_unquantized_ones_within_the_format():
    """Outputs and gradients against float64 autodiff; the shared expert reads the same quantized tokens."""
    x_TD, dy_TD, weights_TK = operands(20)
    params, experts_TK = routed_weights(64), skewed_experts(20)
    shared = FeedForwardWeights(weight((WIDTH, 2, 64), 3, spread=0.1), weight((64, WIDTH), 4))
    actual = flat(*serve(x_TD, dy_TD, experts_TK, weights_TK, params, experts_TK.size))

    def of_shared(x_TD, shared):
        return feed_forward(x_TD, shared, quantized=quantize_rows(pad_rows(jax.lax.stop_gradient(x_TD))))

    y_TD, vjp = jax.vjp(of_shared, x_TD, shared)
    dx_TD, dshared = vjp(dy_TD)
    alone_TD, alone_vjp = jax.vjp(feed_forward, x_TD, shared)
    for mine, alone in zip(jax.tree.leaves((y_TD, dx_TD, dshared)), jax.tree.leaves((alone_TD, *alone_vjp(dy_TD)))):
        np.testing.assert_array_equal(mine, alone)
    with jax.enable_x64(True):

        def plain(x, weights, gate_up, down):
            y_ETD = jnp.stack([swiglu_in_float64(x, *matrices) for matrices in zip(gate_up, down, strict=True)])
            y_TKD = y_ETD[experts_TK, np.arange(len(x))[:, None]]
            return jnp.sum(y_TKD * weights[..., None], axis=1)

        gate_up = np.asarray(params.gate_up.master, np.float64).reshape(NUM_EXPERTS, WIDTH, -1)
        inputs = (np.asarray(leaf, np.float64) for leaf in (x_TD, weights_TK, gate_up, params.down.master))
        expected, vjp = jax.vjp(plain, *map(jnp.asarray, inputs))
        gradients = vjp(jnp.asarray(np.asarray(dy_TD, np.float64)))
    for name, mine, wanted in zip(NAMES, actual, (expected, *gradients), strict=True):
        assert_near(mine, wanted, 4 * E4M3_ERROR, name)


def test_what_travels_is_the_quantized_array_to_the_bit():
    """Codes and power-of-two scales of any magnitude, subnormal and infinite values included, survive the journey."""
    x_RD = np.array(random((48, 200), 0)) * 2.0 ** np.random.default_rng(1).integers(-130, 120, (48, 1))
    x_RD[3], x_RD[5, 7], x_RD[6, 150] = 0, np.nan, np.inf
    quantized = quantize_rows(jnp.asarray(x_RD, jnp.float32))
    payload = experts.pack(quantized, jnp.zeros((41, 200), jnp.bfloat16))
    assert payload.codes_RD.dtype == payload.exponents_Rd.dtype == jnp.uint8
    assert (payload.codes_RD.shape, payload.exponents_Rd.shape, payload.dtype) == ((41, 200), (41, 2), jnp.bfloat16)
    codes = np.asarray(payload.codes_RD).view(np.asarray(quantized.codes).dtype)
    np.testing.assert_array_equal(codes.astype(np.float32), quantized.codes[:41].astype(jnp.float32))
    scales_dR = np.exp2(np.asarray(payload.exponents_Rd, np.float64).T - 127)
    np.testing.assert_array_equal(scales_dR, np.asarray(quantized.scales[:, :41], np.float64))


def half_of_the_experts(first, params, tokens, experts_TK):
    """Returns the results of experts `first` and the next one; every third row is empty, as in an exchange."""
    place_T = np.arange(len(experts_TK)) * 3 // 2
    local_TK = np.where((experts_TK >= first) & (experts_TK < first + 2), experts_TK - first, 2)
    local_RK = np.full((len(experts_TK) * 3 // 2, TOP_K), 2, np.int32)
    local_RK[place_T] = local_TK
    x_RD, dy_RD, weights_RK = (
        jnp.zeros((len(local_RK), *leaf.shape[1:]), leaf.dtype).at[place_T].set(leaf) for leaf in tokens
    )
    here = jax.tree.map(lambda leaf: leaf[first : first + 2], params)
    part = flat(*serve(x_RD, dy_RD, local_RK, weights_RK, here, int((local_TK < 2).sum())))
    return [np.asarray(leaf)[place_T] for leaf in part[:3]] + [np.asarray(leaf) for leaf in part[3:]]


def test_experts_on_two_devices_sum_to_those_on_one():
    """Outputs and input gradients of halves of the experts add up; weight gradients are the same to the bit."""
    num_tokens = 40
    params, (x_TD, dy_TD, weights_TK) = routed_weights(64), operands(num_tokens)
    experts_TK = skewed_experts(num_tokens)
    whole = flat(*serve(x_TD, dy_TD, experts_TK, weights_TK, params, experts_TK.size))
    parts = [half_of_the_experts(first, params, (x_TD, dy_TD, weights_TK), experts_TK) for first in (0, 2)]
    for index, name in enumerate(NAMES):
        if index < 3:
            assert_near(parts[0][index] + parts[1][index], whole[index], 1e-6, name)
        else:
            np.testing.assert_array_equal(np.concatenate([part[index] for part in parts]), whole[index], name)


def test_a_mesh_computes_what_one_device_does():
    """Over nodes, devices and pieces of sequences, in one round and in several, to the order of sums."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    }
    script = pathlib.Path(__file__).with_name("experts_on_a_mesh.py")
    process = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize("poisoned", ["x", "dy", "gate weight"])
def test_nan_reaches_what_depends_on_it(poisoned):
    """A NaN of token 3, whose experts are 0 and 3: never a plausible number, and nothing else is touched."""
    params, (x_TD, dy_TD, weights_TK) = routed_weights(64), operands(20)
    if poisoned == "x":
        x_TD = x_TD.at[3, 5].set(jnp.nan)
    elif poisoned == "dy":
        dy_TD = dy_TD.at[3, 5].set(jnp.nan)
    else:
        weights_TK = weights_TK.at[3, 1].set(jnp.nan)
    y_TD, dx_TD, dweights_TK, dparams = serve(x_TD, dy_TD, skewed_experts(20), weights_TK, params, 40)
    others = np.arange(20) != 3
    assert all(np.isfinite(array[others]).all() for array in (y_TD, dx_TD, dweights_TK))
    assert np.isnan(y_TD[3]).all() == (poisoned != "dy")
    assert np.isnan(dx_TD[3]).all()
    assert np.isnan(dweights_TK[3]).all() == (poisoned != "gate weight")
    ddown = np.asarray(dparams.down.master)
    assert np.isnan(ddown[3]).any() and np.isfinite(ddown[2]).all()
    assert np.isfinite(ddown[0]).all() == (poisoned == "gate weight")
