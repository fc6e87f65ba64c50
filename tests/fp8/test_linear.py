"""The FP8 linear, feed-forward and attention with projection, against float64 arithmetic on the numbers they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_tiles import (
    E4M3_ERROR,
    SUMS,
    assert_near,
    differentiate,
    e4m3_tiles,
    random,
    round_tiles,
    swiglu_in_float64,
    weight,
)

from dsv3_jax.fp8 import feed_forward as ff
from dsv3_jax.fp8.attention import attention_and_projection
from dsv3_jax.fp8.linear import linears


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


@pytest.mark.parametrize("input_cache", ["e5m6", "e4m3", "bf16"])
def test_attention_with_projection_equals_float64_autodiff_within_the_format(input_cache):
    """Whatever is kept of the attention output, 18 rows at a time, all gradients are right to the format's error."""
    heads, value_width = 2, 32
    q, kv, k_rope = random((2, 9, heads, 48), 0), random((2, 9, heads, 32 + value_width), 1), random((2, 9, 16), 2)
    w = weight((heads, value_width, 80), 3, contracted_dims=2, input_cache=input_cache)

    def attend(q, kv, k_rope, w):
        return attention_and_projection(q, kv, k_rope, None, w, scale=0.3)

    y, dy, (*doperands, dw) = differentiate(attend, q, kv, k_rope, w)
    with jax.enable_x64(True):

        def plain(q, kv, k_rope, w):
            k, v = jnp.split(kv, [32], axis=-1)
            scores = jnp.einsum("btnx,bsnx->bnts", q[..., :32], k) + jnp.einsum("btnx,bsx->bnts", q[..., 32:], k_rope)
            scores *= 0.3
            scores = jnp.where(jnp.tril(jnp.ones((9, 9), bool)), scores, -jnp.inf)
            return jnp.einsum("bnts,bsnu,nud->btd", jax.nn.softmax(scores), v, w)

        operands = (jnp.asarray(np.asarray(leaf, np.float64)) for leaf in (q, kv, k_rope, w.master))
        expected, vjp = jax.vjp(plain, *operands)
        gradients = vjp(jnp.asarray(np.asarray(dy, np.float64)))
    assert_near(y, expected, 2 * E4M3_ERROR, "y")
    for name, mine, wanted in zip(("dq", "dkv", "dk_rope", "dw"), (*doperands, dw.master), gradients, strict=True):
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
