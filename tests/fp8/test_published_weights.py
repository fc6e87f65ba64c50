"""Block quantization of weights against the published formulas' values."""

import pathlib

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.fp8.published_weights import dequantize_blocks, quantize_blocks

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "fp8.npz")


def test_quantization_equals_published_bits():
    codes, scales = quantize_blocks(GOLDEN["w"])
    np.testing.assert_array_equal(codes.view(np.uint8), GOLDEN["w_q_f32"])
    np.testing.assert_array_equal(scales, GOLDEN["w_s_f32"])


@pytest.mark.parametrize("scales", ["f32", "ue8m0"])
def test_dequantization_equals_published_bits(scales):
    codes = GOLDEN[f"w_q_{scales}"].view(ml_dtypes.float8_e4m3fn)
    weight = dequantize_blocks(codes, GOLDEN[f"w_s_{scales}"])
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight.astype(ml_dtypes.bfloat16).view(np.uint16), GOLDEN[f"w_dq_bf16_{scales}"])


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 256), (129, 1), (260, 300)])
def test_every_block_has_its_own_scale(shape):
    weight = np.random.default_rng(0).normal(size=shape) * np.exp(np.random.default_rng(1).normal(size=shape))
    weight = weight.astype(ml_dtypes.bfloat16)
    codes, scales = quantize_blocks(weight)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = np.s_[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            values = weight[block].astype(np.float32)
            assert scales[row, column] == np.abs(values).max() / np.float32(448)
            expected = (values / scales[row, column]).astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(codes[block].view(np.uint8), expected.view(np.uint8))


def test_zeros_and_non_finite_values_show_in_the_scale():
    weight = np.zeros((128, 384), np.float32)
    weight[3, 130], weight[5, 300] = np.nan, np.inf
    codes, scales = quantize_blocks(weight)
    assert scales[0, 0] == np.float32(1e-4) / np.float32(448)
    assert (codes[:, :128].astype(np.float32) == 0).all()
    assert not np.isfinite(scales[0, 1:]).any()
