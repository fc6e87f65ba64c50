"""Grouped FP8 products on ragged groups against one dense float64 product per group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8 import formats
from dsv3_jax.kernels import grouped_matmul as op

NUM_ROWS, CONTRACTION, COLUMNS = 1280, 144, 80  # one shape for all, so that few programs are compiled
SIZES = [(3, 0, 200, 128), (0, 0, 900, 0), (1, 1, 1, 1), (0, 0, 0, 0)]
TOLERANCE = 1e-6  # float32 sums of exact products


def make_operands(sizes, alignment=128):
    """Draws rows and output gradients in the grouped layout, NaN past the last group, and weights; float32."""
    rng = np.random.default_rng(sum(sizes))
    starts = np.asarray(op.group_starts(jnp.asarray(sizes), alignment))
    end = starts[-1] + -(-sizes[-1] // alignment) * alignment
    x, dy = np.zeros((NUM_ROWS, CONTRACTION), np.float32), np.zeros((NUM_ROWS, COLUMNS), np.float32)
    for start, size in zip(starts, sizes):
        x[start : start + size] = rng.normal(size=(size, CONTRACTION))
        dy[start : start + size] = rng.normal(size=(size, COLUMNS))
    x[end:], dy[end:] = np.nan, np.nan
    w = rng.normal(size=(len(sizes), COLUMNS, CONTRACTION)).astype(np.float32)
    return x, dy, w, jnp.asarray(sizes, jnp.int32), starts


def values(quantized):
    return np.asarray(formats.dequantize(quantized), np.float64)


def assert_close(actual, expected):
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    assert error <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("alignment", [128, 256])
@pytest.mark.parametrize("sizes", SIZES)
def test_product_and_weight_gradient_equal_dense_ones(sizes, alignment):
    x, dy, w, group_sizes, starts = make_operands(sizes, alignment)
    a, b = formats.quantize_rows(x), formats.quantize_weight_blocks(w)
    y = op.grouped_fp8_matmul(a, b, group_sizes, alignment=alignment, out_dtype=jnp.float32)
    dy_columns, x_columns = formats.quantize_columns(dy), formats.quantize_columns(x)
    dw = op.grouped_fp8_weight_gradient(dy_columns, x_columns, group_sizes, alignment=alignment)
    assert y.shape == (len(x), COLUMNS) and dw.shape == w.shape and dw.dtype == jnp.float32
    for group, (start, size) in enumerate(zip(starts, sizes)):
        rows = slice(start, start + size)
        assert_close(y[rows], values(a)[rows] @ values(b)[group].T)
        assert not np.any(y[start + size : start + -(-size // alignment) * alignment]), "padding stays zero"
        if size:
            assert_close(dw[group], values(dy_columns)[:, rows] @ values(x_columns)[:, rows].T)
        else:
            assert not np.any(dw[group]), "an empty group has exactly zero gradient"


def test_result_is_rounded_once():
    x, dy, w, group_sizes, _ = make_operands((130, 0, 5, 0))
    a, b = formats.quantize_rows(x), formats.quantize_weight_blocks(w)
    multiply = functools.partial(op.grouped_fp8_matmul, a, b, group_sizes, alignment=128)
    rounded = multiply(out_dtype=jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(multiply(), rounded)
    columns = formats.quantize_columns(dy), formats.quantize_columns(x)
    gradient = functools.partial(op.grouped_fp8_weight_gradient, *columns, group_sizes, alignment=128)
    np.testing.assert_array_equal(gradient(out_dtype=jnp.bfloat16), gradient().astype(jnp.bfloat16))


def test_squares_are_those_of_all_groups():
    x, dy, _, group_sizes, _ = make_operands((130, 0, 5, 0))
    operands = formats.quantize_columns(dy), formats.quantize_columns(x), group_sizes
    dw, squares = op.grouped_fp8_weight_gradient_with_squares(*operands, alignment=128)
    np.testing.assert_array_equal(dw, op.grouped_fp8_weight_gradient(*operands, alignment=128))
    np.testing.assert_allclose(squares, np.sum(np.square(np.asarray(dw, np.float64))), rtol=1e-6)


def test_outliers_and_nan_stay_in_their_group():
    x, dy, w, group_sizes, starts = make_operands((130, 20, 5, 0))
    x[starts[1] + 3, 7], x[starts[2], 9] = 1e4, np.nan
    a, b = formats.quantize_rows(x), formats.quantize_weight_blocks(w)
    y = np.asarray(op.grouped_fp8_matmul(a, b, group_sizes, alignment=128, out_dtype=jnp.float32))
    y = y[: starts[3]]
    assert np.isnan(y[starts[2]]).all() and np.isfinite(np.delete(y, starts[2], axis=0)).all()
    rows = slice(starts[1], starts[1] + 20)
    assert_close(y[rows], values(a)[rows] @ values(b)[1].T)
    columns = formats.quantize_columns(dy), formats.quantize_columns(x)
    dw = op.grouped_fp8_weight_gradient(*columns, group_sizes, alignment=128)
    is_nan = np.isnan(np.asarray(dw))
    assert is_nan[2, :, 9].all() and is_nan.sum() == COLUMNS


def test_sizes_do_not_recompile():
    x, _, w, _, _ = make_operands((128, 128, 128, 0))
    a, b = formats.quantize_rows(x), formats.quantize_weight_blocks(w)
    multiply = jax.jit(functools.partial(op.grouped_fp8_matmul, alignment=128))
    for sizes in ((128, 128, 128, 0), (0, 0, 384, 0), (1, 2, 3, 4)):
        multiply(a, b, jnp.asarray(sizes, jnp.int32))
    assert multiply._cache_size() == 1


def rows_of(num_rows, contraction=CONTRACTION):
    return formats.quantize_rows(jnp.zeros((num_rows, contraction)))


WEIGHTS = formats.quantize_weight_blocks(jnp.zeros((3, COLUMNS, CONTRACTION)))
GROUPS = jnp.zeros(3, jnp.int32)


@pytest.mark.parametrize(
    ("operands", "settings", "words"),
    [
        ((rows_of(128), WEIGHTS, GROUPS), {"alignment": 64}, "alignment=64.*multiples of 128"),
        ((rows_of(128), WEIGHTS, GROUPS), {"alignment": 256}, "M=128.*alignment=256"),
        ((rows_of(128), WEIGHTS, GROUPS[:2]), {"alignment": 128}, r"group_sizes \(2,\) for 3 matrices"),
        ((rows_of(128), WEIGHTS, GROUPS.astype(float)), {"alignment": 128}, "group_sizes float32"),
        ((rows_of(128), rows_of(80), GROUPS), {"alignment": 128}, "b is row-quantized: it must be block-quantized"),
        ((WEIGHTS, WEIGHTS, GROUPS), {"alignment": 128}, "a is block-quantized"),
        ((rows_of(128, 128), WEIGHTS, GROUPS), {"alignment": 128}, "last dimensions"),
        ((rows_of(128), WEIGHTS, GROUPS), {"alignment": 128, "out_dtype": "int8"}, "out_dtype=int8"),
        ((rows_of(128), WEIGHTS, GROUPS), {"alignment": 128, "implementation": "pallas_gpu"}, "Hopper GPU.*cpu"),
        (
            (rows_of(128), formats.quantize_weight_blocks(jnp.zeros((3, 0, CONTRACTION))), GROUPS),
            {"alignment": 128, "implementation": "pallas_gpu"},
            r"an empty product of a \(128, 144\) and b \(3, 0, 144\)",
        ),
    ],
)
def test_bad_operands_of_the_product_are_named(operands, settings, words):
    with pytest.raises(ValueError, match=words):
        op.grouped_fp8_matmul(*operands, **settings)


@pytest.mark.parametrize(
    ("operands", "settings", "words"),
    [
        ((WEIGHTS, rows_of(80, 256), GROUPS), {"alignment": 128}, "a is block-quantized"),
        ((rows_of(80, 256), rows_of(80, 128), GROUPS), {"alignment": 128}, "last dimensions"),
        ((rows_of(80, 200), rows_of(80, 200), GROUPS), {"alignment": 128}, "M=200"),
        ((rows_of(80, 256), rows_of(80, 256), GROUPS), {"alignment": 0}, "alignment=0"),
        ((rows_of(80, 256), rows_of(80, 256), GROUPS[:, None]), {"alignment": 128}, "group_sizes int32"),
        ((rows_of(80, 0), rows_of(24, 0), GROUPS), {"alignment": 128, "implementation": "pallas_gpu"}, "empty product"),
    ],
)
def test_bad_operands_of_the_weight_gradient_are_named(operands, settings, words):
    with pytest.raises(ValueError, match=words):
        op.grouped_fp8_weight_gradient(*operands, **settings)
