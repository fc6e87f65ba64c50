"""FP8 weights as published: E4M3 codes with one float32 scale per 128x128 block (§3.3.2)."""

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)  # a table is 3x faster than a cast
MIN_AMAX = np.float32(1e-4)  # of the published quantizer: a block of zeros gets a finite scale


def num_blocks(size: int) -> int:
    """Returns how many blocks cover a dimension; the last one may be partial."""
    return -(-size // BLOCK)


def quantize_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes a matrix by the published rule: scale = max(amax, 1e-4) / 448 per block, code = weight / scale.

    Dividing, not multiplying by the reciprocal, is what the published kernels do; the two differ in a few codes in
    ten thousand. Codes are clipped to ±448 before the cast, which would make larger values NaN.

    Args:
      weight: [rows, columns], any float dtype; neither needs to be a multiple of 128.

    Returns:
      codes, float8_e4m3fn [rows, columns], and scales, float32 [ceil(rows / 128), ceil(columns / 128)]. A block with
      a value that is not finite has a scale that is not finite.
    """
    rows, columns = weight.shape
    codes = np.empty((rows, columns), E4M3)
    scales = np.empty((num_blocks(rows), num_blocks(columns)), np.float32)
    starts = np.arange(0, columns, BLOCK)
    for block in range(len(scales)):  # one strip at a time: the temporaries stay small
        strip = weight[block * BLOCK : (block + 1) * BLOCK].astype(np.float32)
        amax = np.maximum.reduceat(np.abs(strip).max(axis=0), starts)
        scales[block] = np.maximum(amax, MIN_AMAX) / E4M3_MAX
        with np.errstate(invalid="ignore"):  # inf / inf: the caller sees the scale
            strip /= _per_column(scales[block], columns)
        codes[block * BLOCK : (block + 1) * BLOCK] = np.clip(strip, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    return codes, scales


def dequantize_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns codes times their block's scale, float32 [rows, columns].

    Args:
      codes: float8_e4m3fn [rows, columns].
      scales: float32 [ceil(rows / 128), ceil(columns / 128)].
    """
    rows, columns = codes.shape
    assert scales.shape == (num_blocks(rows), num_blocks(columns)), (codes.shape, scales.shape)
    weight = _E4M3_VALUES[codes.view(np.uint8)]
    for block in range(len(scales)):
        weight[block * BLOCK : (block + 1) * BLOCK] *= _per_column(scales[block], columns)
    return weight


def _per_column(block_scales: np.ndarray, columns: int) -> np.ndarray:
    return np.repeat(block_scales, BLOCK)[:columns]
