"""Tile shapes of the Hopper FP8 products; `launch/tune.py` measures others beside them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dsv3_jax.kernels.device import NUM_SMS
from dsv3_jax.kernels.scaled_matmul import Tile


@dataclasses.dataclass(frozen=True)
class FewRowsTile:
    """The work of one thread block of a product with few rows: all rows of some columns."""

    columns: int  # divides the 128 that share a scale of the weights
    warpgroups: int = 2  # each takes every so many-th step of the contraction
    stages: int = 8  # 128-deep steps in shared memory at one time, a multiple of the warpgroups
    fence: bool = False  # a proxy fence before a stage is given back


def fp8_matmul(out_dtype: Any) -> Tile:
    """Returns the tile for a dense product of this output type."""
    if jnp.dtype(out_dtype).itemsize == 2:
        return Tile(early_addresses=True)
    return Tile(store_columns=32, store_slots=2)


def few_rows(columns: int, contraction: int) -> FewRowsTile:
    """Returns the tile for at most 128 rows times the transpose of [columns, contraction] weights.

    Narrow where wider tiles would leave multiprocessors without one and the contraction is long enough to share.
    """
    narrow = columns < 64 * NUM_SMS and contraction >= 4096
    if narrow:
        return FewRowsTile(columns=32 if columns >= 4096 else 16, warpgroups=4, stages=8)
    return FewRowsTile(columns=64, warpgroups=2, stages=4)
