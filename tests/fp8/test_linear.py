"""The FP8 linear, feed-forward and attention with projection, against float64 arithmetic on the numbers they see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8 import feed_forward as ff
from dsv3_jax.fp8.attention import attention_and_projection
from dsv3_jax.fp8.linear import linears
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


@pytest.mark.parametrize("shape", [(48, 256, 192), (40, 80, 16)], ids=["whole tiles", "partial tiles, odd rows"])
def test_products_and_gradients_are_those_of_the_codes(shape):
    """Output, input gradient and weight gradient are exact products of tiles that float64 rounds the same way."""
    rows, contraction, outputs = shape
    x_RK, w = random((rows, contraction), 0), weight((contraction, outputs), 1)
    y_RN, dy_RN, (dx_RK, dw) = differentiate(lambda x, w: linears(x, (w,))[0], x_RK, w)

    w_KN = np.asarray(w.dequantize((contraction,), jnp.float32), np.float64)
    assert_near(y_RN, e4m3_tiles(x_RK, 1) @ w_KN, SUMS, "y")
    assert_near(dx_RK, e4m3_tiles(dy_RN, 1) @ w_KN.T, SUMS, "dx")
    assert_near(dw.master, e4m3_tiles(e4m3_tiles(x_RK, 1), 0).T @ e4m3_tiles(dy_RN, 0), SUMS, "dw")
    assert dw.master.dtype == jnp.float32


@pytest.mark.parametrize("input_cache", ["e4m3", "bf16"])
def test_linears_of_a_norm_equal_float64_autodiff_within_the_format(input_cache):
    """Two weights behind one RMSNorm: every gradient is that of the unquantized function, off by the format's error."""
    x_RK, norm_weight = 3 * random((64, 192), 0), 1 + 0.3 * random((192,), 1)
    weights = tuple(weight((192, n), 2 + n, input_cache=input_cache) for n in (48, 80))

    def quantized(x, norm_weight, weights):
        return linears(x, weights, norm_weight=norm_weight, eps=1e-6)

    outputs, doutputs, (dx, dnorm, dweights) = differentiate(quantized, x_RK, norm_weight, weights)
    with jax.enable_x64(True):
        exact = [np.asarray(leaf, np.float64) for leaf in (x_RK, norm_weight, *(w.master for w in weights))]

        def plain(x, norm_weight, *matrices):
            normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * norm_weight
            return tuple(normed @ matrix for matrix in matrices)

        expected, vjp = jax.vjp(plain, *map(jnp.asarray, exact))
        gradients = vjp(tuple(jnp.asarray(np.asarray(dy, np.float64)) for dy in doutputs))
    for name, actual, wanted in zip(("y0", "y1"), outputs, expected, strict=True):
        assert_near(actual, wanted, 2 * E4M3_ERROR, name)
    actual = (dx, dnorm, *(dw.master for dw in dweights))
    for name, mine, wanted in zip(("dx", "dnorm", "dw0", "dw1"), actual, gradients, strict=True):
        assert_near(mine, wanted, 2.5 * E4M3_ERROR, name)


def swiglu_in_float64(x, gate_up, down):
    gate, up = jnp.split(x @ gate_up, 2, axis=-1)
    return (gate * jax.nn.sigmoid(gate) * up) @ down


@pytest.mark.parametrize("caches", [("e4m3", "e4m3"), ("bf16", "bf16")])
def test_feed_forward_equals_float64_autodiff_within_the_format(caches):
    """A dense feed-forward, at 18 rows that are padded to 32."""
    x_RD = random((18, 128), 0)
    weights = ff.FeedForwardWeights(
        weight((128, 2, 64), 1, input_cache=caches[0], spread=0.1), weight((64, 128), 2, input_cache=caches[1])
    )
    y_RD, dy_RD, (dx, dweights) = differentiate(ff.feed_forward, x_RD, weights)
    with jax.enable_x64(True):
        matrices = [np.asarray(w.master, np.float64) for w in weights]
        operands = (np.asarray(x_RD, np.float64), matrices[0].reshape(128, 128), matrices[1])
        expected, vjp = jax.vjp(swiglu_in_float64, *map(jnp.asarray, operands))
        gradients = vjp(jnp.asarray(np.asarray(dy_RD, np.float64)))
    assert_near(y_RD, expected, 3 * E4M3_ERROR, "y")
    actual = (dx, dweights.gate_up.master.reshape(128, 128), dweights.down.master)
    for name, mine, wanted in zip(("dx", "dgate_up", "ddown"), actual, gradients, strict=True):
        assert_near(mine, wanted, 4 * E4M3_ERROR, name)


