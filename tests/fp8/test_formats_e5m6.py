"""E5M6 against the table of all its codes."""

import math

import numpy as np
import pytest
from number_tables import E5M6, nearest_even_codes

from dsv3_jax.fp8 import formats


def join(encoded: formats.E5M6Array) -> np.ndarray:
    """Returns the 12-bit codes of the two byte planes."""
    high, low = np.asarray(encoded.high).astype(int), np.asarray(encoded.low).astype(int)
    columns, half = high.shape[-1], low.shape[-1]
    nibbles = np.concatenate([low & 15, low >> 4], axis=-1)[..., :columns]
    assert half == -(-columns // 2)
    return high << 4 | nibbles


def encode_unscaled(values: np.ndarray) -> np.ndarray:
    """Returns the codes of values of at most 65024 that are encoded with scale 1."""
    values = np.ravel(values)
    rows = np.zeros((-(-len(values) // 127), 128), np.float32)
    rows[:, 127] = 65024
    rows[:, :127].flat[: len(values)] = values
    encoded = formats.encode_e5m6(rows)
    np.testing.assert_array_equal(encoded.scales, 1)
    return join(encoded)[:, :127].ravel()[: len(values)]


def test_every_code_is_decoded_to_its_value():
    codes = np.arange(4096)
    low = (codes[:2048] & 15) | (codes[2048:] & 15) << 4
    scales = np.exp2(np.arange(-16, 16)).astype(np.float32)
    encoded = formats.E5M6Array((codes >> 4).astype(np.uint8)[None], low.astype(np.uint8)[None], scales[:, None])
    values = np.asarray(formats.decode_e5m6(encoded))[0] / np.repeat(scales, 128)
    magnitudes = np.concatenate([E5M6, [math.inf], np.full(63, math.nan)])
    np.testing.assert_array_equal(values, np.concatenate([magnitudes, -magnitudes]))


def test_every_code_survives_a_round_trip():
    np.testing.assert_array_equal(encode_unscaled(E5M6), np.arange(len(E5M6)))
    np.testing.assert_array_equal(encode_unscaled(-E5M6), 2048 + np.arange(len(E5M6)))


def test_rounding_is_nearest_even_everywhere():
    """At every value, between all neighbours, subnormals included, and one float32 to either side of the middle."""
    middles = ((E5M6[:-1] + E5M6[1:]) / 2).astype(np.float32)
    odd = np.arange(len(middles)) % 2
    np.testing.assert_array_equal(encode_unscaled(middles), np.arange(len(middles)) + odd)
    below, above = np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))
    np.testing.assert_array_equal(encode_unscaled(below), np.arange(len(middles)))
    np.testing.assert_array_equal(encode_unscaled(above), np.arange(len(middles)) + 1)
    random = np.exp2(np.random.default_rng(0).uniform(-24, 15.98, size=20000)).astype(np.float32)
    np.testing.assert_array_equal(encode_unscaled(random), nearest_even_codes(random, E5M6))


@pytest.mark.parametrize("shape", [(17, 80), (3, 129), (1, 1), (2, 5, 256)])
def test_scales_and_codes_of_every_tile(shape):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * 5)).astype(np.float32)
    encoded = formats.encode_e5m6(x)
    codes, values = join(encoded), np.asarray(formats.decode_e5m6(encoded))
    for tile, start in enumerate(range(0, shape[-1], 128)):
        part = x[..., start : start + 128].astype(np.float64)
        scales = np.exp2(np.ceil(np.log2(np.abs(part).max(axis=-1) / 65024)))
        np.testing.assert_array_equal(encoded.scales[..., tile, :], scales)
        scaled = part / scales[..., None]
        expected = nearest_even_codes(scaled, E5M6)
        np.testing.assert_array_equal(codes[..., start : start + 128] & 2047, expected)
        signed = np.copysign(E5M6[expected] * scales[..., None], part)
        np.testing.assert_array_equal(values[..., start : start + 128], signed)


def test_a_value_takes_twelve_bits():
    encoded = formats.encode_e5m6(np.ones((8, 256), np.float32))
    assert encoded.high.nbytes + encoded.low.nbytes == 8 * 256 * 12 // 8


def test_largest_value_that_fits_keeps_its_scale():
    x = np.float32([[65024, 0], [np.nextafter(np.float32(65024), np.float32(1e9)), 0], [0, 2.0**-127]])
    np.testing.assert_array_equal(formats.encode_e5m6(x).scales, np.float32([[1, 2, 2.0**-105]]))


def test_columns_are_rounded_once():
    rng = np.random.default_rng(0)
    encoded = formats.encode_e5m6((rng.normal(size=(200, 96)) * 100).astype(np.float32))
    columns = formats.quantize_columns(formats.decode_e5m6(encoded))
    expected = formats.quantize_rows(np.asarray(formats.decode_e5m6(encoded)).T)
    assert columns.codes.shape == (96, 200)
    np.testing.assert_array_equal(np.asarray(columns.codes).view(np.uint8), np.asarray(expected.codes).view(np.uint8))
    np.testing.assert_array_equal(columns.scales, expected.scales)
