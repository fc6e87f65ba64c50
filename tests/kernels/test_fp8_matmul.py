"""Block-scaled products against float64 products of the dequantized operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8 import formats
from dsv3_jax.kernels import fp8_matmul as op

# A sum of 128 exact products in float32 and one rounding per tile; measured 6e-8 to 2e-7.
FLOAT32_TOLERANCE = 1e-6
QUANTIZERS = {"block": formats.quantize_weight_blocks, "row": formats.quantize_rows}


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def product_of_values(a, b):
    """Returns the float64 product of what the operands stand for."""
    return np.asarray(formats.dequantize(a), np.float64) @ np.asarray(formats.dequantize(b), np.float64).T


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("tile", QUANTIZERS)
@pytest.mark.parametrize("shape", [(17, 200, 576), (130, 96, 80), (1, 1, 1), (128, 256, 384)])
def test_product_equals_the_dequantized_one(shape, tile):
    rows, columns, contraction = shape
    x, w = draw((rows, contraction)), draw((columns, contraction), seed=1)
    a, b = formats.quantize_rows(x), QUANTIZERS[tile](w)
    expected = product_of_values(a, b)
    y = op.fp8_matmul(a, b, out_dtype=jnp.float32)
    assert y.shape == (rows, columns) and relative_error(y, expected) < FLOAT32_TOLERANCE
    y = op.fp8_matmul(a, b)
    assert y.dtype == jnp.bfloat16
    # Rounding once: half a unit in the last of 8 bits, of every element; cancellation adds float32's share.
    slack = 1e-6 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= 2.0**-8 * np.abs(expected) + slack)


def test_squares_are_those_of_the_product():
    a, b = formats.quantize_rows(draw((17, 200))), formats.quantize_rows(draw((96, 200), seed=1))
    y, squares = op.fp8_matmul_with_squares(a, b)
    np.testing.assert_array_equal(y, op.fp8_matmul(a, b, out_dtype=jnp.float32))
    np.testing.assert_allclose(squares, np.sum(np.square(product_of_values(a, b))), rtol=1e-6)


@pytest.mark.parametrize("tile", QUANTIZERS)
def test_error_is_what_the_format_implies(tile):
    x, w = draw((32, 512)), draw((64, 512), seed=1)
    y = op.fp8_matmul(formats.quantize_rows(x), QUANTIZERS[tile](w), out_dtype=jnp.float32)
    # Three mantissa bits: each operand's relative error has standard deviation 2.6%, together 3.7%.
    assert 0.03 < relative_error(y, x.astype(np.float64) @ w.T.astype(np.float64)) < 0.045


def test_long_sums_of_positive_terms_stay_exact():
    """Where tensor cores' own accumulation loses a quarter, promotion every 128 keeps float32's precision."""
    x, w = np.abs(draw((8, 16384))), np.abs(draw((8, 16384), seed=1))
    for b in (formats.quantize_weight_blocks(w), formats.quantize_rows(w)):
        a = formats.quantize_rows(x)
        y, expected = op.fp8_matmul(a, b, out_dtype=jnp.float32), product_of_values(a, b)
        assert np.max(np.abs(y - expected) / expected) < 2e-6


def test_outliers_spoil_their_own_tile_only():
    x, w = draw((32, 512)), draw((64, 512), seed=1)
    x[5, 200] = 1e4
    b = formats.quantize_weight_blocks(w)
    y, clean = (
        op.fp8_matmul(formats.quantize_rows(rows), b, out_dtype=jnp.float32)
        for rows in (x, np.where(np.abs(x) > 1e3, 0, x))
    )
    assert relative_error(y, product_of_values(formats.quantize_rows(x), b)) < FLOAT32_TOLERANCE
    assert relative_error(y, x.astype(np.float64) @ w.T.astype(np.float64)) < 0.045
    other_rows = np.arange(32) != 5
    np.testing.assert_array_equal(y[other_rows], clean[other_rows])


def test_tiny_and_huge_magnitudes_are_scaled_away():
    x, w = draw((32, 512)), draw((64, 512), seed=1)
    plain = op.fp8_matmul(formats.quantize_rows(x), formats.quantize_weight_blocks(w), out_dtype=jnp.float32)
    for factor in (2.0**-90, 2.0**90):
        scaled = formats.quantize_rows((x * factor).astype(np.float32))
        y = op.fp8_matmul(scaled, formats.quantize_weight_blocks(w), out_dtype=jnp.float32)
        np.testing.assert_array_equal(y, np.asarray(plain) * np.float32(factor))


def test_what_is_not_finite_reaches_the_output():
    x, w = draw((17, 576)), draw((200, 576), seed=1)
    b = formats.quantize_weight_blocks(w)
    for value in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[3, 570] = value
        y = np.asarray(op.fp8_matmul(formats.quantize_rows(spoiled), b), np.float32)
        np.testing.assert_array_equal(np.isnan(y).all(axis=1), np.arange(17) == 3)
        assert np.isfinite(y[np.arange(17) != 3]).all()
        w_spoiled = w.copy()
        w_spoiled[150, 299] = value
        y = op.fp8_matmul(formats.quantize_rows(x), formats.quantize_weight_blocks(w_spoiled))
        assert np.isnan(np.asarray(y, np.float32)[:, 150]).all()


def test_empty_operands():
    a, b = formats.quantize_rows(np.zeros((0, 256), np.float32)), formats.quantize_weight_blocks(draw((32, 256)))
    assert op.fp8_matmul(a, b).shape == (0, 32)


A = formats.QuantizedArray(jnp.zeros((16, 256), formats.E4M3), jnp.zeros((2, 16)), "row")
B = formats.QuantizedArray(jnp.zeros((32, 256), formats.E4M3), jnp.zeros((1, 4)), "block")


def replace(quantized, **changes):
    fields = {"codes": quantized.codes, "scales": quantized.scales, "tile": quantized.tile}
    return formats.QuantizedArray(**{**fields, **changes})


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (B, B, "a is block-quantized: it must be row-quantized"),
        (A.codes, B, "a is a .*: quantize it first"),
        (replace(A, codes=A.codes.astype(jnp.bfloat16)), B, "a has codes bfloat16"),
        (A, replace(B, codes=B.codes.astype(jnp.float8_e5m2)), "b has codes float8_e5m2"),
        (A, replace(B, scales=B.scales.astype(jnp.bfloat16)), "b has .*scales bfloat16"),
        (A, replace(B, scales=jnp.zeros((1, 2))), r"b has scales of shape \(1, 2\).*need \(1, 4\)"),
        (replace(A, scales=A.scales.T), B, r"a has scales of shape \(16, 2\).*need \(2, 16\)"),
        (A, replace(B, codes=B.codes[None], scales=B.scales[None]), r"b has codes of shape \(1, 32, 256\)"),
        (replace(A, codes=A.codes[:, :240]), B, r"a \(16, 240\) and b \(32, 256\).*last dimension"),
    ],
)
def test_bad_operands_are_named(a, b, words):
    with pytest.raises(ValueError, match=words):
        op.fp8_matmul(a, b)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="out_dtype=int32"):
        op.fp8_matmul(A, B, out_dtype=jnp.int32)
    with pytest.raises(ValueError, match="implementation='cublas'"):
        op.fp8_matmul(A, B, implementation="cublas")
    with pytest.raises(ValueError, match=r"needs a Hopper GPU.*default device is cpu"):
        op.fp8_matmul(A, B, implementation="pallas_gpu")
    with pytest.raises(ValueError, match=r"an empty product of a \(0, 256\)"):
        op.fp8_matmul(formats.quantize_rows(jnp.zeros((0, 256))), B, implementation="pallas_gpu")


def test_quantized_operands_pass_through_jit_and_scan():
    weights = formats.quantize_weight_blocks(draw((2, 256, 256)))
    x = draw((16, 256), seed=1).astype(jnp.bfloat16)

    def apply(x, w):
        return op.fp8_matmul(formats.quantize_rows(x), w), None

    first, second = (jax.tree.map(lambda array, layer=layer: array[layer], weights) for layer in (0, 1))
    np.testing.assert_array_equal(jax.lax.scan(apply, x, weights)[0], apply(apply(x, first)[0], second)[0])