def test_experts_equal_a_float64_loop_over_experts_within_the_format():
    """Routed rows (an expert without tokens, one with most) and the shared expert, and all their gradients."""
    num_tokens, width, hidden = 20, 128, 64
    x_TD = random((num_tokens, width), 0)
    experts_TK = np.stack([np.zeros(num_tokens, np.int32), np.arange(num_tokens, dtype=np.int32) % 2 + 2], axis=1)
    sizes_E = np.bincount(experts_TK.reshape(-1), minlength=4)
    starts_E = np.cumsum(-(-sizes_E // 128) * 128) - -(-sizes_E // 128) * 128
    token_of_row_M, row_of_choice_TK = np.full(512, num_tokens, np.int32), np.zeros((num_tokens, 2), np.int32)
    filled_E = starts_E.copy()
    for token, choices in enumerate(experts_TK):
        for k, expert in enumerate(choices):
            token_of_row_M[filled_E[expert]], row_of_choice_TK[token, k] = token, filled_E[expert]
            filled_E[expert] += 1
    rows = ff.Rows(*map(jnp.asarray, (token_of_row_M, row_of_choice_TK, sizes_E.astype(np.int32))))
    routed = ff.FeedForwardWeights(
        weight((4, width, 2, hidden), 1, batch_dims=1, spread=0.1), weight((4, hidden, width), 2, batch_dims=1)
    )
    shared = ff.FeedForwardWeights(weight((width, 2, hidden), 3, spread=0.1), weight((hidden, width), 4))

    def quantized(x_TD, routed, shared):
        y_MD, shared_TD = ff.expert_feed_forwards(x_TD, rows, routed, shared)
        return y_MD[row_of_choice_TK], shared_TD

    (y_TKD, shared_TD), (dy_TKD, dshared_TD), (dx, drouted, dshared) = differentiate(quantized, x_TD, routed, shared)
    with jax.enable_x64(True):

        def plain(x, gate_up, down, shared_gate_up, shared_down):
            y_ETD = jnp.stack([swiglu_in_float64(x, *weights) for weights in zip(gate_up, down, strict=True)])
            y_TKD = y_ETD[experts_TK, np.arange(num_tokens)[:, None]]
            return y_TKD, swiglu_in_float64(x, shared_gate_up, shared_down)

        masters = [np.asarray(w.master, np.float64) for w in (*routed, *shared)]
        masters[0], masters[2] = masters[0].reshape(4, width, -1), masters[2].reshape(width, -1)
        operands = map(jnp.asarray, (np.asarray(x_TD, np.float64), *masters))
        expected, vjp = jax.vjp(plain, *operands)
        gradients = vjp(tuple(jnp.asarray(np.asarray(dy, np.float64)) for dy in (dy_TKD, dshared_TD)))
    assert_near(y_TKD, expected[0], 3 * E4M3_ERROR, "routed")
    assert_near(shared_TD, expected[1], 3 * E4M3_ERROR, "shared")
    actual = [dx] + [w.master for w in (*drouted, *dshared)]
    for name, mine, wanted in zip(("dx", "dgate_up", "ddown", "dgate_up", "ddown"), actual, gradients, strict=True):
        assert_near(np.reshape(mine, wanted.shape), wanted, 4 * E4M3_ERROR, name)
    np.testing.assert_array_equal(drouted.down.master[1], 0)


@pytest.mark.parametrize("input_cache", ["e5m6", "e4m3", "bf16"])
def test_attention_with_projection_equals_float64_autodiff_within_the_format(input_cache):
    """Whatever is kept of the attention output, 18 rows at a time, all gradients are right to the format's error."""
    heads, value_width = 2, 32
    q, k, v = random((2, 9, heads, 48), 0), random((2, 9, heads, 48), 1), random((2, 9, heads, value_width), 2)
    w = weight((heads, value_width, 80), 3, contracted_dims=2, input_cache=input_cache)

    def attend(q, k, v, w):
        return attention_and_projection(q, k, v, None, w, scale=0.3)

    y, dy, (*dqkv, dw) = differentiate(attend, q, k, v, w)
    with jax.enable_x64(True):

        def plain(q, k, v, w):
            scores = jnp.einsum("btnx,bsnx->bnts", q, k) * 0.3
            scores = jnp.where(jnp.tril(jnp.ones((9, 9), bool)), scores, -jnp.inf)
            return jnp.einsum("bnts,bsnu,nud->btd", jax.nn.softmax(scores), v, w)

        operands = (jnp.asarray(np.asarray(leaf, np.float64)) for leaf in (q, k, v, w.master))
        expected, vjp = jax.vjp(plain, *operands)
        gradients = vjp(jnp.asarray(np.asarray(dy, np.float64)))
    assert_near(y, expected, 2 * E4M3_ERROR, "y")
    for name, mine, wanted in zip(("dq", "dk", "dv", "dw"), (*dqkv, dw.master), gradients, strict=True):
        assert_near(mine, wanted, 3 * E4M3_ERROR, name)


def test_what_is_kept_of_an_input_decides_what_its_weight_gradient_sees():
    """Beside a column 2^16 times larger, E4M3 rows lose most bits of a value; E5M6 has the range to keep them."""
    x_RK, dy_RN = random((64, 128), 0).at[:, 7].mul(2.0**16), random((64, 16), 1)

    def weight_gradient(input_cache):
        w = weight((128, 16), 2, input_cache=input_cache)
        return jax.vjp(lambda w: linears(x_RK, (w,))[0], w)[1](dy_RN)[0].master

    kept_e5m6 = round_tiles(x_RK, 1, mantissa_bits=6, largest=65024.0, smallest=2.0**-20)
    for input_cache, kept in (("bf16", x_RK), ("e4m3", e4m3_tiles(x_RK, 1)), ("e5m6", kept_e5m6)):
        expected = e4m3_tiles(kept, 0).T @ e4m3_tiles(dy_RN, 0)
        assert_near(weight_gradient(input_cache), expected, SUMS, input_cache)
    lost = np.linalg.norm(np.delete(weight_gradient("e4m3") - weight_gradient("bf16"), 7, axis=0))
    kept = np.linalg.norm(np.delete(weight_gradient("e5m6") - weight_gradient("bf16"), 7, axis=0))
    assert kept < 0.3 * lost


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_outputs_and_gradients(poison):
    """A poisoned input value makes its output row and all weight gradients that it touches NaN, nothing plausible."""
    x_RK, w = random((32, 128), 0).at[3, 5].set(poison), weight((128, 16), 1)
    y_RN, _, (dx_RK, dw) = differentiate(lambda x, w: linears(x, (w,))[0], x_RK, w)
    assert np.isnan(y_RN[3]).all() and np.isfinite(np.delete(y_RN, 3, axis=0)).all()
    assert np.isfinite(dx_RK).all()
    assert np.isnan(dw.master[5]).all()

    dy_RN = jnp.zeros((32, 16)).at[3, 5].set(poison)
    dx_RK, dw = jax.vjp(lambda x, w: linears(x, (w,))[0], random((32, 128), 0), w)[1](dy_RN)
    assert np.isnan(dx_RK[3]).all() and np.isnan(dw.master[:, 5]).all()
