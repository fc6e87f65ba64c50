"""The weight quantizer against NumPy's division: the plain one; the Hopper kernel interpreted, lowered, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal

from dsv3_jax.kernels import block_quantize as op
from dsv3_jax.kernels.block_quantize import weights

E4M3 = ml_dtypes.float8_e4m3fn
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpreting transposed shared memory needs JAX 0.11 or later"
)
# partial blocks along both dimensions, by 16 and by 64; a block at the end of which half a block has no values
SHAPES = [(16, 16), (1, 2, 144, 320), (2, 208, 80), (64, 192)]


def draw(*shape: int) -> np.ndarray:
    """Draws weights of which most quotients are a code, halfway between two, or a float32 beside that."""
    rng = np.random.default_rng(sum(shape))
    weight = rng.normal(size=shape).astype(np.float32) * np.float32(0.02)
    codes = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    targets = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2])
    for block in blocks_of(weight):
        largest = np.abs(block).max()
        quotients = rng.choice(targets, size=block.shape) * rng.choice(np.float32([-1, 1]), size=block.shape)
        values = quotients * (largest / np.float32(448))
        values = np.nextafter(values, values + rng.choice(np.float32([-1, 0, 1]), size=block.shape))
        is_hard = (rng.random(block.shape) < 0.8) & (np.abs(values) < largest) & (np.abs(block) < largest)
        block[...] = np.where(is_hard, values, block)
    return weight


def blocks_of(array: np.ndarray) -> list[np.ndarray]:
    """Returns views of the 128x128 blocks, matrix by matrix, row by row."""
    matrices = array.reshape(-1, *array.shape[-2:])
    rows, columns = (range(0, size, 128) for size in array.shape[-2:])
    return [matrix[i : i + 128, j : j + 128] for matrix in matrices for i in rows for j in columns]


def check(quantize, weight: np.ndarray) -> None:
    """Asserts that both orientations hold the published codes and scales, and zeros where scales are unused."""
    codes, scales = np.empty(weight.shape, E4M3), []
    for block, block_codes in zip(blocks_of(weight), blocks_of(codes)):
        amax = np.abs(block).max()
        scales.append(np.maximum(amax, np.float32(1e-4)) / np.float32(448) if np.isfinite(amax) else np.nan)
        block_codes[...] = np.clip(block / scales[-1], -448, 448)
    num_blocks = (-(-size // 128) for size in weight.shape[-2:])
    scales = np.reshape(np.float32(scales), (*weight.shape[:-2], *num_blocks))
    forward, backward = quantize(jnp.asarray(weight))
    assert_holds(backward, codes, scales)
    assert_holds(forward, np.swapaxes(codes, -1, -2), np.swapaxes(scales, -1, -2))


def assert_holds(quantized, codes: np.ndarray, scales: np.ndarray) -> None:
    assert quantized.tile == "block"
    actual, expected = np.asarray(quantized.codes).astype(np.float32), codes.astype(np.float32)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual)[~np.isnan(actual)], np.signbit(expected)[~np.isnan(expected)])
    unused = [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % 4)]
    np.testing.assert_array_equal(quantized.scales, np.pad(scales, unused))


@pytest.mark.parametrize("shape", [*SHAPES, (130, 7)])
def test_codes_are_the_published_ones_in_both_orientations(shape):
    check(op.quantize_weights, draw(*shape))


def with_special_values(weight: np.ndarray) -> np.ndarray:
    """Puts NaN, infinities, subnormals, zeros and huge values into blocks of their own; needs six."""
    nan, infinite, zero, subnormal, huge, tiny, *_ = blocks_of(weight)
    nan[3, 5], nan[9, 9], infinite[100, 17], infinite[0, 0] = np.nan, np.inf, -np.inf, -0.0
    zero[...], subnormal[::2], huge[...], tiny[...] = 0, -1e-40, huge * 1e38, tiny * 1e-4
    zero[::3] = -0.0
    return weight


def test_special_values_of_the_reference():
    check(op.quantize_weights, with_special_values(draw(256, 640)))


@pytest.fixture
def interpreter(monkeypatch, request):
    """Runs kernels in Pallas's GPU interpreter, with race detection. The parameter fills unwritten memory."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # TMA reads zeros outside a tensor
    params = InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory=request.param
    )
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=params))
    # The interpreter needs a thread of XLA's pool, which has one per core, for each warpgroup that waits.
    monkeypatch.setattr(weights, "WARPGROUPS", 2)
    monkeypatch.setattr(weights, "NUM_SMS", 1)
    yield
    assert not interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@interpreted
