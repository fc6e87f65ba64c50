"""Hopper kernels of FP8 products: lowered for CUDA, interpreted, compiled for an absent H200, and on one."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_cases import other_calls, product_calls, ragged_calls, unusual_tiles
from jax.experimental.pallas import mosaic_gpu as plgpu
from tensor_core_rounding import assert_product, widen

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import QuantizedArray
from dsv3_jax.kernels import scaled_matmul
from dsv3_jax.kernels.fp8_matmul import pallas_gpu as dense
from dsv3_jax.kernels.fp8_matmul import reference, tuned
from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8 as grouped
from dsv3_jax.kernels.grouped_matmul import reference_fp8 as grouped_reference

Tile, FewRowsTile = scaled_matmul.Tile, tuned.FewRowsTile
REORDERED_SUMS = {jnp.bfloat16: 2.0**-8, jnp.float32: 2.0**-20}  # of exact products, then rounded
LOWERED = product_calls() | ragged_calls()


@pytest.mark.parametrize("name", LOWERED)
def test_every_tuned_tile_lowers_for_cuda(name):
    """Everything Mosaic checks without a GPU: operand layouts, tiling, shared-memory size."""
    call = LOWERED[name]
    exported = jax.export.export(jax.jit(call.function), platforms=["cuda"])(*call.operands)
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == 1


def draw(*shape: int, seed: int = 0, spread: int = 0) -> jax.Array:
    """Draws normal values; with a spread, rows differ by up to 2^spread and outliers of 1e4 are among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if spread:
        x *= 2.0 ** rng.integers(-spread, 1, size=(*shape[:-1], 1))
        x[rng.random(shape) < 1e-3] *= 1e4
    return jnp.asarray(x, jnp.float32)


def dense_operands(
    num_rows: int, num_columns: int, contraction: int, *, b_tile: str, spread: int = 0
) -> tuple[QuantizedArray, QuantizedArray]:
    w = draw(num_columns, contraction, seed=1, spread=spread)
    b = formats.quantize_weight_blocks(w) if b_tile == "block" else formats.quantize_rows(w)
    return formats.quantize_rows(draw(num_rows, contraction, spread=spread)), b


class Grouped(NamedTuple):
    """Operands of the product and of the weight gradient of groups."""

    rows: QuantizedArray  # those past the last group hold NaN, which must reach nothing
    weights: QuantizedArray
    columns: QuantizedArray  # the rows, by columns
    dy_columns: QuantizedArray
    sizes_E: jax.Array
    ends: list[int]  # row after each group and its padding


