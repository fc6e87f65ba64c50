"""E4M3 tiles and blocks against exact arithmetic, the table of all codes and the published formulas' values."""

import fractions
import pathlib

import jax.numpy as jnp
import ml_dtypes
import number_tables
import numpy as np
import pytest

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.published_weights import quantize_blocks

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "fp8.npz")
SHAPES = [(17, 80), (130, 576), (1, 1), (128, 128)]
LARGEST = np.finfo(np.float32).max


def codes_of(quantized: formats.QuantizedArray) -> np.ndarray:
    return np.asarray(quantized.codes).view(np.uint8)


def values_of(quantized: formats.QuantizedArray) -> np.ndarray:
    """Dequantizes by looping over tiles, float64."""
    codes, scales = np.asarray(quantized.codes).astype(np.float64), np.asarray(quantized.scales, np.float64)
    values = np.empty_like(codes)
    for index in np.ndindex(codes.shape):
        *batch, row, column = index
        tile = (column // 128, row) if quantized.tile == "row" else (row // 128, column // 128)
        values[index] = codes[index] * scales[(*batch, *tile)]
    return values


def draw(shape, *, spread=0.0, seed=0):
    """Draws normal values; rows and columns differ in magnitude by factors of about 2^spread."""
    rng = np.random.default_rng(seed)
    magnitude = rng.normal(size=shape[:-1])[..., None] + rng.normal(size=shape[-1])
    return (rng.normal(size=shape) * np.exp2(spread * magnitude)).astype(np.float32)


def tiles_with(amax: np.ndarray, seed=0) -> np.ndarray:
    """Returns one row of 128 per amax that holds it, at any place and with any sign, above smaller values."""
    rng = np.random.default_rng(seed)
    tiles = (rng.uniform(-1, 1, size=(len(amax), 128)) * amax[:, None]).astype(np.float32)
    tiles[np.arange(len(amax)), rng.integers(128, size=len(amax))] = amax * rng.choice([-1, 1], size=len(amax))
    return tiles


def edge_magnitudes() -> np.ndarray:
    """Returns magnitudes at, just below and just above what a scale can hold, and the ends of float32."""
    edges = (448 * np.exp2(np.arange(-134, 119.0))).astype(np.float32)
    ends = np.float32([0, 2.0**-149, 2.0**-127, 2.0**-126, LARGEST])
    random = np.exp2(np.random.default_rng(0).uniform(-149, 127, size=300)).astype(np.float32)
    return np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, np.float32(np.inf)), ends, random])


def smallest_fitting_scale(amax: np.float32) -> fractions.Fraction:
    scale = fractions.Fraction(1, 2**116)
    while fractions.Fraction(float(amax)) > 448 * scale:
        scale *= 2
    return scale


def test_scale_is_the_smallest_power_of_two_that_fits():
    amax = edge_magnitudes()
    scales = np.asarray(formats.quantize_rows(tiles_with(amax)).scales)
    assert scales.shape == (1, len(amax))
    for magnitude, scale in zip(amax, scales[0]):
        assert fractions.Fraction(float(scale)) == smallest_fitting_scale(magnitude), magnitude


def test_codes_are_the_nearest_even_of_all_codes():
    tiles = tiles_with(edge_magnitudes(), seed=1)
    quantized = formats.quantize_rows(tiles)
    scaled = tiles.astype(np.float64) / np.asarray(quantized.scales, np.float64).T
    codes = codes_of(quantized)
    np.testing.assert_array_equal(codes & 127, number_tables.nearest_even_codes(scaled, number_tables.E4M3))
    np.testing.assert_array_equal(codes >> 7, np.signbit(tiles))


@pytest.mark.parametrize("exponent", [-100, -3, 0, 41])
def test_every_code_survives_a_round_trip(exponent):
    codes = np.delete(np.arange(256, dtype=np.uint8), [127, 255])
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    rows = np.concatenate([values.reshape(2, 127), [[448], [448]]], axis=1) * 2.0**exponent
    quantized = formats.quantize_rows(rows.astype(np.float32))
    np.testing.assert_array_equal(codes_of(quantized)[:, :127].ravel(), codes)
    np.testing.assert_array_equal(quantized.scales, np.float32(2.0**exponent))
    np.testing.assert_array_equal(formats.dequantize(quantized), rows)


def test_ties_go_to_the_even_code():
    middles = (number_tables.E4M3[:-1] + number_tables.E4M3[1:]) / 2
    tile = np.concatenate([middles, [448, 448]]).astype(np.float32)[None]
    codes = codes_of(formats.quantize_rows(tile))[0, :126]
    np.testing.assert_array_equal(codes, np.arange(126) + np.arange(126) % 2)


