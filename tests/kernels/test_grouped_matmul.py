"""The grouped matmul and its gradients, on ragged groups, against one dense product per group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels import grouped_matmul as op
from dsv3_jax.kernels.grouped_matmul import pallas_gpu, tuned

SIZES = [(3, 0, 41, 1), (0, 0, 37, 0), (8, 8, 8, 8)]
BF16_TOLERANCE = 3e-3  # relative norm: one rounding of the result to 8 bits is 1.7e-3


def make_operands(sizes, contraction, columns, alignment, dtype, *, spare_rows=0):
    """Draws rows in the op's layout, weights, and output gradients that are nonzero only in live rows."""
    rng = np.random.default_rng(sum(sizes) + contraction)
    num_rows = op.padded_rows(sum(sizes), len(sizes), alignment) + spare_rows
    starts = np.asarray(op.group_starts(jnp.asarray(sizes), alignment))
    x, dy = np.zeros((num_rows, contraction)), np.zeros((num_rows, columns))
    for start, size in zip(starts, sizes):
        x[start : start + size] = rng.normal(size=(size, contraction))
        dy[start : start + size] = rng.normal(size=(size, columns))
    w = rng.normal(size=(len(sizes), contraction, columns))
    return *(jnp.asarray(array, dtype) for array in (x, w, dy)), jnp.asarray(sizes, jnp.int32), starts


