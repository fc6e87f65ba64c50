"""The FP8 numerics (§3.3): E4M3 with a scale per tile of 128 or block of 128 x 128, and the 12-bit E5M6.

Activations and gradients have power-of-two scales: a tile's scale is the smallest power of two that brings its largest
magnitude to at most the format's. Multiplying by its inverse is exact, so every implementation agrees to the bit, and a
change from 1x128 to 128x1 tiles costs nothing but underflow. Weights have the float32 scales of published checkpoints.

Special values: a NaN stays a NaN and its tile is scaled as if it were not there; an infinity turns its whole tile into
NaN, never into a plausible 448; a tile of zeros gets the smallest scale. That scale is so large that everything below
2^-126 becomes zero: it makes no difference whether a processor keeps or flushes float32 subnormals.

This module imports no other, so that the kernels can speak of its arrays.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

TILE = 128
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
E5M6_MAX, E5M6_SMALLEST = 65024.0, 2.0**-20
MIN_AMAX = 1e-4  # of the published quantizers with float32 scales: zeros get a finite scale
SCALE_FORMATS = ("power_of_two", "float32")
FLOAT32_MANTISSA_BITS = 23

_FLOAT32_BIAS = 127
_ABOVE_INFINITY = 0xFFFFFF  # bits of a float32 infinity, shifted by the sign, to the largest integer


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("tile",))
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """E4M3 codes and their scales; K is the dimension that a product contracts and is always the last.

    The value of a code is code · scale. The last tile of a dimension that 128 does not divide is partial.
    """

    codes: jax.Array  # float8_e4m3fn [..., R, K]
    # float32. tile "row": [..., ceil(K/128), R], one per row and 128 of K, so that a tile of a product needs one
    # box of memory. tile "block": [..., ceil(R/128), padded_blocks(K)]; columns past ceil(K/128) are zero.
    scales: jax.Array
    tile: str  # "row" or "block"


@functools.partial(jax.tree_util.register_dataclass, data_fields=("high", "low", "scales"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class E5M6Array:
    """12-bit floats (sign, 5 exponent bits, 6 mantissa bits) in two byte planes, scaled per row and 128 of K."""

    high: jax.Array  # uint8 [..., R, K]: sign, exponent and two mantissa bits, the upper byte of a float16
    low: jax.Array  # uint8 [..., R, ceil(K/2)]: four mantissa bits of columns j (low nibble) and j + ceil(K/2)
    scales: jax.Array  # float32 [..., ceil(K/128), R], powers of two


def num_tiles(size: int) -> int:
    """Returns how many tiles of 128 cover a dimension."""
    return -(-size // TILE)


def padded_blocks(size: int) -> int:
    """Returns the columns of block scales for K = size: the blocks, padded to a multiple of 4 (16 bytes)."""
    return -(-num_tiles(size) // 4) * 4


@functools.partial(jax.jit, static_argnames="scale_format")
def quantize_rows(x_RK: jax.Array, *, scale_format: str = "power_of_two") -> QuantizedArray:
    """Quantizes to E4M3 with one scale per row and 128 columns (1x128 tiles).

    Args:
      x_RK: [..., R, K], any float dtype.
      scale_format: "power_of_two", the format of training, or "float32", the published max(amax, 1e-4) / 448.

    Raises:
      ValueError: another scale format.
    """
    x_RK = x_RK.astype(jnp.float32)
    tiles_RkI = _split(x_RK, -1)
    codes_RkI, scales_Rk = _quantize_tiles(tiles_RkI, -1, scale_format)
    return QuantizedArray(_join(codes_RkI, -1, x_RK.shape[-1]), jnp.swapaxes(scales_Rk, -1, -2), "row")


@functools.partial(jax.jit, static_argnames="scale_format")
def quantize_columns(x_RK: jax.Array, *, scale_format: str = "power_of_two") -> QuantizedArray:
    """Quantizes the transpose: [..., K, R] codes with one scale per column and 128 rows of x (128x1 tiles).

    Args and errors are those of `quantize_rows`.
    """
    x_RK = x_RK.astype(jnp.float32)
    tiles_rIK = _split(x_RK, -2)
    codes_rIK, scales_rK = _quantize_tiles(tiles_rIK, -2, scale_format)
    return QuantizedArray(jnp.swapaxes(_join(codes_rIK, -2, x_RK.shape[-2]), -1, -2), scales_rK, "row")


@jax.jit
def rows_to_columns(quantized: QuantizedArray) -> QuantizedArray:
    """Converts row-quantized [..., R, K] to row-quantized [..., K, R]: from 1x128 to 128x1 tiles (§3.3.3).

    With power-of-two scales values change only where they underflow against the largest of their new tile.
    """
    require_quantized(quantized, "quantized", tiles=("row",))
    return quantize_columns(dequantize(quantized))


@jax.jit
def quantize_weight_blocks(weight_RK: jax.Array) -> QuantizedArray:
    """Quantizes weights by the published rule: per 128x128 block, scale = max(amax, 1e-4) / 448, code = weight / scale.

    A block with a value that is not finite has a scale that is not finite, and no number survives in it.

    Args:
      weight_RK: [..., R, K], computed in float32; leading dimensions are separate matrices.
    """
    weight_RK = weight_RK.astype(jnp.float32)
    amax_rk = largest_magnitudes(_split(_split(weight_RK, -1), -3), (-3, -1))
    scales_rk = block_scales(amax_rk)
    codes_RK = divide_by_scales(weight_RK, _spread_blocks(scales_rk, weight_RK.shape))
    return QuantizedArray(codes_RK, pad_block_scales(scales_rk), "block")


def largest_magnitudes(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """Returns the bits of the largest magnitudes of float32 along dimensions, int32: those of NaN where there is one.

    XLA's maximum of floats sometimes loses it.
    """
    return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32).max(axis=dims)


def block_scales(magnitude_bits: jax.Array) -> jax.Array:
    """Returns the scales of weight blocks, float32, given the bits of their largest magnitudes."""
    amax = jax.lax.bitcast_convert_type(magnitude_bits, jnp.float32)
    return _divide(jnp.where(amax < MIN_AMAX, MIN_AMAX, amax), E4M3_MAX)


def divide_by_scales(weight: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the codes of float32 weights, given the scale of each in an array that broadcasts."""
    return jnp.clip(_divide(weight, scales), -E4M3_MAX, E4M3_MAX).astype(E4M3)


