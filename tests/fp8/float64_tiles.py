"""Quantized tiles in float64 by the definition of their format, and what the tests of linears share besides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.fp8.weight import quantize_weight
from dsv3_jax.testing.networks import QUICK_COMPILE

# A float32 sum of a few hundred products, each operand's code exact in it.
SUMS = 2e-6
# E4M3 keeps 4 bits: a rounded operand is off by up to 1/16 and, evenly spread, by 2.6% root mean square. Three
# quantized operands on a path are off by 1.8 times that, and what is rounded again by a little more.
E4M3_ERROR = 0.026


def weight(shape, seed, *, contracted_dims=1, batch_dims=0, input_cache="e4m3", spread=1.0):
    values = np.random.default_rng(seed).normal(0, spread, shape)
    return quantize_weight(
        jnp.asarray(values, jnp.float32), contracted_dims=contracted_dims, batch_dims=batch_dims,
        input_cache=input_cache, with_gradient=True,
    )  # fmt: skip


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def round_tiles(x_RK, dim, *, mantissa_bits, largest, smallest):
    """Rounds to a format with power-of-two scales per 128 along a dimension, in float64 by the format's definition."""
    x = np.moveaxis(np.asarray(x_RK, np.float64), dim, -1).copy()
    for start in range(0, x.shape[-1], 128):
        tile = x[..., start : start + 128]
        amax = np.abs(tile).max(axis=-1, keepdims=True)
        scale = 2.0 ** np.ceil(np.log2(np.maximum(amax, 2.0**-100) / largest))
        magnitude = np.abs(tile / scale)
        exponent = np.floor(np.log2(np.maximum(magnitude, smallest)))
        spacing = np.maximum(2.0 ** (exponent - mantissa_bits), smallest)
        x[..., start : start + 128] = np.sign(tile) * np.round(magnitude / spacing) * spacing * scale
    return np.moveaxis(x, -1, dim)


def e4m3_tiles(x_RK, dim):
    return round_tiles(x_RK, dim, mantissa_bits=3, largest=448.0, smallest=2.0**-9)


def assert_near(actual, expected, relative, name):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= relative, f"{name}: off by {error:.2e} of its norm, {relative:.2e} allowed"


def differentiate(function, *operands):
    """Returns the output, a random output gradient and the gradients of all operands."""

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(*operands):
        y, vjp = jax.vjp(function, *operands)
        dy = jax.tree.map(lambda leaf: random(leaf.shape, 99).astype(leaf.dtype), y)
        return y, dy, vjp(dy)

    return run(*operands)


def swiglu_in_float64(x, gate_up, down):
    gate, up = jnp.split(x @ gate_up, 2, axis=-1)
    return (gate * jax.nn.sigmoid(gate) * up) @ down