def multiply_by_loop(x, w, dy, sizes, starts):
    """Returns the product and both gradients, one dense float64 product per group."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, (start, size) in enumerate(zip(starts, np.asarray(sizes))):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
    return y, dx, dw


def assert_close(actual, expected, tolerance):
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error < tolerance


def live_rows(array, sizes, starts):
    return np.concatenate([np.asarray(array, np.float64)[s : s + n] for s, n in zip(starts, np.asarray(sizes))])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("alignment", [8, 16])
def test_reference_equals_a_dense_product_per_group(sizes, alignment):
    x, w, dy, group_sizes, starts = make_operands(sizes, 5, 7, alignment, jnp.float32, spare_rows=alignment)
    multiply = functools.partial(op.grouped_matmul, alignment=alignment, implementation="reference")
    y, vjp = jax.vjp(lambda x, w: multiply(x, w, group_sizes), x, w)
    expected_y, expected_dx, expected_dw = multiply_by_loop(x, w, dy, group_sizes, starts)
    dx, dw = vjp(dy)
    for actual, expected in ((y, expected_y), (dx, expected_dx)):
        assert_close(live_rows(actual, group_sizes, starts), live_rows(expected, group_sizes, starts), 1e-6)
    assert_close(dw, expected_dw, 1e-6)
    assert not np.any(np.asarray(dw)[np.asarray(sizes) == 0]), "an empty group has exactly zero gradient"


def test_sizes_do_not_recompile():
    alignment = 8
    x, w, _, _, _ = make_operands((3, 0, 41, 1), 5, 7, alignment, jnp.float32)
    multiply = jax.jit(functools.partial(op.grouped_matmul, alignment=alignment))
    for sizes in ((3, 0, 41, 1), (0, 45, 0, 0), (11, 11, 11, 12)):
        multiply(x, w, jnp.asarray(sizes, jnp.int32))
    assert multiply._cache_size() == 1


def test_padded_rows_hold_every_split():
    for sizes in [(1, 1, 1, 9), (12, 0, 0, 0), (0, 0, 1, 11), (3, 3, 3, 3)]:
        start = op.group_starts(jnp.asarray(sizes), 8)[-1]
        assert start + -(-sizes[-1] // 8) * 8 <= op.padded_rows(12, 4, 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "alignment", "words"),
    [((128, 64), jnp.float32, 128, "float32"), ((128, 60), jnp.bfloat16, 128, "K=60"),
     ((128, 64), jnp.bfloat16, 64, "alignment=64")],
)  # fmt: skip
def test_kernel_names_what_it_cannot_run(shape, dtype, alignment, words):
    x, w = jnp.zeros(shape, dtype), jnp.zeros((1, shape[1], 64), dtype)
    with pytest.raises(ValueError, match=words):
        op.grouped_matmul(x, w, jnp.ones(1, jnp.int32), alignment=alignment, implementation="pallas_gpu")


def test_kernel_needs_a_hopper_gpu():
    x, w = jnp.zeros((128, 64), jnp.bfloat16), jnp.zeros((1, 64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"needs a Hopper GPU.*default device is cpu"):
        op.grouped_matmul(x, w, jnp.ones(1, jnp.int32), alignment=128, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        op.row_alignment(128, 1, implementation="pallas_gpu")


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='triton'"):
        op.row_alignment(8, 2, implementation="triton")


@pytest.mark.parametrize("w_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("contraction", "columns"), [(7168, 4096), (2048, 7168), (64, 128), (192, 320), (128, 64)])
def test_kernels_lower_for_cuda(contraction, columns, w_dtype):
    """Everything Mosaic checks without a GPU: operand layouts, tiling and shared-memory size of the tuned tiles."""
    num_rows, num_groups = 1024, 3
    x = jax.ShapeDtypeStruct((num_rows, contraction), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((num_groups, contraction, columns), w_dtype)
    sizes = jax.ShapeDtypeStruct((num_groups,), jnp.int32)

    def value_and_gradients(x, w, sizes):
        y, vjp = jax.vjp(lambda x, w: pallas_gpu.grouped_matmul(x, w, sizes), x, w)
        return y, vjp(y)

    exported = jax.export.export(jax.jit(value_and_gradients), platforms=["cuda"])(x, w, sizes)
    assert exported.mlir_module().count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
    ("sizes", "contraction", "columns", "tile"),
    [
        ((130, 0, 5), 64, 128, None),
        ((0, 100, 1), 192, 128, tuned.Tile(columns=64, store_columns=64, stages=2)),
    ],
)
def test_kernels_in_the_interpreter(monkeypatch, sizes, contraction, columns, tile):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the Mosaic GPU interpreter of JAX {jax.__version__} cannot transpose operands; 0.11 can")
    interpret = plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized")
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=interpret))
    monkeypatch.setattr(pallas_gpu, "NUM_SMS", 2)
    x, w, dy, group_sizes, starts = make_operands(sizes, contraction, columns, 128, jnp.bfloat16, spare_rows=128)
    expected_y, expected_dx, expected_dw = multiply_by_loop(x, w, dy, group_sizes, starts)
    multiply = functools.partial(pallas_gpu.rows_times_weights, group_sizes_E=group_sizes, tile=tile)
    assert_close(multiply(x, w, weights_are_transposed=False), expected_y, BF16_TOLERANCE)
    assert_close(multiply(dy, w, weights_are_transposed=True), expected_dx, BF16_TOLERANCE)
    dw = pallas_gpu.weight_gradient(x, dy, group_sizes, out_dtype=jnp.float32, tile=tile)
    assert_close(dw, expected_dw, 1e-5)
    assert not np.any(np.asarray(dw)[np.asarray(sizes) == 0]), "an empty group has exactly zero gradient"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "contraction", "columns"),
    [((130, 0, 5, 1000), 64, 128), ((0, 100, 1), 192, 320), ((0, 2000, 0), 512, 768), ((7, 300, 128), 128, 64)],
)
def test_kernels_on_hopper(sizes, contraction, columns):
    x, w, dy, group_sizes, starts = make_operands(sizes, contraction, columns, 128, jnp.bfloat16, spare_rows=256)
    multiply = functools.partial(op.grouped_matmul, alignment=128, implementation="pallas_gpu")
    y, vjp = jax.vjp(lambda x, w: multiply(x, w, group_sizes), x, w)
    for actual, expected in zip((y, *vjp(dy)), multiply_by_loop(x, w, dy, group_sizes, starts)):
        assert_close(actual, expected, BF16_TOLERANCE)
    dw = jax.vjp(lambda w: multiply(x, w, group_sizes), w.astype(jnp.float32))[1](dy)[0]
    assert_close(dw, multiply_by_loop(x, w, dy, group_sizes, starts)[2], 1e-5)
    assert not np.any(np.asarray(dw)[np.asarray(sizes) == 0]), "an empty group has exactly zero gradient"
