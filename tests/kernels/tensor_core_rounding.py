"""Exact products of block-scaled FP8 operands, and how far those of Hopper's tensor cores may be off.

Tensor cores shift 32 products and their sum so far to the largest exponent among them and keep 13 fraction bits (§3.3.2
says about 14 bits in all; `dsv3_jax.benchmarks.accumulation` emulates it). Of 128 products that are 4 · 33 cuts, each
below 2^-13 of the largest product or sum. Both are below the root of the summed squares of the products, of which two
together are taken; exponents are those of codes before they are normalised, so subnormal codes count as the smallest
normal one. Signs of random operands are random, so (Hoeffding) the cuts together pass six roots of their summed squares
once in 3e7 products. Float32 sums after each 128 add a thousandth of that.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import QuantizedArray

CUTS = 4 * 33
TENSOR_CORES = 6 * np.sqrt(2 * CUTS) * 2.0**-13  # of the root of the summed squares of products
OUTPUT_ROUNDING = {jnp.bfloat16: 2.0**-8, jnp.float32: 2.0**-24}  # of the result
SMALLEST_NORMAL = 2.0**-6


@dataclasses.dataclass(frozen=True)
class Operand:
    """What an operand stands for, and its magnitudes as tensor cores see them; float64 [..., R, K]."""

    values: np.ndarray
    magnitudes: np.ndarray

    def __getitem__(self, index: Any) -> "Operand":
        return Operand(self.values[index], self.magnitudes[index])


def widen(quantized: QuantizedArray) -> Operand:
    """Returns an operand in float64."""
    least = jnp.maximum(jnp.abs(quantized.codes.astype(jnp.float32)), SMALLEST_NORMAL).astype(formats.E4M3)
    magnitudes = dataclasses.replace(quantized, codes=least)
    return Operand(*(np.asarray(formats.dequantize(array), np.float64) for array in (quantized, magnitudes)))


def exact_and_tolerance(a: Operand, b: Operand, out_dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the float64 product of [R, K] with the transpose of [C, K], and the largest error of each entry."""
    exact = a.values @ b.values.T
    products = np.sqrt(a.magnitudes**2 @ (b.magnitudes**2).T)
    return exact, TENSOR_CORES * products + OUTPUT_ROUNDING[out_dtype] * np.abs(exact)


def assert_product(actual: Any, a: Operand, b: Operand, out_dtype: Any) -> None:
    """Asserts that every entry of a product of tensor cores is as close as their rounding allows."""
    assert actual.dtype == out_dtype
    exact, tolerance = exact_and_tolerance(a, b, out_dtype)
    errors = np.abs(np.asarray(actual, np.float64) - exact)
    is_off = ~(errors <= tolerance)
    assert not is_off.any(), f"{is_off.sum()} of {is_off.size}, by up to {(errors / tolerance)[is_off].max():.3g} times"