@pytest.mark.parametrize("interpreter", ["zero"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_writes_the_published_codes_without_races(interpreter, shape):
    check(weights.quantize_weights, draw(*shape))


@interpreted
@pytest.mark.parametrize("interpreter", ["nan"], indirect=True)
def test_special_values_of_the_kernel_and_unused_scales_without_races(interpreter):
    check(weights.quantize_weights, with_special_values(draw(256, 640)))


@pytest.mark.parametrize("shape", [*SHAPES, (58, 7168, 2112), (2, 8, 7168, 4096)])
def test_kernel_lowers_for_cuda(shape):
    operand = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(weights.quantize_weights), platforms=["cuda"])(operand)
    assert "mosaic_gpu" in exported.mlir_module()


def draw_quotients() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws dividends, divisors with many short significands, and reciprocals up to two units off."""
    rng = np.random.default_rng(0)
    y = rng.integers(2**23, 2**24, size=4096).astype(np.float32)
    y[:1024] = 448
    y[1024:2048] = 2**23 + 2**21 * rng.integers(0, 4, size=1024) + rng.integers(0, 64, size=1024)
    x = (rng.integers(2**23, 2**24, size=(64, 4096)) * 2.0**-20).astype(np.float32)
    x[:, ::2] = -x[:, ::2]
    inverse = 1 / y
    return x, y, np.nextafter(inverse, inverse * rng.choice(np.float32([0, 1, 2]), size=inverse.shape))


def test_quotients_are_correctly_rounded_with_a_reciprocal_that_is_not():
    x, y, inverse = draw_quotients()
    np.testing.assert_array_equal(np.asarray(jax.jit(weights._divide)(x, y, inverse)), x / y)


@pytest.mark.parametrize("fused_first", [0, 1])
def test_quotients_are_correctly_rounded_where_products_are_fused_with_sums(fused_first):
    """As in a GPU's code, where which of two products that meet in a sum is fused is the compiler's choice."""
    x, y, inverse = draw_quotients()
    np.testing.assert_array_equal(evaluate_fused(weights._divide, x, y, inverse, fused_first=fused_first), x / y)


def evaluate_fused(function, *arguments: np.ndarray, fused_first: int) -> np.ndarray:
    """Evaluates float32 operations one by one, but sums from one unrounded product wherever there is one."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    values, products = dict(zip(jaxpr.invars, arguments)), {}

    def evaluate(jaxpr):
        for equation in jaxpr.eqns:
            if "jaxpr" in equation.params:
                inner = equation.params["jaxpr"].jaxpr
                values.update(zip(inner.invars, map(value_of, equation.invars)))
                evaluate(inner)
                values.update(zip(equation.outvars, map(value_of, inner.outvars)))
            else:
                values[equation.outvars[0]] = apply(equation)

    def value_of(atom):
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

    def apply(equation):
        operands, (result,) = [value_of(atom) for atom in equation.invars], equation.outvars
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}.get(equation.primitive.name)
        if operation is None or result.aval.dtype != jnp.float32:
            return np.asarray(equation.primitive.bind(*operands, **equation.params))
        operands = [np.longdouble(operand) for operand in operands]
        if operation is np.multiply:
            products[result] = np.multiply(*operands)
        else:
            for i in (fused_first, 1 - fused_first):
                if not isinstance(equation.invars[i], Literal) and equation.invars[i] in products:
                    operands[i] = products[equation.invars[i]]
                    break
        return operation(*operands).astype(np.float32)

    evaluate(jaxpr)
    return value_of(jaxpr.outvars[0])


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (jnp.zeros(128), r"weight is float32\[128\]: need matrices of floats"),
        (jnp.zeros((16, 16), jnp.int8), r"weight is int8\[16, 16\]"),
    ],
)
def test_bad_weights_are_named(weight, words):
    with pytest.raises(ValueError, match=words):
        op.quantize_weights(weight)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (jnp.zeros((16, 16), jnp.bfloat16), "bfloat16 weights: only float32"),
        (jnp.zeros((2, 16, 24)), r"weights of \[2, 16, 24\]: K and N must be positive multiples of 16"),
        (jnp.zeros((0, 16, 16)), r"weights of \[0, 16, 16\]"),
        (jnp.zeros((16, 16)), "needs a Hopper GPU"),
    ],
)
def test_named_kernel_says_why_it_cannot_run(weight, words):
    with pytest.raises(ValueError, match=f"implementation='pallas_gpu'.*{words}"):
        op.quantize_weights(weight, implementation="pallas_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (3, 7168, 2112), (4, 576, 7168)])
def test_kernel_writes_the_published_codes_on_a_gpu(shape):
    check(functools.partial(op.quantize_weights, implementation="pallas_gpu"), draw(*shape))


@pytest.mark.gpu
def test_special_values_on_a_gpu():
    check(functools.partial(op.quantize_weights, implementation="pallas_gpu"), with_special_values(draw(256, 640)))
