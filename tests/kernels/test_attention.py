"""Causal attention and its gradients against a dense softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import attention as op

BF16_TOLERANCE = 6e-3  # relative norm: inputs of the second product and the result are each rounded to 8 bits


def make_operands(batch, length, num_heads, width, value_width, dtype):
    rng = np.random.default_rng(length + width)
    shapes = [(batch, length, num_heads, size) for size in (width, width, value_width, value_width)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def attend_densely(q, k, v, dout, scale):
    """Returns the output and the gradients of q, k and v by their formulas, in float64."""
    q, k, v, dout = (np.asarray(array, np.float64) for array in (q, k, v, dout))
    scores = np.einsum("btnx,bsnx->bnts", q, k) * scale
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("btnu,bsnu->bnts", dout, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bnts,bsnu->btnu", weights, v),
        np.einsum("bnts,bsnx->btnx", dscores, k),
        np.einsum("bnts,btnx->bsnx", dscores, q),
        np.einsum("bnts,btnu->bsnu", weights, dout),
    )


def assert_value_and_gradients_match(attend, operands, scale, tolerance):
    q, k, v, dout = operands
    out, vjp = jax.vjp(attend, q, k, v)
    assert out.dtype == q.dtype
    for actual, expected in zip((out, *vjp(dout)), attend_densely(*operands, scale)):
        error = np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)
        assert error < tolerance


@pytest.mark.parametrize("length", [5, 129, 300])
def test_reference_equals_dense_softmax(length):
    operands = make_operands(2, length, 2, 24, 16, jnp.float32)
    attend = functools.partial(op.causal_attention, scale=0.3, implementation="reference")
    assert_value_and_gradients_match(attend, operands, 0.3, 1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 128, 1, 192, 128), jnp.float32, "float32"),
        ((1, 100, 1, 192, 128), jnp.bfloat16, "T=100"),
        ((1, 128, 1, 96, 64), jnp.bfloat16, "X=96"),
        ((1, 128, 1, 256, 128), jnp.bfloat16, "X=256"),
    ],
)
def test_kernel_names_what_it_cannot_run(shape, dtype, words):
    q, k, v, _ = make_operands(*shape, dtype)
    with pytest.raises(ValueError, match=words):
        op.causal_attention(q, k, v, scale=1.0, implementation="pallas_gpu")


def test_unknown_implementation_is_refused():
    q, k, v, _ = make_operands(1, 4, 1, 8, 8, jnp.float32)
    with pytest.raises(ValueError, match="implementation='flash'"):
        op.causal_attention(q, k, v, scale=1.0, implementation="flash")


@pytest.mark.parametrize(("width", "value_width"), [(192, 128), (128, 128), (64, 64)])
def test_kernels_lower_for_cuda(width, value_width):
    """Everything Mosaic checks without a GPU: operand layouts, tiling and shared-memory size."""
    q, v = (jax.ShapeDtypeStruct((2, 4096, 128, size), jnp.bfloat16) for size in (width, value_width))
    attend = functools.partial(op.causal_attention, scale=0.1, implementation="pallas_gpu")

    def value_and_gradients(q, k, v):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(out)

    exported = jax.export.export(jax.jit(value_and_gradients), platforms=["cuda"])(q, q, v)
    assert exported.mlir_module().count("mosaic_gpu") >= 3


def test_kernels_in_the_interpreter(monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the Mosaic GPU interpreter of JAX {jax.__version__} cannot transpose operands; 0.11 can")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dsv3_jax.kernels.attention import blocks

    class Accumulator:
        """Stands in for a register accumulator, whose products from registers the interpreter does not know."""

        def __init__(self, value):
            self.value = value

    def accumulate(value, multiply):
        accumulator = Accumulator(value)
        multiply(accumulator)
        return accumulator.value

    def multiply(accumulator, lhs, rhs, wgmma=plgpu.wgmma):
        if not isinstance(accumulator, Accumulator):
            return wgmma(accumulator, lhs, rhs)
        accumulator.value += jnp.dot(lhs.astype(jnp.float32), rhs[...].astype(jnp.float32))

    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    monkeypatch.setattr(plgpu, "wgmma", multiply)
    monkeypatch.setattr(blocks, "accumulate", accumulate)
    monkeypatch.setattr(blocks, "NUM_SMS", 2)
    operands = make_operands(1, 256, 2, 128, 64, jnp.bfloat16)
    attend = functools.partial(op.causal_attention, scale=0.1, implementation="pallas_gpu")
    assert_value_and_gradients_match(attend, operands, 0.1, BF16_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1024, 3, 192, 128), (1, 128, 1, 192, 128), (1, 384, 20, 128, 64)])
@pytest.mark.parametrize("implementation", ["pallas_gpu", "cudnn"])
def test_kernels_on_hopper(shape, implementation):
    operands = make_operands(*shape, jnp.bfloat16)
    attend = functools.partial(op.causal_attention, scale=0.1, implementation=implementation)
    assert_value_and_gradients_match(attend, operands, 0.1, BF16_TOLERANCE)
