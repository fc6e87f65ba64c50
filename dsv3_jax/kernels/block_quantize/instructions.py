"""Instructions of a GPU for which JAX has no word, on float32 values in registers.

Pallas's interpreter cannot run them: a test that interprets puts functions of the same values in their place.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, nvvm


def reciprocals(x: jax.Array, layout: plgpu.Layout) -> jax.Array:
    """Returns 1 / x within float32's last two bits, zero for what float32 holds as a subnormal: one instruction."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout))
    def divide(_, x: FragmentedArray) -> FragmentedArray:
        return x.foreach(lambda value, _: nvvm.rcp_approx_ftz_f(value), create_array=True)

    return divide(x)


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
