"""The quantizers: their plain ones are the formats' own, their fused ones are compared with float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8 import formats
from dsv3_jax.kernels import block_quantize as op
from dsv3_jax.kernels import device

SHAPES = [(17, 576), (130, 80)]


def draw(shape, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp2(2 * rng.normal(size=(shape[0], 1))), dtype)


def assert_quantizes(quantized, expected):
    """Asserts that codes times scales are within half a code of float64 values, give or take float32's rounding."""
    assert quantized.codes.shape == expected.shape and quantized.tile == "row"
    num_tiles = -(-expected.shape[1] // 128)
    assert quantized.scales.shape == (num_tiles, len(expected))
    scales = np.repeat(np.asarray(quantized.scales, np.float64), 128, axis=0)[: expected.shape[1]].T
    errors = np.abs(np.asarray(quantized.codes).astype(np.float64) * scales - expected)
    assert np.all(errors <= (np.abs(expected) * 2.0**-4 + scales * 2.0**-10) * (1 + 1e-4))
    for tile in range(num_tiles):
        largest = np.abs(expected[:, tile * 128 : tile * 128 + 128]).max(axis=1) / np.asarray(quantized.scales)[tile]
        assert np.all((largest > 224 * (1 - 1e-5)) & (largest < 448 * (1 + 1e-5))), "a scale fits its tile"


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual.codes).view(np.uint8), np.asarray(expected.codes).view(np.uint8))
    np.testing.assert_array_equal(actual.scales, expected.scales)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_quantizers_are_the_formats(shape):
    x = draw(shape)
    rows, columns = op.quantize_rows_and_columns(x)
    assert_quantizes(rows, np.asarray(x, np.float64))
    assert_quantizes(columns, np.asarray(x, np.float64).T)
    assert_same(op.quantize_rows(x), rows)
    assert_same(op.quantize_columns(x), columns)
    assert_same(op.rows_to_columns(rows), formats.quantize_columns(formats.dequantize(rows)))


def test_norm_is_quantized_from_float32():
    x, weight, eps = draw((33, 384)), draw((384, 1))[:, 0], 1e-2
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt(np.mean(x64**2, axis=1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    assert_quantizes(op.rms_norm_rows(x, weight, eps), expected)


@pytest.mark.parametrize("width", [128, 80])
def test_swiglu_forward_and_recomputed(width):
    gate_up = draw((144, 2 * width))
    hidden, kept = op.swiglu_rows(gate_up)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    assert_quantizes(hidden, silu(gate) * up)
    assert_same(kept, formats.quantize_rows(gate_up))
    kept_gate, kept_up = np.split(np.asarray(formats.dequantize(kept), np.float64), 2, axis=1)
    assert_quantizes(op.swiglu_columns(kept), (silu(kept_gate) * kept_up).T)


@pytest.mark.parametrize("width", [128, 80])
def test_swiglu_gradient_equals_differences(width):
    gate_up, dhidden = formats.quantize_rows(draw((144, 2 * width))), draw((144, width), seed=1)
    gate, up = np.split(np.asarray(formats.dequantize(gate_up), np.float64), 2, axis=1)
    dhidden64 = np.asarray(dhidden, np.float64)
    dsilu = (silu(gate + 1e-5) - silu(gate - 1e-5)) / 2e-5
    expected = np.concatenate([dhidden64 * up * dsilu, dhidden64 * silu(gate)], axis=1)
    rows, columns = op.swiglu_gradient(gate_up, dhidden)
    assert_quantizes(rows, expected)
    assert_quantizes(columns, expected.T)


@pytest.mark.parametrize("width", [128, 80])
def test_weighted_swiglu_gradient_equals_differences(width):
    gate_up, dhidden = formats.quantize_rows(draw((144, 2 * width))), draw((144, width), seed=1)
    weights = jnp.asarray(np.random.default_rng(2).uniform(size=144), jnp.float32)
    gate, up = np.split(np.asarray(formats.dequantize(gate_up), np.float64), 2, axis=1)
    dhidden64, weights64 = np.asarray(dhidden, np.float64), np.asarray(weights, np.float64)[:, None]
    dsilu = (silu(gate + 1e-5) - silu(gate - 1e-5)) / 2e-5
    expected = weights64 * np.concatenate([dhidden64 * up * dsilu, dhidden64 * silu(gate)], axis=1)
    rows, columns, dweights = op.weighted_swiglu_gradient(gate_up, dhidden, weights)
    assert_quantizes(rows, expected)
    assert_quantizes(columns, expected.T)
    hidden64 = silu(gate) * up
    summands = np.abs(hidden64 * dhidden64).sum(axis=1)
    assert np.all(np.abs(dweights - (hidden64 * dhidden64).sum(axis=1)) < 1e-5 * summands)


def test_e5m6_becomes_columns_without_another_rounding():
    x = draw((48, 320))
    rows, encoded = op.quantize_rows_and_encode(x)
    assert_same(rows, op.quantize_rows(x))
    assert_quantizes(op.decode_columns(encoded), np.asarray(formats.decode_e5m6(encoded), np.float64).T)


def test_nan_and_infinity_reach_every_result():
    gate_up = draw((16, 256)).at[3, 5].set(jnp.nan).at[7, 140].set(jnp.inf)
    hidden, kept = op.swiglu_rows(gate_up)
    is_nan = np.isnan(np.asarray(formats.dequantize(hidden)))
    assert is_nan[3, 5] and is_nan[7].all() and not is_nan[4:7].any()
    for columns in (op.swiglu_columns(kept), op.swiglu_gradient(kept, draw((16, 128)))[1]):
        is_nan = np.isnan(np.asarray(formats.dequantize(columns)))
        assert is_nan[5, 3] and is_nan[12, 7] and not is_nan[:, 4:7].any()
    norm = np.isnan(np.asarray(formats.dequantize(op.rms_norm_rows(gate_up, jnp.ones(256), 1e-6))))
    assert norm[3].all() and norm[7, 140] and not norm[4:7].any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: op.quantize_rows(jnp.zeros(128)), r"x is float32\[128\]: need a matrix"),
        (lambda: op.quantize_columns(jnp.zeros((16, 16), jnp.int8)), r"x is int8\[16, 16\]"),
        (lambda: op.quantize_rows(jnp.zeros((16, 16), jnp.float8_e4m3fn)), "x is float8_e4m3fn"),
        (lambda: op.rows_to_columns(jnp.zeros((16, 16))), "rows is a .*: quantize it first"),
        (lambda: op.rows_to_columns(formats.quantize_weight_blocks(jnp.zeros((16, 16)))), "rows is block-quantized"),
        (lambda: op.rms_norm_rows(jnp.zeros((16, 128)), jnp.zeros(64), 1e-6), r"weight \(64,\)"),
        (lambda: op.swiglu_rows(jnp.zeros((16, 129))), "gate_up .*129"),
        (lambda: op.swiglu_columns(formats.quantize_rows(jnp.zeros((16, 129)))), "gate_up .*129"),
        (
            lambda: op.swiglu_gradient(formats.quantize_rows(jnp.zeros((16, 256))), jnp.zeros((16, 64))),
            r"dhidden \(16, 64\).*need \[16, 128\]",
        ),
        (
            lambda: op.weighted_swiglu_gradient(
                formats.quantize_rows(jnp.zeros((16, 256))), jnp.zeros((16, 128)), jnp.zeros(8)
            ),
            r"weights float32\[8\]: need float32\[16\]",
        ),
        (lambda: op.decode_columns(jnp.zeros((16, 256))), "need a matrix in E5M6"),
        (lambda: op.quantize_rows(jnp.zeros((16, 16)), implementation="cuda"), "implementation='cuda'"),
    ],
)
def test_bad_operands_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


