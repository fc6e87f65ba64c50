"""The accumulation experiment: its emulated tensor core against integers, its table against what is known."""

import numpy as np
import pytest

from dsv3_jax.benchmarks import accumulation


def accumulate_in_integers(a, b, promote_every):
    """Returns the sum of a · b, one element, in Python's exact numbers: 32 products at a time, cut at 13 bits."""
    total = accumulator = 0.0
    for start in range(0, len(a), 32):
        products = [float(x) * float(y) for x, y in zip(a[start : start + 32], b[start : start + 32])]
        largest = max(abs(value) for value in [accumulator, *products])
        if largest:
            last_bit = 2.0 ** (np.frexp(largest)[1] - 1 - 13)
            accumulator = sum(int(value / last_bit) for value in [accumulator, *products]) * last_bit
        if promote_every and (start + 32) % promote_every == 0:
            total, accumulator = np.float32(total) + np.float32(accumulator), 0.0
    return np.float32(total) + np.float32(accumulator)


@pytest.mark.parametrize("promote_every", accumulation.PROMOTIONS)
def test_emulation_equals_integer_arithmetic(promote_every):
    a, b = (accumulation.draw_codes((3, 1024), inputs, seed=2) for inputs in ("normal", "positive"))
    a = a.at[0, :64].set(0).at[1, 700].set(448)
    product = np.asarray(accumulation.emulated_product(a, b, promote_every=promote_every))
    for row, column in np.ndindex(3, 3):
        expected = accumulate_in_integers(np.asarray(a)[row], np.asarray(b)[column], promote_every)
        assert product[row, column] == expected


def test_table_shows_what_was_measured():
    rows = accumulation.error_rows(contractions=(4096,), size=8)
    assert len(rows) == len(accumulation.INPUTS) * (len(accumulation.PROMOTIONS) + 1)
    assert all(0 <= row["mean error"] <= row["largest error"] for row in rows)
    positive, normal = (
        {row["implementation"]: row["mean error"] for row in rows if row["case"] == f"K=4096, {inputs} inputs"}
        for inputs in accumulation.INPUTS
    )
    assert positive["emulated, never promoted"] == pytest.approx(0.066, rel=0.15)  # an H200's fast accumulation
    assert positive["emulated, promoted every 128"] < 1e-3 < positive["emulated, promoted every 512"] < 1e-2
    assert positive["reference, promoted every 128"] < 1e-6 and normal["reference, promoted every 128"] < 1e-6
    assert normal["emulated, promoted every 128"] < normal["emulated, never promoted"] < 1e-2