def test_subnormals_of_float32_become_zero():
    tiny = np.float32([0, 2.0**-149, 2.0**-127, np.nextafter(np.float32(2.0**-126), np.float32(0))])
    quantized = formats.quantize_rows(tiles_with(tiny))
    assert not np.any(codes_of(quantized) & 127)
    np.testing.assert_array_equal(quantized.scales, np.float32(2.0**-116))


@pytest.mark.parametrize("quantize", [formats.quantize_rows, formats.encode_e5m6])
def test_nan_stays_alone_and_infinity_takes_its_tile(quantize):
    x = draw((3, 300))
    spoiled = x.copy()
    spoiled[0, 5], spoiled[1, 130], spoiled[1, 260] = np.nan, np.inf, -np.nan
    values, clean = (
        np.asarray(formats.dequantize(q) if isinstance(q, formats.QuantizedArray) else formats.decode_e5m6(q))
        for q in (quantize(spoiled), quantize(np.where(np.isfinite(spoiled), x, 0)))
    )
    expected = clean.copy()
    expected[0, 5], expected[1, 128:256], expected[1, 260] = np.nan, np.nan, np.nan
    np.testing.assert_array_equal(values, expected)


def e4m3_values(x):
    return formats.dequantize(formats.quantize_rows(x))


def e5m6_values(x):
    return formats.decode_e5m6(formats.encode_e5m6(x))