BF16 = functools.partial(jnp.zeros, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda **kw: op.quantize_rows(jnp.zeros((16, 16)), **kw), "float32: only 16-bit floats"),
        (lambda **kw: op.quantize_rows(BF16((24, 128)), **kw), r"\[24, 128\]: must be positive multiples"),
        (lambda **kw: op.quantize_columns(BF16((0, 128)), **kw), r"\[0, 128\]: must be positive multiples"),
        (lambda **kw: op.quantize_rows(BF16((16, 80)), **kw), r"\[16, 80\]: must be positive multiples"),
        (lambda **kw: op.rms_norm_rows(BF16((16, 384)), jnp.ones(384), 1e-6, **kw), "D=384"),
        (lambda **kw: op.rms_norm_rows(BF16((16, 8320)), jnp.ones(8320), 1e-6, **kw), "D=8320"),
        (lambda **kw: op.swiglu_rows(BF16((16, 192)), **kw), "F=96"),
        (lambda **kw: op.quantize_rows_and_encode(BF16((16, 384)), **kw), "E5M6 of K=384"),
        (lambda **kw: op.quantize_rows(BF16((16, 128)), **kw), "needs a Hopper GPU.*default device is cpu"),
    ],
)
def test_named_kernel_says_why_it_cannot_run(call, words):
    with pytest.raises(ValueError, match=f"implementation='pallas_gpu'.*{words}.*implementation="):
        call(implementation="pallas_gpu")


def test_hopper_falls_back_where_the_kernel_cannot_run(monkeypatch):
    monkeypatch.setattr(device, "is_hopper", lambda: True)
    assert op.quantize_rows(jnp.ones((17, 128))).codes.shape == (17, 128)


def test_quantizers_run_inside_a_scan():
    x = draw((96, 144)).reshape(3, 32, 144)
    stacked = jax.lax.scan(lambda carry, x: (carry, op.quantize_rows_and_columns(x)), 0, x)[1]
    for stacked_one, expected in zip(stacked, op.quantize_rows_and_columns(x[2])):
        assert_same(jax.tree.map(lambda array: array[2], stacked_one), expected)
