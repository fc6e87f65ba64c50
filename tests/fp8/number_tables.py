"""Every finite value of the small float formats, from their definitions, and exact rounding to them."""

import numpy as np


def magnitudes(*, exponent_bits: int, mantissa_bits: int, num_finite: int) -> np.ndarray:
    """Returns the first `num_finite` nonnegative values, float64; the index of a value is its code."""
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = np.divmod(np.arange(num_finite), 2**mantissa_bits)
    fraction = np.where(exponent == 0, 0, 1) + mantissa / 2**mantissa_bits
    return fraction * 2.0 ** (np.maximum(exponent, 1) - bias)


E4M3 = magnitudes(exponent_bits=4, mantissa_bits=3, num_finite=127)  # all ones is NaN; 448 is the largest
E5M6 = magnitudes(exponent_bits=5, mantissa_bits=6, num_finite=31 * 64)


def nearest_even_codes(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the code of the nearest magnitude, of two equally near ones the even code; |x| at most the largest."""
    x = np.abs(np.asarray(x, np.float64))
    above = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
    to_lower, to_upper = x - table[above - 1], table[above] - x
    takes_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (above % 2 == 0))
    return np.where(takes_upper, above, above - 1)