@pytest.mark.parametrize("round_to_format", [e4m3_values, e5m6_values])
def test_rounding_has_no_bias(round_to_format):
    # Uniform from one code to another: errors of the nearest code cancel in every gap between codes.
    x = np.random.default_rng(0).uniform(0.125, 1.0, size=(1024, 1024)).astype(np.float32)
    errors = np.asarray(round_to_format(x), np.float64) - x
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(errors.size)  # 4 standard errors; truncation is at 900


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_the_rows_of_the_transpose(shape):
    x = draw(shape, spread=3)
    columns, rows = formats.quantize_columns(x), formats.quantize_rows(np.ascontiguousarray(x.T))
    assert columns.codes.shape == shape[::-1] and columns.scales.shape == (-(-shape[0] // 128), shape[1])
    np.testing.assert_array_equal(codes_of(columns), codes_of(rows))
    np.testing.assert_array_equal(columns.scales, rows.scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_partial_tiles_have_their_own_scale(shape):
    x = draw(shape, spread=3)
    quantized = formats.quantize_rows(x)
    for tile, start in enumerate(range(0, shape[1], 128)):
        amax = np.abs(x[:, start : start + 128]).max(axis=1)
        expected = [float(smallest_fitting_scale(magnitude)) for magnitude in amax]
        np.testing.assert_array_equal(quantized.scales[tile], expected)
    values = values_of(quantized)
    assert np.all(
        np.abs(values - x) <= np.abs(x) * 2.0**-4 + np.repeat(quantized.scales, 128, 0)[: shape[1]].T * 2.0**-10
    )
    np.testing.assert_array_equal(formats.dequantize(quantized), values)


def test_conversion_to_columns_loses_only_underflow():
    rows = formats.quantize_rows(draw((200, 300), spread=4))
    columns = formats.rows_to_columns(rows)
    before = np.asarray(formats.dequantize(rows), np.float64).T
    scales = np.repeat(np.asarray(columns.scales, np.float64), 128, axis=0)[:200].T
    errors = np.abs(np.asarray(formats.dequantize(columns), np.float64) - before)
    is_subnormal = np.abs(before) < 2.0**-6 * scales
    assert 0.05 < is_subnormal.mean() < 0.95
    assert not np.any(errors[~is_subnormal])
    assert np.all(errors <= 2.0**-10 * scales) and np.any(errors)
    np.testing.assert_array_equal(codes_of(columns), codes_of(formats.quantize_columns(values_of(rows))))


def test_conversion_of_even_rows_is_exact():
    x = np.random.default_rng(0).uniform(1, 400, size=(256, 144)).astype(np.float32)
    rows = formats.quantize_rows(x)
    back = formats.rows_to_columns(formats.rows_to_columns(rows))
    np.testing.assert_array_equal(codes_of(back), codes_of(rows))
    np.testing.assert_array_equal(back.scales, rows.scales)


def test_float32_scales_equal_published_bits():
    quantized = formats.quantize_rows(GOLDEN["a"], scale_format="float32")
    np.testing.assert_array_equal(codes_of(quantized), GOLDEN["act_q_f32"])
    np.testing.assert_array_equal(quantized.scales, GOLDEN["act_s_f32"].T)
    columns = formats.quantize_columns(GOLDEN["a"].T, scale_format="float32")
    np.testing.assert_array_equal(codes_of(columns), GOLDEN["act_q_f32"])


def test_float32_scales_are_rounded_correctly():
    """Where XLA divides by multiplying with a reciprocal, half of all quotients would be another number."""
    amax = np.random.default_rng(0).uniform(1, 2, size=50_000).astype(np.float32)
    quantized = formats.quantize_rows(amax[:, None], scale_format="float32")
    np.testing.assert_array_equal(quantized.scales[0], amax / np.float32(448))


def test_power_of_two_scales_equal_published_bits():
    quantized = formats.quantize_rows(GOLDEN["a"])
    has_larger_floor = np.abs(GOLDEN["a"]).reshape(37, 3, 128).max(axis=-1) < 1e-4  # the published amax has a floor
    expected = np.where(has_larger_floor.T, np.float32(2.0**-116), GOLDEN["act_s_ue8m0"].T)
    np.testing.assert_array_equal(quantized.scales, expected)
    np.testing.assert_array_equal(codes_of(quantized), GOLDEN["act_q_ue8m0"])


@pytest.mark.parametrize("shape", [*SHAPES, (200, 700)])
def test_weight_blocks_equal_published_bits(shape):
    weight = draw(shape, spread=2)
    weight[-1, -1] = -0.0
    quantized = formats.quantize_weight_blocks(weight)
    codes, scales = quantize_blocks(weight)
    np.testing.assert_array_equal(codes_of(quantized), codes.view(np.uint8))
    expected = np.zeros((len(scales), -(-scales.shape[1] // 4) * 4), np.float32)
    expected[:, : scales.shape[1]] = scales
    np.testing.assert_array_equal(quantized.scales, expected)
    np.testing.assert_allclose(formats.dequantize(quantized), values_of(quantized), rtol=1e-7)


def test_weights_between_two_codes_equal_published_bits():
    """A quotient in the middle of two codes shows an error of one unit in its last place."""
    rng = np.random.default_rng(0)
    middles = (number_tables.E4M3[:-1] + number_tables.E4M3[1:]) / 2
    for amax in rng.uniform(1, 2, size=10).astype(np.float32):
        scale = np.float64(amax / np.float32(448))
        weight = (rng.choice(middles, size=(128, 128)) * scale).astype(np.float32)
        weight[0, 0] = amax
        codes, _ = quantize_blocks(weight)
        np.testing.assert_array_equal(codes_of(formats.quantize_weight_blocks(weight)), codes.view(np.uint8))


def test_stacked_weights_are_quantized_one_by_one():
    weights = draw((2, 3, 136, 144), spread=1)
    stacked = formats.quantize_weight_blocks(weights)
    alone = formats.quantize_weight_blocks(weights[1, 2])
    np.testing.assert_array_equal(codes_of(stacked)[1, 2], codes_of(alone))
    np.testing.assert_array_equal(stacked.scales[1, 2], alone.scales)


def test_weight_blocks_show_what_is_not_finite():
    weight = draw((256, 384))
    weight[3, 130], weight[200, 300] = np.nan, -np.inf
    values = np.asarray(formats.dequantize(formats.quantize_weight_blocks(weight)))
    is_spoiled = np.zeros((256, 384), bool)
    is_spoiled[:128, 128:256] = is_spoiled[128:, 256:] = True
    np.testing.assert_array_equal(np.isnan(values), is_spoiled)


@pytest.mark.parametrize("shape", [(136, 576), (2, 80, 300)])
def test_transposed_blocks_are_the_blocks_of_the_transpose(shape):
    weight = draw(shape, spread=2)
    transposed = formats.transpose_blocks(formats.quantize_weight_blocks(weight))
    expected = formats.quantize_weight_blocks(np.swapaxes(weight, -1, -2))
    np.testing.assert_array_equal(codes_of(transposed), codes_of(expected))
    np.testing.assert_array_equal(transposed.scales, expected.scales)


def test_bfloat16_is_quantized_as_its_float32():
    x = draw((17, 300), spread=2).astype(ml_dtypes.bfloat16)
    for quantize in (formats.quantize_rows, formats.quantize_columns):
        np.testing.assert_array_equal(codes_of(quantize(x)), codes_of(quantize(x.astype(np.float32))))


def test_unknown_scale_format_is_refused():
    with pytest.raises(ValueError, match="scale_format='e8m0'"):
        formats.quantize_rows(jnp.ones((1, 128)), scale_format="e8m0")
