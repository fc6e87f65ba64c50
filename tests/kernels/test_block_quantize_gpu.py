"""The Hopper quantizers against the reference: interpreted, lowered for CUDA, and on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import E5M6Array, QuantizedArray
from dsv3_jax.kernels.block_quantize import instructions, pallas_gpu, reference

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpreting transposed shared memory needs JAX 0.11 or later"
)
# approximate exp and another order of sums move a value by a few float32 steps: a code by one step in few places
FUSED_SHARE = 2e-3


def draw(shape, *, seed=0, dtype=jnp.bfloat16):
    """Draws values whose tiles differ in scale by up to 2^12, with outliers of 1e4."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 7, size=(shape[0], 1))
    x[rng.random(shape) < 1e-3] *= 1e4
    return jnp.asarray(x, dtype)


def assert_same(actual: QuantizedArray, expected: QuantizedArray, *, share=0.0):
    """Asserts equal arrays, or all but a share of codes that are off by one step and of scales off by a factor 2."""
    assert actual.codes.shape == expected.codes.shape and actual.scales.shape == expected.scales.shape
    codes, expected_codes = (np.asarray(q.codes).astype(np.float32) for q in (actual, expected))
    if share == 0:
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(np.asarray(actual.scales), np.asarray(expected.scales))
        return
    assert (np.asarray(actual.scales) != np.asarray(expected.scales)).mean() <= share
    assert (codes != expected_codes).mean() <= share
    values, expected_values = (np.asarray(formats.dequantize(q)) for q in (actual, expected))
    np.testing.assert_allclose(values, expected_values, rtol=0.13, atol=np.abs(expected_values).max() * 2**-17)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: its name and operands."""

    name: str
    operands: tuple
    share: float = 0.0


def make_case(name: str, rows: int, columns: int) -> Case:
    """Draws operands; `columns` are those of what is quantized first."""
    x = draw((rows, columns), seed=columns)
    if name in EXACT:
        x = x.at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf).at[2:4].set(0).at[4].multiply(2.0**-135)
    if name == "rows_to_columns":
        return Case(name, (formats.quantize_rows(x),))
    if name == "rms_norm_rows":
        return Case(name, (x, draw((1, columns))[0], 1e-6), FUSED_SHARE)
    if name == "swiglu_rows":
        return Case(name, (x,), FUSED_SHARE)
    if name == "swiglu_columns":
        return Case(name, (formats.quantize_rows(x),), FUSED_SHARE)
    if name == "swiglu_gradient":
        return Case(name, (formats.quantize_rows(x), draw((rows, columns // 2), seed=1)), FUSED_SHARE)
    if name == "weighted_swiglu_gradient":
        weights = jnp.asarray(np.random.default_rng(2).uniform(size=rows), jnp.float32).at[7].set(0)
        return Case(name, (formats.quantize_rows(x), draw((rows, columns // 2), seed=1), weights), FUSED_SHARE)
    if name == "decode_columns":
        return Case(name, (formats.encode_e5m6(x),))
    return Case(name, (x,))


def check(case: Case):
    actual = getattr(pallas_gpu, case.name)(*case.operands)
    expected = getattr(reference, case.name)(*case.operands)
    if isinstance(actual, QuantizedArray):
        actual, expected = (actual,), (expected,)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        if isinstance(one, QuantizedArray):
            assert_same(one, other, share=case.share)
        elif isinstance(one, E5M6Array):
            jax.tree.map(np.testing.assert_array_equal, one, other)
        else:  # sums over rows in another order
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


# name -> ugly shapes: partial tiles along both dimensions, rows in multiples of 16
SHAPES = {
    "quantize_rows": [(144, 192), (16, 64)],
    "quantize_columns": [(192, 320)],
    "quantize_rows_and_columns": [(208, 320), (128, 128)],
    "quantize_rows_and_encode": [(144, 512)],
    "decode_columns": [(144, 512)],
    "rows_to_columns": [(192, 320)],
    "rms_norm_rows": [(16, 768), (16, 512)],
    "swiglu_rows": [(144, 512)],
    "swiglu_columns": [(192, 256)],
    "swiglu_gradient": [(208, 512)],
    "weighted_swiglu_gradient": [(256, 512)],
}
EXACT = [name for name in SHAPES if "quantize" in name or name in ("rows_to_columns", "decode_columns")]
CALLS = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture
def interpreter(monkeypatch):
    """Runs kernels in Pallas's GPU interpreter, with race detection."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # TMA reads zeros outside a tensor
    params = InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=params))
    # it has none of a GPU's own instructions
    monkeypatch.setattr(instructions, "reciprocals", lambda x, _: 1 / x)
    monkeypatch.setattr(instructions, "widen", lambda x, _: x.astype(jnp.float32))
    monkeypatch.setattr(
        instructions, "largest_magnitudes", lambda x, _: jnp.where(jnp.isnan(x), 0, jnp.abs(x)).max(axis=-1)
    )
    yield
    assert not interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@interpreted
@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_kernels_equal_the_reference_without_races(interpreter, name, shape):
    check(make_case(name, *shape))


def check_extremes():
    """Compares gradients of SwiGLU where scales and weights times inverses of scales leave float32."""
    rows = 128
    gate_up, dhidden = draw((rows, 256)), draw((rows, 128), seed=1)
    gate_up = gate_up.at[3].multiply(1e9).at[4, 130].set(jnp.inf).at[5].multiply(2.0**-120)
    dhidden = dhidden.at[3].set(0).at[6, 7].set(jnp.nan).at[7].multiply(2.0**-120).at[8, 9].set(jnp.inf).at[11].set(0)
    weights = jnp.ones(rows).at[8].set(0).at[9].set(jnp.nan).at[10].set(-2).at[11].set(1e30)
    operands = formats.quantize_rows(gate_up), dhidden, weights
    *actual, actual_sums = pallas_gpu.weighted_swiglu_gradient(*operands)
    *expected, expected_sums = reference.weighted_swiglu_gradient(*operands)
    for one, other in zip(actual, expected):
        values, expected_values = (np.asarray(formats.dequantize(q)) for q in (one, other))
        np.testing.assert_array_equal(np.isnan(values), np.isnan(expected_values))
        is_number = ~np.isnan(values)
        assert is_number.any()
        assert (values != expected_values)[is_number].mean() < FUSED_SHARE
        assert (np.asarray(one.scales) != np.asarray(other.scales)).mean() < FUSED_SHARE
    np.testing.assert_allclose(actual_sums, expected_sums, rtol=1e-4, atol=2.0**-100)


@interpreted
def test_extreme_scales_and_weights_become_no_other_values(interpreter):
    check_extremes()


@pytest.mark.gpu
def test_extreme_scales_and_weights_become_no_other_values_on_a_gpu():
    check_extremes()


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_kernels_lower_for_cuda(name, shape):
    case = make_case(name, *shape)
    is_static = tuple(i for i, operand in enumerate(case.operands) if isinstance(operand, float))
    jax.export.export(jax.jit(getattr(pallas_gpu, name), static_argnums=is_static), platforms=["cuda"])(*case.operands)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape"), [*CALLS, *((name, (1152, 3072)) for name in SHAPES)])
def test_kernels_equal_the_reference_on_a_gpu(name, shape):
    check(make_case(name, *shape))
