"""What the Pallas Mosaic kernels for Hopper GPUs share: registers of warpgroups, shared memory."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP_ROWS = 64  # rows of one wgmma
PRODUCER_REGISTERS = 40  # per thread; 24 makes the producer of a product spill
WIDEST_SEGMENT, NARROWEST_SWIZZLE = 128, 32  # bytes


def consumer_registers(warpgroups: int) -> int:
    """Returns the registers per thread that so many multiplying warpgroups can have beside a producer."""
    at_launch = 512 // (warpgroups + 1) // 8 * 8
    return min(240, (at_launch * (warpgroups + 1) - PRODUCER_REGISTERS) // warpgroups // 8 * 8)


def segmented(shape: tuple[int, ...], dtype: Any, *, also_dividing: int | None = None) -> Any:
    """Declares shared memory that TMA and wgmma access without bank conflicts.

    Rows lie in segments of up to 128 bytes, as wide as divides them. A copy cannot end within a segment.

    Args:
      shape: [..., rows, columns], rows a multiple of 8.
      dtype: of the elements.
      also_dividing: columns that segments divide too, of a tensor that is copied; None for those of the shape alone.
    """
    itemsize = jnp.dtype(dtype).itemsize
    columns = math.gcd(shape[-1], WIDEST_SEGMENT // itemsize)
    if also_dividing is not None:
        columns = math.gcd(columns, also_dividing)
    transforms = (plgpu.TilingTransform((8, columns)),)
    if columns * itemsize >= NARROWEST_SWIZZLE:
        transforms += (plgpu.SwizzleTransform(columns * itemsize),)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