def pad_block_scales(scales_rk: jax.Array) -> jax.Array:
    """Appends the unused columns that `QuantizedArray` has."""
    unused = padded_blocks(TILE * scales_rk.shape[-1]) - scales_rk.shape[-1]
    return jnp.pad(scales_rk, _pad_widths(scales_rk.ndim, -1, unused))


@jax.jit
def transpose_blocks(quantized: QuantizedArray) -> QuantizedArray:
    """Transposes block-quantized [..., R, K] to [..., K, R], exactly: the transpose of a block is a block."""
    require_quantized(quantized, "quantized", tiles=("block",))
    contraction = quantized.codes.shape[-1]
    scales_kr = jnp.swapaxes(quantized.scales[..., : num_tiles(contraction)], -1, -2)
    return QuantizedArray(jnp.swapaxes(quantized.codes, -1, -2), pad_block_scales(scales_kr), "block")


@jax.jit
def dequantize(quantized: QuantizedArray) -> jax.Array:
    """Returns codes times scales, float32 [..., R, K]."""
    require_quantized(quantized, "quantized")
    codes_RK = quantized.codes.astype(jnp.float32)
    if quantized.tile == "block":
        return codes_RK * _spread_blocks(quantized.scales[..., : num_tiles(codes_RK.shape[-1])], codes_RK.shape)
    return _scale_rows(codes_RK, quantized.scales)


