"""Instructions of a GPU for which JAX has no word, on float32 values in registers.

Pallas's interpreter cannot run them: a test that interprets puts functions of the same values in their place.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, nvvm, vector


def reciprocals(x: jax.Array, layout: plgpu.Layout) -> jax.Array:
    """Returns 1 / x within float32's last two bits, zero for what float32 holds as a subnormal: one instruction."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout))
    def divide(_, x: FragmentedArray) -> FragmentedArray:
        return x.foreach(lambda value, _: nvvm.rcp_approx_ftz_f(value), create_array=True)

    return divide(x)


def widen(x: jax.Array, layout: plgpu.Layout) -> jax.Array:
    """Returns bfloat16 as float32: one instruction a value, where the compiler takes two for each second one."""

    def widen_pairs(pairs: ir.Value) -> ir.Value:
        (size,) = ir.VectorType(pairs.type).shape
        words = ir.VectorType.get((size // 2,), ir.IntegerType.get_signless(32))
        bits = vector.bitcast(words, pairs)

        def splat(word: int) -> ir.Value:
            one = ir.IntegerAttr.get(words.element_type, word)
            return arith.constant(words, ir.DenseElementsAttr.get_splat(words, one))

        low, high = arith.shli(bits, splat(16)), arith.andi(bits, splat(-0x10000))
        mask = [half * (size // 2) + pair for pair in range(size // 2) for half in range(2)]
        return vector.bitcast(ir.VectorType.get((size,), ir.F32Type.get()), vector.shuffle(low, high, mask))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout))
    def convert(_, x: FragmentedArray) -> FragmentedArray:
        registers = np.empty_like(x.registers)
        for index, pairs in np.ndenumerate(x.registers):
            registers[index] = widen_pairs(pairs)
        return FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return convert(x)


def largest_magnitudes(x: jax.Array, layout: plgpu.Layout) -> jax.Array:
    """Returns the largest magnitude along the last dimension, leaving NaN out; zero of nothing else."""
    dim = x.ndim - 1
    reduced = layout.reduce(dim)

    def larger(a: ir.Value, b: ir.Value) -> ir.Value:
        return arith.maxnumf(math.absf(a), math.absf(b))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape[:dim], jnp.float32, reduced))
    def reduce(_, x: FragmentedArray) -> FragmentedArray:
        largest = x.reduce(larger, dim)
        zero = arith.constant(ir.F32Type.get(), 0.0)
        return largest.foreach(lambda value, _: arith.maxnumf(value, zero), create_array=True)

    return reduce(x)
