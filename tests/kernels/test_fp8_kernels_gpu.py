"""Hopper kernels of FP8 products: lowered for CUDA, interpreted, compiled for an absent H200, and on one."""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_cases import other_calls, product_calls, ragged_calls
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8 import formats
from dsv3_jax.kernels import scaled_matmul
from dsv3_jax.kernels.fp8_matmul import pallas_gpu as dense
from dsv3_jax.kernels.fp8_matmul import reference, tuned
from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8 as grouped
from dsv3_jax.kernels.grouped_matmul import reference_fp8 as grouped_reference

Tile, FewRowsTile = scaled_matmul.Tile, tuned.FewRowsTile
OUTPUT_ROUNDING = {jnp.bfloat16: 2.0**-8, jnp.float32: 2.0**-20}  # of sums whose terms were added in another order
LOWERED = product_calls() | ragged_calls()


@pytest.mark.parametrize("name", LOWERED)
def test_every_tuned_tile_lowers_for_cuda(name):
    """Everything Mosaic checks without a GPU: operand layouts, tiling, shared-memory size."""
    call = LOWERED[name]
    exported = jax.export.export(jax.jit(call.function), platforms=["cuda"])(*call.operands)
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == 1


def draw_rows(num_rows: int, contraction: int, *, seed: int = 0, spread: int = 0) -> formats.QuantizedArray:
    """Quantizes normal values; with a spread, rows differ by up to 2^spread and outliers of 1e4 are among them."""
    return formats.quantize_rows(draw(num_rows, contraction, seed=seed, spread=spread))


def draw(*shape: int, seed: int = 0, spread: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if spread:
        x *= 2.0 ** rng.integers(-spread, 1, size=(*shape[:-1], 1))
        x[rng.random(shape) < 1e-3] *= 1e4
    return jnp.asarray(x, jnp.float32)


def assert_close(actual: jax.Array, expected: jax.Array, out_dtype) -> None:
    """Asserts that entries differ by no more than rounding, relative to the largest of their row."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(actual - expected) <= OUTPUT_ROUNDING[out_dtype] * scale).all()


def check_dense(num_rows, num_columns, contraction, *, b_tile, out_dtype, tile=None, spread=0):
    a = draw_rows(num_rows, contraction, spread=spread)
    w = draw(num_columns, contraction, seed=1, spread=spread)
    b = formats.quantize_weight_blocks(w) if b_tile == "block" else formats.quantize_rows(w)
    actual = dense.fp8_matmul(a, b, out_dtype=out_dtype, tile=tile)
    assert_close(actual, reference.fp8_matmul(a, b, out_dtype=out_dtype), out_dtype)


def check_grouped(sizes, num_columns, contraction, *, product_tile=None, gradient_tile=None, spread=0):
    """Checks the product and the weight gradient; rows past the last group hold NaN, which must reach nothing."""
    live = [-(-size // 128) * 128 for size in sizes]
    num_rows = sum(live) + 128
    is_row = np.concatenate([np.arange(rows) < size for size, rows in zip(sizes, live)] + [np.zeros(128, bool)])
    x_MK = jnp.where(is_row[:, None], draw(num_rows, contraction, spread=spread), 0.0).at[sum(live) :].set(jnp.nan)
    dy_MC = jnp.where(is_row[:, None], draw(num_rows, num_columns, seed=2), 0.0).at[sum(live) :].set(jnp.nan)
    b = formats.quantize_weight_blocks(draw(len(sizes), num_columns, contraction, seed=1))
    sizes_E = jnp.asarray(sizes, jnp.int32)
    operands = (formats.quantize_rows(x_MK), b, sizes_E)
    actual = grouped.grouped_fp8_matmul(*operands, alignment=128, tile=product_tile)
    expected = grouped_reference.grouped_fp8_matmul(*operands, alignment=128, out_dtype=jnp.bfloat16)
    assert_close(actual[: sum(live)], expected[: sum(live)], jnp.bfloat16)
    operands = (formats.quantize_columns(x_MK), formats.quantize_columns(dy_MC), sizes_E)
    actual = grouped.grouped_fp8_weight_gradient(*operands, alignment=128, tile=gradient_tile)
    expected = grouped_reference.grouped_fp8_weight_gradient(*operands, alignment=128, out_dtype=jnp.float32)
    assert_close(actual, expected, jnp.float32)
    assert not np.asarray(actual)[np.asarray(sizes) == 0].any(), "an empty group has exactly zero gradient"


@pytest.fixture
def interpreter(monkeypatch):
    """Runs kernels in Pallas's GPU interpreter on few multiprocessors, with race detection."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the Mosaic GPU interpreter of JAX {jax.__version__} cannot transpose operands; that of 0.11 can")
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # TMA reads zeros outside a tensor
    params = InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=params))
    monkeypatch.setattr(scaled_matmul, "NUM_SMS", 4)
    yield
    assert not interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()