@jax.jit
def encode_e5m6(x_RK: jax.Array) -> E5M6Array:
    """Rounds to E5M6, nearest even, with one power-of-two scale per row and 128 columns.

    Args:
      x_RK: [..., R, K], any float dtype.
    """
    x_RK = x_RK.astype(jnp.float32)
    columns = x_RK.shape[-1]
    half = -(-columns // 2)
    scales_Rk, inverses_Rk = power_of_two_scales(_amax(_split(x_RK, -1), -1), largest=E5M6_MAX, smallest=E5M6_SMALLEST)
    scaled_RK = x_RK * jnp.repeat(inverses_Rk, TILE, axis=-1)[..., :columns]
    # Codes are made for each plane anew: on a GPU that is cheaper than to keep them in memory between the two.
    high_RK = e5m6_codes(scaled_RK) >> 4
    low_RJ, upper_RJ = (e5m6_codes(scaled_RK[..., part]) & 15 for part in (slice(half), slice(half, columns)))
    low_RJ |= jnp.pad(upper_RJ, _pad_widths(x_RK.ndim, -1, 2 * half - columns)) << 4
    encoded = E5M6Array(high_RK.astype(jnp.uint8), low_RJ.astype(jnp.uint8), jnp.swapaxes(scales_Rk, -1, -2))
    # Without the barrier XLA keeps wider steps of the computation, from which decoding begins, instead of the result.
    return jax.lax.optimization_barrier(encoded)


@jax.jit
def decode_e5m6(encoded: E5M6Array) -> jax.Array:
    """Returns the values, float32 [..., R, K]; bfloat16 holds them exactly."""
    nibbles_RK = jnp.concatenate([encoded.low & 15, encoded.low >> 4], axis=-1)[..., : encoded.high.shape[-1]]
    # E5M6 is the upper 12 bits of a float16.
    bits_RK = encoded.high.astype(jnp.uint16) << 8 | nibbles_RK.astype(jnp.uint16) << 4
    values_RK = jax.lax.bitcast_convert_type(bits_RK, jnp.float16).astype(jnp.float32)
    return _scale_rows(values_RK, encoded.scales)


def power_of_two_scales(
    amax: jax.Array, *, largest: float = E4M3_MAX, smallest: float = 2.0**-9
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale of tiles, the smallest power of two with amax / scale <= largest, and its inverse.

    In bits of float32: adding what the largest value's mantissa lacks to all ones carries into the exponent of amax
    exactly when its mantissa is larger.

    Args:
      amax: float32, largest magnitude of each tile, not NaN.
      largest: largest finite value of the number format.
      smallest: its smallest subnormal.

    Returns:
      scales and inverses, float32 like amax. The inverse of an infinite amax is NaN. No scale is below
      2^-125 / smallest, where all that float32 holds as a subnormal rounds to zero.
    """
    largest_bits = int(np.float32(largest).view(np.uint32))
    carry = ~largest_bits & ((1 << FLOAT32_MANTISSA_BITS) - 1)
    largest_exponent = (largest_bits >> FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    least = _FLOAT32_BIAS - 125 - int(math.log2(smallest))
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent = jnp.maximum((bits + carry >> FLOAT32_MANTISSA_BITS) - largest_exponent, least)
    scales = jax.lax.bitcast_convert_type(exponent << FLOAT32_MANTISSA_BITS, jnp.float32)
    inverse_bits = 2 * _FLOAT32_BIAS - exponent << FLOAT32_MANTISSA_BITS
    inverses = jax.lax.bitcast_convert_type(inverse_bits, jnp.float32)
    return scales, jnp.where(amax < jnp.inf, inverses, jnp.nan)


def require_quantized(
    quantized: QuantizedArray, name: str, *, tiles: tuple[str, ...] = ("row", "block"), ndim: int | None = None
) -> None:
    """Raises ValueError, naming the operand, unless it is a consistent quantized array.

    Args:
      quantized: the operand.
      name: what the message calls it.
      tiles: the tile kinds that are allowed.
      ndim: how many dimensions the codes must have; None for two or more.
    """
    if not isinstance(quantized, QuantizedArray):
        raise ValueError(f"{name} is a {type(quantized).__name__}: quantize it first (dsv3_jax.fp8.formats)")
    codes, scales = quantized.codes, quantized.scales
    if quantized.tile not in tiles:
        makers = {"row": "quantize_rows or quantize_columns", "block": "quantize_weight_blocks"}
        fix = " or ".join(f"{tile}-quantized ({makers[tile]})" for tile in tiles)
        raise ValueError(f"{name} is {quantized.tile}-quantized: it must be {fix}")
    if codes.dtype != E4M3 or scales.dtype != jnp.float32:
        raise ValueError(f"{name} has codes {codes.dtype}, scales {scales.dtype}: need float8_e4m3fn and float32")
    if codes.ndim < 2 or (ndim is not None and codes.ndim != ndim):
        need = f"{ndim} dimensions" if ndim is not None else "two dimensions or more"
        raise ValueError(f"{name} has codes of shape {codes.shape}: need {need}, the contracted one last")
    rows, contraction = codes.shape[-2:]
    by_row, by_block = (num_tiles(contraction), rows), (num_tiles(rows), padded_blocks(contraction))
    expected = (*codes.shape[:-2], *(by_row if quantized.tile == "row" else by_block))
    if scales.shape != expected:
        raise ValueError(
            f"{name} has scales of shape {scales.shape}: "
            f"{quantized.tile}-quantized codes of shape {codes.shape} need {expected}"
        )


def _quantize_tiles(tiles: jax.Array, dim: int, scale_format: str) -> tuple[jax.Array, jax.Array]:
    """Quantizes tiles that lie along `dim` of a float32 array; returns codes and, without that dimension, scales."""
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f"scale_format={scale_format!r}: choose one of {SCALE_FORMATS}")
    amax = _amax(tiles, dim)
    if scale_format == "power_of_two":
        scales, inverses = power_of_two_scales(amax)
        return (tiles * jnp.expand_dims(inverses, dim)).astype(E4M3), scales
    scales = _divide(jnp.maximum(amax, MIN_AMAX), E4M3_MAX)
    quotients = _divide(tiles, jnp.expand_dims(scales, dim))
    return jnp.clip(quotients, -E4M3_MAX, E4M3_MAX).astype(E4M3), scales


def _amax(tiles: jax.Array, dim: int) -> jax.Array:
    """Returns the largest magnitude along a dimension, leaving NaN out.

    Magnitudes order like their bits without the sign. Adding what the bits of infinity lack to the largest integer
    makes NaN wrap around to less than zero's. A choice between values and a constant would be less: under
    differentiation a scan computes the constant's broadcast once, and every layer reads it from memory.
    """
    ordered = jax.lax.bitcast_convert_type(tiles, jnp.uint32) * 2 + _ABOVE_INFINITY
    largest = jnp.maximum(ordered.max(axis=dim), _ABOVE_INFINITY) - _ABOVE_INFINITY
    return jax.lax.bitcast_convert_type(largest >> 1, jnp.float32)


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """Divides float32 with correct rounding: XLA's own is 2 units off on GPUs, and a product with 1 / y for a scalar y.

    The remainder is exact: halves of 12 bits have exact products.
    """
    y = jnp.asarray(y, jnp.float32)
    quotient = x / y
    quotient_high, y_high = upper_half(quotient), upper_half(y)
    quotient_low, y_low = quotient - quotient_high, y - y_high
    remainder = x - quotient_high * y_high - quotient_high * y_low - quotient_low * y_high - quotient_low * y_low
    return jnp.where(remainder == 0, quotient, quotient + remainder / y)  # the quotient may be -0


def upper_half(x: jax.Array) -> jax.Array:
    """Returns float32 cut to its 12 leading bits."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)


def e5m6_codes(x: jax.Array) -> jax.Array:
    """Rounds float32 of at most 65024 to E5M6 codes, uint32, in integers: nearest even without double rounding."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude_bits = bits & 0x7FFFFFFF
    dropped = FLOAT32_MANTISSA_BITS - 6
    rounded = magnitude_bits + ((1 << dropped - 1) - 1) + (magnitude_bits >> dropped & 1) >> dropped
    normal = rounded - (_FLOAT32_BIAS - 15 << 6)
    # Subnormals are multiples of 2^-20, the spacing of float32 from 8 to 16: adding 8 rounds to them.
    subnormal = jax.lax.bitcast_convert_type(jnp.abs(x) + 8.0, jnp.uint32) - int(np.float32(8).view(np.uint32))
    code = jnp.minimum(jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal), 0x7FF)  # what NaN gives is larger
    return code | bits >> 31 << 11


def _scale_rows(values_RK: jax.Array, scales_kR: jax.Array) -> jax.Array:
    scaled_RkI = _split(values_RK, -1) * jnp.swapaxes(scales_kR, -1, -2)[..., None]
    return _join(scaled_RkI, -1, values_RK.shape[-1])


def _spread_blocks(scales_rk: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats every scale over its block of an array of the given shape."""
    rows, columns = shape[-2:]
    scales_Rk = jnp.repeat(scales_rk, TILE, axis=-2)[..., :rows, :]
    return jnp.repeat(scales_Rk, TILE, axis=-1)[..., :columns]


def _split(x: jax.Array, dim: int) -> jax.Array:
    """Splits a dimension, counted from the end, into tiles of 128, the last filled up with zeros."""
    dim += x.ndim
    tiles = num_tiles(x.shape[dim])
    x = jnp.pad(x, _pad_widths(x.ndim, dim, tiles * TILE - x.shape[dim]))
    return x.reshape(*x.shape[:dim], tiles, TILE, *x.shape[dim + 1 :])


def _join(tiles: jax.Array, dim: int, size: int) -> jax.Array:
    """Undoes `_split` of a dimension that had the given size."""
    dim += tiles.ndim - 1
    joined = tiles.reshape(*tiles.shape[:dim], tiles.shape[dim] * TILE, *tiles.shape[dim + 2 :])
    return jax.lax.slice_in_dim(joined, 0, size, axis=dim)


def _pad_widths(ndim: int, dim: int, amount: int) -> list[tuple[int, int]]:
    widths = [(0, 0)] * ndim
    widths[dim] = (0, amount)
    return widths
