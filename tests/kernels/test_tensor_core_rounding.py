"""The tolerance for products on tensor cores holds for their emulated arithmetic, and for no mistake of a kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensor_core_rounding import exact_and_tolerance, widen

from dsv3_jax.benchmarks.accumulation import emulated_product
from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import TILE, QuantizedArray

ROWS, COLUMNS, CONTRACTION = 24, 40, 1408


@pytest.fixture(params=[("block", 0), ("block", 20), ("row", 0), ("row", 20)], ids=str, scope="module")
def operands(request) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes normal values, or such whose rows differ by up to 2^20 with outliers of 1e4 among them."""
    b_tile, spread = request.param
    rng = np.random.default_rng(spread)
    a, b = (rng.normal(size=(size, CONTRACTION)) for size in (ROWS, COLUMNS))
    for x in (a, b):
        x *= 2.0 ** rng.integers(-spread, 1, size=(len(x), 1))
        x[rng.random(x.shape) < (1e-3 if spread else 0)] *= 1e4
    quantize_b = formats.quantize_weight_blocks if b_tile == "block" else formats.quantize_rows
    return formats.quantize_rows(jnp.asarray(a, jnp.float32)), quantize_b(jnp.asarray(b, jnp.float32))


def emulate(a: QuantizedArray, b: QuantizedArray, *, missing_tile: int | None = None) -> jax.Array:
    """Multiplies as the kernels do, each tile with the arithmetic of tensor cores, float32 [R, C]."""
    total = jnp.zeros((ROWS, COLUMNS))
    for tile in range(CONTRACTION // TILE):
        steps = slice(tile * TILE, (tile + 1) * TILE)
        b_scales = b.scales[tile] if b.tile == "row" else b.scales[0, tile]
        scales = a.scales[tile][:, None] * b_scales
        if tile != missing_tile:
            total += emulated_product(a.codes[:, steps], b.codes[:, steps], promote_every=TILE) * scales
    return total


def share_outside(product: jax.Array, a: QuantizedArray, b: QuantizedArray, out_dtype) -> float:
    exact, tolerance = exact_and_tolerance(widen(a), widen(b), out_dtype)
    return (np.abs(np.asarray(product, np.float64) - exact) > tolerance).mean()


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_emulated_tensor_cores_stay_within_the_tolerance(operands, out_dtype):
    product = emulate(*operands).astype(out_dtype)
    exact, tolerance = exact_and_tolerance(*map(widen, operands), out_dtype)
    assert share_outside(product, *operands, out_dtype) == 0
    errors = np.abs(np.asarray(product, np.float64) - exact)
    assert (errors > tolerance / 30).any(), "a tolerance this wide would say little"


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tile", [0, CONTRACTION // TILE - 1])
def test_a_missing_tile_breaks_the_tolerance(operands, tile, out_dtype):
    product = emulate(*operands, missing_tile=tile)
    assert share_outside(product, *operands, out_dtype) > 0.1, "most entries without outliers in other tiles"


def test_one_wrong_scale_breaks_the_tolerance(operands):
    a, b = operands
    wrong_a = dataclasses.replace(a, scales=a.scales.at[3, 5].multiply(2))
    assert share_outside(emulate(wrong_a, b)[5:6], slice_rows(a, 5), b, jnp.bfloat16) > 0.1
    position = (3, 7) if b.tile == "row" else (0, 3)
    wrong_b = dataclasses.replace(b, scales=b.scales.at[position].multiply(1.125))
    assert share_outside(emulate(a, wrong_b), a, b, jnp.bfloat16) > 0.001


def slice_rows(a: QuantizedArray, row: int) -> QuantizedArray:
    return dataclasses.replace(a, codes=a.codes[row : row + 1], scales=a.scales[:, row : row + 1])


def test_one_wrong_code_in_the_largest_of_a_row_breaks_the_tolerance(operands):
    a, b = operands
    column = int(np.abs(widen(a).values[5]).argmax())
    wrong_a = dataclasses.replace(a, codes=a.codes.at[5, column].set(0))
    assert share_outside(emulate(wrong_a, b)[5:6], slice_rows(a, 5), b, jnp.bfloat16) > 0.1


def test_zeros_are_exact():
    zeros = formats.quantize_rows(jnp.zeros((2, 256)))
    exact, tolerance = exact_and_tolerance(widen(zeros), widen(zeros), jnp.float32)
    assert not exact.any() and tolerance.max() < 1e-30