FENCED = Tile(warpgroups=2, stages=2, fence=True)  # the race detector does not know why the fence can be left out
FENCED_FLOAT32 = Tile(warpgroups=2, stages=2, store_columns=32, store_slots=2, fence=True)


@pytest.mark.parametrize(
    ("shape", "b_tile", "out_dtype", "tile"),
    [
        ((200, 144, 320), "block", jnp.bfloat16, FENCED),
        ((130, 400, 272), "block", jnp.bfloat16, Tile(warpgroups=2, stages=2, cluster=2, fence=True)),
        ((130, 160, 272), "row", jnp.float32, FENCED_FLOAT32),
        ((70, 100, 400), "block", jnp.bfloat16, FewRowsTile(columns=64, warpgroups=2, stages=4, fence=True)),
    ],
)
def test_dense_kernels_in_the_interpreter_without_races(interpreter, shape, b_tile, out_dtype, tile):
    check_dense(*shape, b_tile=b_tile, out_dtype=out_dtype, tile=tile)


def test_grouped_kernels_in_the_interpreter_without_races(interpreter):
    check_grouped((130, 0, 5), 192, 256, product_tile=FENCED, gradient_tile=FENCED_FLOAT32)


def test_partial_tiles_leave_stores_under_way_alone(interpreter, monkeypatch):
    monkeypatch.setattr(scaled_matmul, "NUM_SMS", 1)  # all tiles in one thread block, one after the other
    tile = Tile(warpgroups=1, stages=2, store_columns=32, store_slots=2, fence=True)
    check_dense(130, 160, 128, b_tile="row", out_dtype=jnp.float32, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 580, 1552), (129, 2116, 7184), (200, 144, 320), (4096, 2112, 7168)])
@pytest.mark.parametrize(("b_tile", "out_dtype"), [("block", jnp.bfloat16), ("row", jnp.float32)])
def test_dense_kernels_on_hopper(shape, b_tile, out_dtype):
    check_dense(*shape, b_tile=b_tile, out_dtype=out_dtype, spread=20)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(130, 0, 5, 1000), (0, 0, 2000), (1,) * 32, (0, 0), (128, 128, 384)])
def test_grouped_kernels_on_hopper(sizes):
    check_grouped(sizes, 576, 720, spread=20)


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """Compiles every call for an H200 in a process of its own; gives ptxas's account of each kernel by call."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("compiling for a GPU that is not there needs the jax-cuda13-plugin and jax-cuda13-pjrt packages")
    program = pathlib.Path(__file__).with_name("compile_for_h200.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.deviceless
@pytest.mark.parametrize("name", LOWERED | other_calls())
def test_kernels_compile_for_an_h200_without_spills(compiled, name):
    assert compiled[name], "no kernel was compiled"
    for kernel in compiled[name]:
        assert (kernel["stack_bytes"], kernel["spill_stores"], kernel["spill_loads"]) == (0, 0, 0), kernel
        assert 0 < kernel["registers"] * kernel["threads"] <= 65536, kernel


@pytest.mark.deviceless
@pytest.mark.parametrize("name", LOWERED)
def test_products_run_on_fp8_tensor_cores(compiled, name):
    (kernel,) = compiled[name]
    if kernel["qgmma"] is None:
        pytest.skip("counting instructions needs ptxas and nvdisasm of the CUDA toolkit")
    assert kernel["qgmma"] >= 4, "128 of the contraction are four instructions of 32"
    assert kernel["local_memory"] == 0


@pytest.mark.deviceless
def test_weights_are_divided_as_rounding_allows(compiled):
    """Correct rounding rests on a remainder, and that on the difference of a rounded quotient and its upper half."""
    (kernel,) = compiled["quantize_weights"]
    assert kernel["products_made_twice"] == 0, "the difference is one from the unrounded quotient"
    assert kernel["approximate_divisions"] == 0