def grouped_operands(sizes: tuple[int, ...], num_columns: int, contraction: int, *, spread: int = 0) -> Grouped:
    live = [-(-size // 128) * 128 for size in sizes]
    num_rows = sum(live) + 128
    is_row = np.concatenate([np.arange(rows) < size for size, rows in zip(sizes, live)] + [np.zeros(128, bool)])
    x_MK = jnp.where(is_row[:, None], draw(num_rows, contraction, spread=spread), 0.0).at[sum(live) :].set(jnp.nan)
    dy_MC = jnp.where(is_row[:, None], draw(num_rows, num_columns, seed=2), 0.0).at[sum(live) :].set(jnp.nan)
    weights = formats.quantize_weight_blocks(draw(len(sizes), num_columns, contraction, seed=1))
    columns, dy_columns = formats.quantize_columns(x_MK), formats.quantize_columns(dy_MC)
    sizes_E, ends = jnp.asarray(sizes, jnp.int32), list(itertools.accumulate(live))
    return Grouped(formats.quantize_rows(x_MK), weights, columns, dy_columns, sizes_E, ends)


def assert_rounded_once(actual: jax.Array, expected: jax.Array) -> None:
    """Asserts that entries differ by no more than rounding, relative to the largest of their row."""
    tolerance = REORDERED_SUMS[actual.dtype.type]
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(actual - expected) <= tolerance * scale).all()


def assert_empty_groups_are_zero(dw_ECK: jax.Array, sizes: tuple[int, ...] | jax.Array) -> None:
    assert not np.asarray(dw_ECK)[np.asarray(sizes) == 0].any(), "an empty group has exactly zero gradient"


@pytest.fixture
def interpreter(monkeypatch):
    """Runs kernels in Pallas's GPU interpreter on few multiprocessors, with race detection."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the Mosaic GPU interpreter of JAX {jax.__version__} cannot transpose operands; that of 0.11 can")
    import multicast
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    multicast.install(monkeypatch)
    # TMA reads zeros outside a tensor
    filled_with_zeros = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
    # what is ignored are addresses
    params = InterpretGPUParams(detect_races=True, inline_mgpu="ignore", **filled_with_zeros)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=params))
    monkeypatch.setattr(scaled_matmul, "NUM_SMS", 4)
    yield
    assert not interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()


FENCED = Tile(warpgroups=2, stages=2, fence=True)  # the race detector does not know why the fence can be left out
FENCED_FLOAT32 = Tile(warpgroups=2, stages=2, store_columns=32, store_slots=2, fence=True)
TWO_IN_FLIGHT = dataclasses.replace(FENCED_FLOAT32, in_flight=2)
IN_CLUSTERS = dataclasses.replace(FENCED_FLOAT32, cluster=2)
TWO_IN_FLIGHT_IN_CLUSTERS = dataclasses.replace(IN_CLUSTERS, in_flight=2, stages=3, early_addresses=True)


@pytest.mark.parametrize(
    ("shape", "b_tile", "out_dtype", "tile"),
    [
        ((200, 141, 319), "block", jnp.bfloat16, FENCED),
        ((131, 157, 270), "row", jnp.float32, FENCED_FLOAT32),
        ((200, 141, 319), "block", jnp.bfloat16, TWO_IN_FLIGHT),
        ((131, 157, 270), "row", jnp.float32, TWO_IN_FLIGHT),
        ((131, 300, 319), "block", jnp.bfloat16, IN_CLUSTERS),
        ((131, 90, 270), "row", jnp.float32, TWO_IN_FLIGHT_IN_CLUSTERS),
        ((69, 99, 391), "block", jnp.bfloat16, FewRowsTile(columns=64, warpgroups=2, stages=4, fence=True)),
    ],
)
def test_dense_kernels_in_the_interpreter_without_races(interpreter, shape, b_tile, out_dtype, tile):
    a, b = dense_operands(*shape, b_tile=b_tile)
    actual = dense.fp8_matmul(a, b, out_dtype=out_dtype, tile=tile)
    assert_rounded_once(actual, reference.fp8_matmul(a, b, out_dtype=out_dtype))


@pytest.mark.parametrize(
    ("tile", "gradient_tile"),
    [(FENCED, FENCED_FLOAT32), (TWO_IN_FLIGHT, TWO_IN_FLIGHT), (IN_CLUSTERS, TWO_IN_FLIGHT_IN_CLUSTERS)],
)
def test_grouped_kernels_in_the_interpreter_without_races(interpreter, tile, gradient_tile):
    sizes = (130, 0, 5)
    drawn = grouped_operands(sizes, 190, 250)
    operands = (drawn.rows, drawn.weights, drawn.sizes_E)
    actual = grouped.grouped_fp8_matmul(*operands, alignment=128, tile=tile)
    expected = grouped_reference.grouped_fp8_matmul(*operands, alignment=128, out_dtype=jnp.bfloat16)
    assert_rounded_once(actual[: drawn.ends[-1]], expected[: drawn.ends[-1]])
    operands = (drawn.columns, drawn.dy_columns, drawn.sizes_E)
    actual = grouped.grouped_fp8_weight_gradient(*operands, alignment=128, tile=gradient_tile)
    expected = grouped_reference.grouped_fp8_weight_gradient(*operands, alignment=128, out_dtype=jnp.float32)
    assert_rounded_once(actual, expected)
    assert_empty_groups_are_zero(actual, sizes)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((130, 160, 128), {}),
        ((200, 256, 128), {"store_slots": 3}),
        ((200, 160, 128), {"store_columns": 128}),
    ],
)
def test_partial_tiles_leave_stores_under_way_alone(interpreter, monkeypatch, shape, changes):
    monkeypatch.setattr(scaled_matmul, "NUM_SMS", 1)  # all tiles in one thread block, one after the other
    tile = dataclasses.replace(FENCED_FLOAT32, warpgroups=1, **changes)
    a, b = dense_operands(*shape, b_tile="row")
    actual = dense.fp8_matmul(a, b, out_dtype=jnp.float32, tile=tile)
    assert_rounded_once(actual, reference.fp8_matmul(a, b, out_dtype=jnp.float32))


@pytest.mark.parametrize(("contraction", "parts"), [(767, 3), (600, 2), (300, 1)])
@pytest.mark.parametrize("tile", [FENCED_FLOAT32, IN_CLUSTERS])
def test_contractions_in_parts_in_the_interpreter_without_races(interpreter, monkeypatch, contraction, parts, tile):
    monkeypatch.setattr(dense, "MIN_STEPS_OF_PART", 2)
    a, b = dense_operands(131, 157, contraction, b_tile="row")
    assert dense.num_parts(2, -(-contraction // 128), tile) == parts
    actual = dense.fp8_matmul(a, b, out_dtype=jnp.float32, tile=tile)
    assert_rounded_once(actual, reference.fp8_matmul(a, b, out_dtype=jnp.float32))


@pytest.mark.parametrize("tile", [FENCED_FLOAT32, TWO_IN_FLIGHT_IN_CLUSTERS])
def test_squares_add_up_in_the_interpreter_without_races(interpreter, monkeypatch, tile):
    """Of partial tiles, of several tiles of one thread block, of groups without rows, of parts of a contraction."""
    a, b = dense_operands(331, 300, 270, b_tile="row")
    assert_squares_of(dense.fp8_matmul_with_squares(a, b, tile=tile), reference.fp8_matmul(a, b, out_dtype=jnp.float32))
    drawn = grouped_operands((130, 0, 5), 190, 250)
    operands = (drawn.columns, drawn.dy_columns, drawn.sizes_E)
    actual = grouped.grouped_fp8_weight_gradient_with_squares(*operands, alignment=128, tile=tile)
    expected = grouped_reference.grouped_fp8_weight_gradient(*operands, alignment=128, out_dtype=jnp.float32)
    assert_squares_of(actual, expected)
    monkeypatch.setattr(dense, "num_parts", lambda *_: 2)
    a, b = dense_operands(70, 60, 270, b_tile="row")
    assert_squares_of(dense.fp8_matmul_with_squares(a, b, tile=tile), reference.fp8_matmul(a, b, out_dtype=jnp.float32))


def assert_squares_of(actual: tuple[jax.Array, jax.Array], expected: jax.Array) -> None:
    """Asserts that values are near the expected ones, and the sum of their squares theirs, added in any order."""
    values, squares = actual
    assert_rounded_once(values, expected)
    np.testing.assert_allclose(squares, np.sum(np.square(np.asarray(values, np.float64))), rtol=1e-6)


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tile(cluster=5), r"tile.cluster=5: must divide 132 multiprocessors"),
        (Tile(warpgroups=1, cluster=4), r"tile.cluster=4: must divide the 64 rows of a tile into multiples of 32"),
        (Tile(in_flight=3), r"tile.in_flight=3: must be 1 or 2"),
        (Tile(in_flight=2, stages=1), r"tile.stages=1: must be at least tile.in_flight=2"),
    ],
)
def test_impossible_tiles_are_refused(tile, words):
    with pytest.raises(ValueError, match=words):
        dense.fp8_matmul(*dense_operands(200, 144, 320, b_tile="block"), tile=tile)


@pytest.mark.parametrize(
    ("shape", "in_flight"),
    [((4096, 4096), 2), ((4096, 7168), 2), ((192, 2112), 2), ((4096, 2112), 1), ((8192, 8192), 1)],
)
def test_a_dense_product_gets_the_tile_with_which_all_are_ready_first(shape, in_flight):
    """Of 6 rounds of 192 rows and 8 of 128, the latter are shorter; of 3 and 5, the former; of 1 and 1, the latter."""
    for out_dtype in (jnp.bfloat16, jnp.float32):
        assert tuned.fp8_matmul(*shape, out_dtype).in_flight == in_flight


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 16),
        (33, 37, 7),
        (7, 580, 1552),
        (129, 2116, 7184),
        (200, 144, 320),
        (4096, 2112, 7168),
        (384, 700, 8192),
    ],
)
@pytest.mark.parametrize(("b_tile", "out_dtype"), [("block", jnp.bfloat16), ("row", jnp.float32)])
@pytest.mark.parametrize("spread", [0, 20])
def test_dense_kernels_on_hopper(shape, b_tile, out_dtype, spread):
    a, b = dense_operands(*shape, b_tile=b_tile, spread=spread)
    assert_product(dense.fp8_matmul(a, b, out_dtype=out_dtype), widen(a), widen(b), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 37, 7), (129, 2116, 7184), (4096, 2112, 7168)])
def test_squares_of_dense_kernels_add_up_on_hopper(shape):
    a, b = dense_operands(*shape, b_tile="row")
    assert_squares_of(dense.fp8_matmul_with_squares(a, b), dense.fp8_matmul(a, b, out_dtype=jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(130, 0, 5, 1000), (1,) * 32, (0, 0)])
def test_squares_of_grouped_kernels_add_up_on_hopper(sizes):
    drawn = grouped_operands(sizes, 576, 720)
    operands = (drawn.columns, drawn.dy_columns, drawn.sizes_E)
    actual = grouped.grouped_fp8_weight_gradient_with_squares(*operands, alignment=128)
    assert_squares_of(actual, grouped.grouped_fp8_weight_gradient(*operands, alignment=128))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(130, 0, 5, 1000), (0, 0, 2000), (1,) * 32, (0, 0), (128, 128, 384)])
@pytest.mark.parametrize("spread", [0, 20])
@pytest.mark.parametrize("widths", [(576, 720), (37, 45)])
def test_grouped_kernels_on_hopper(sizes, widths, spread):
    assert_grouped_products(grouped_operands(sizes, *widths, spread=spread), tile=None, gradient_tile=None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(300, 2112, 7168), (4096, 2112, 512), (1, 576, 1552), (129, 100, 320), (2000, 576, 7184)]
)
@pytest.mark.parametrize(("b_tile", "out_dtype"), [("block", jnp.bfloat16), ("row", jnp.float32)])
@pytest.mark.parametrize("name", unusual_tiles(jnp.bfloat16))
def test_dense_kernels_with_unusual_tiles_on_hopper(shape, b_tile, out_dtype, name):
    a, b = dense_operands(*shape, b_tile=b_tile)
    tile = unusual_tiles(out_dtype)[name]
    assert_product(dense.fp8_matmul(a, b, out_dtype=out_dtype, tile=tile), widen(a), widen(b), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(130, 0, 5, 1000), (0, 0, 2000), (777,), (0, 0), (1, 700, 129, 3, 4000, 260)])
@pytest.mark.parametrize("widths", [(576, 720), (2112, 300)])
@pytest.mark.parametrize("name", unusual_tiles(jnp.bfloat16))
def test_grouped_kernels_with_unusual_tiles_on_hopper(sizes, widths, name):
    """Of groups of uneven sizes, warpgroups that have no rows pass over steps: there clusters could stop for ever."""
    tile, gradient_tile = unusual_tiles(jnp.bfloat16)[name], unusual_tiles(jnp.float32)[name]
    assert_grouped_products(grouped_operands(sizes, *widths), tile=tile, gradient_tile=gradient_tile)


def assert_grouped_products(drawn: Grouped, *, tile: Tile | None, gradient_tile: Tile | None) -> None:
    """Asserts that the product and the weight gradient of each group are that of its values."""
    settings = {"alignment": 128}
    y_MC = grouped.grouped_fp8_matmul(drawn.rows, drawn.weights, drawn.sizes_E, tile=tile, **settings)
    columns = (drawn.columns, drawn.dy_columns)
    dw_EKC = grouped.grouped_fp8_weight_gradient(*columns, drawn.sizes_E, tile=gradient_tile, **settings)
    rows, weights, columns, dy_columns = map(widen, drawn[:4])
    for group, (start, end) in enumerate(itertools.pairwise([0, *drawn.ends])):
        own = slice(start, end)
        assert_product(y_MC[own], rows[own], weights[group], jnp.bfloat16)
        assert_product(dw_EKC[group], columns[:, own], dy_columns[:, own], jnp.float32)
    assert_empty_groups_are_zero(dw_EKC, drawn.sizes_E)


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
@pytest.mark.parametrize("name", [name for name in other_calls() if "swiglu_gradient" in name])
def test_three_thread_blocks_of_swiglu_gradients_have_registers_on_a_multiprocessor(compiled, name):
    for kernel in compiled[name]:
        assert 3 * kernel["registers"] * kernel["threads"] <= 65536, kernel


@pytest.mark.deviceless
@pytest.mark.parametrize("name", LOWERED)
def test_products_run_on_fp8_tensor_cores(compiled, name):
    (kernel,) = compiled[name]
    if kernel["qgmma"] is None:
        pytest.skip("counting instructions needs ptxas and nvdisasm of the CUDA toolkit")
    assert kernel["qgmma"] >= 4, "128 of the contraction are four instructions of 32"
    assert kernel["qgmma"] == 4 * kernel["qgmma_from_zero"], "partial products start from registers that were cleared"
    assert kernel["local_memory"] == 0


@pytest.mark.deviceless
@pytest.mark.parametrize("name", [name for name in LOWERED if "3 stages" in name])
def test_early_addresses_are_found_before_waits(compiled, name):
    (kernel,) = compiled[name]
    if kernel["addresses_after_waits"] is None:
        pytest.skip("reading instructions needs ptxas and nvdisasm of the CUDA toolkit")
    (late,) = compiled[name.removesuffix(" of 3 stages")]
    # ptxas moves one back in one of these kernels.
    assert kernel["addresses_after_waits"] <= 1 < late["addresses_after_waits"]


@pytest.mark.deviceless
def test_weights_are_divided_as_rounding_allows(compiled):
    """Correct rounding rests on a remainder, and that on the difference of a rounded quotient and its upper half."""
    (kernel,) = compiled["quantize_weights"]
    assert kernel["products_made_twice"] == 0, "the difference is one from the unrounded quotient"
    assert kernel["approximate_divisions"] == 0
