"""Matrix products of block-scaled FP8 operands: the FP8 linears and their gradients (§3.3.2).

Both operands are E4M3 [rows, K] with K last, as 8-bit tensor cores want them. The products of each 128 of K are summed
by the tensor cores, then scaled and added in float32: with their own accumulator, of about 14 bits, a sum of 4096
positive terms is 7% too small. Not differentiable: `dsv3_jax.fp8.linear` says what the gradient of a linear is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import QuantizedArray, require_quantized
from dsv3_jax.kernels import dispatch
from dsv3_jax.kernels.fp8_matmul import reference

OUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def fp8_matmul(
    a: QuantizedArray, b: QuantizedArray, *, out_dtype: Any = jnp.bfloat16, implementation: str | None = None
) -> jax.Array:
    """Multiplies a with the transpose of b.

    Args:
      a: row-quantized [R, K].
      b: [C, K], block-quantized (weights: the product and the input gradient) or row-quantized (the weight gradient).
      out_dtype: bfloat16, float16 or float32.
      implementation: "pallas_gpu" (Hopper; no empty product) or "reference". None picks pallas_gpu on a Hopper GPU for
        operands it supports, else the reference; a named one runs or raises.

    Returns:
      [R, C], accumulated in float32 and rounded once.

    Raises:
      ValueError: an unknown implementation, operands that do not fit together, or that the named implementation does
        not support.
    """
    _require_operands(a, b)
    require_out_dtype(out_dtype)
    if not dispatch.runs_pallas(implementation, empty_problem(a, b)):
        return reference.fp8_matmul(a, b, out_dtype=out_dtype)
    from dsv3_jax.kernels.fp8_matmul import pallas_gpu  # loads Mosaic: seconds that a CPU process can save

    return pallas_gpu.fp8_matmul(a, b, out_dtype=out_dtype)


def fp8_matmul_with_squares(
    a: QuantizedArray, b: QuantizedArray, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the product of `fp8_matmul` in float32, and the sum of the squares of all of it.

    The kernel adds up squares of what it holds in registers: for the norm of a gradient nothing is read again.
    """
    _require_operands(a, b)
    if not dispatch.runs_pallas(implementation, empty_problem(a, b)):
        y_RC = reference.fp8_matmul(a, b, out_dtype=jnp.float32)
        return y_RC, jnp.sum(jnp.square(y_RC))
    from dsv3_jax.kernels.fp8_matmul import pallas_gpu

    return pallas_gpu.fp8_matmul_with_squares(a, b)


def _require_operands(a: QuantizedArray, b: QuantizedArray) -> None:
    require_quantized(a, "a", tiles=("row",), ndim=2)
    require_quantized(b, "b", ndim=2)
    require_same_contraction(a, b)


def require_same_contraction(a: QuantizedArray, b: QuantizedArray) -> None:
    """Raises ValueError unless the last dimensions of two operands are equal."""
    if a.codes.shape[-1] != b.codes.shape[-1]:
        raise ValueError(
            f"a {a.codes.shape} and b {b.codes.shape} have different last dimensions: both hold the contracted "
            "dimension last; quantize the transpose of the one that does not (quantize_columns, transpose_blocks)"
        )


def require_out_dtype(out_dtype: Any) -> None:
    """Raises ValueError unless products can be returned in this dtype."""
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype)}: choose bfloat16, float16 or float32")


def empty_problem(a: QuantizedArray, b: QuantizedArray) -> str | None:
    """Names what the Hopper kernels, which pad all sizes but zero, cannot run of a product, or returns None."""
    if 0 in a.codes.shape + b.codes.shape:
        return f"an empty product of a {a.codes.shape} and b {b.codes.shape}"
    return None
