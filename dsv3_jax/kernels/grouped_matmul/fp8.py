"""The public grouped products of FP8 operands; the layout of rows is that of `dsv3_jax.kernels.grouped_matmul`."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import TILE, QuantizedArray, require_quantized
from dsv3_jax.kernels import dispatch, fp8_matmul
from dsv3_jax.kernels.grouped_matmul import reference_fp8


def grouped_fp8_matmul(
    a: QuantizedArray,
    b: QuantizedArray,
    group_sizes_E: jax.Array,
    *,
    alignment: int,
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies the rows of each group with the transpose of that group's matrix. Not differentiable.

    Args:
      a: row-quantized rows [M, K] in the grouped layout.
      b: block-quantized [E, C, K], one matrix per group.
      group_sizes_E: int32 rows per group; empty groups are allowed.
      alignment: what the layout was made with, a multiple of 128.
      out_dtype: bfloat16, float16 or float32.
      implementation: "pallas_gpu" (Hopper; no empty product) or "reference". None picks pallas_gpu on a Hopper GPU for
        operands it supports, else the reference; a named one runs or raises.

    Returns:
      [M, C], accumulated in float32 and rounded once.

    Raises:
      ValueError: an unknown implementation, operands that do not fit together, or that the named implementation does
        not support.
    """
    require_quantized(a, "a", tiles=("row",), ndim=2)
    require_quantized(b, "b", tiles=("block",), ndim=3)
    fp8_matmul.require_same_contraction(a, b)
    fp8_matmul.require_out_dtype(out_dtype)
    _require_groups(group_sizes_E, alignment, num_rows=a.codes.shape[0])
    if group_sizes_E.shape[0] != b.codes.shape[0]:
        raise ValueError(f"group_sizes {group_sizes_E.shape} for {b.codes.shape[0]} matrices b: need one size each")
    if not dispatch.runs_pallas(implementation, fp8_matmul.empty_problem(a, b)):
        return reference_fp8.grouped_fp8_matmul(a, b, group_sizes_E, alignment=alignment, out_dtype=out_dtype)
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8  # loads Mosaic: seconds that a CPU process can save

    return pallas_gpu_fp8.grouped_fp8_matmul(a, b, group_sizes_E, alignment=alignment, out_dtype=out_dtype)


def grouped_fp8_weight_gradient(
    a: QuantizedArray,
    b: QuantizedArray,
    group_sizes_E: jax.Array,
    *,
    alignment: int,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies a with the transpose of b over the rows of each group: the gradients of the expert weights.

    Args:
      a: row-quantized [C1, M]; M runs over the grouped layout, so a scale tile belongs to one group.
      b: row-quantized [C2, M].
      group_sizes_E: int32 rows per group; empty groups are allowed.
      alignment: what the layout was made with, a multiple of 128.
      out_dtype: bfloat16, float16 or float32.
      implementation: as in `grouped_fp8_matmul`.

    Returns:
      [E, C1, C2], accumulated in float32; zero for an empty group.

    Raises:
      ValueError: as in `grouped_fp8_matmul`.
    """
    _require_columns(a, b, group_sizes_E, alignment)
    fp8_matmul.require_out_dtype(out_dtype)
    if not dispatch.runs_pallas(implementation, fp8_matmul.empty_problem(a, b)):
        return reference_fp8.grouped_fp8_weight_gradient(a, b, group_sizes_E, alignment=alignment, out_dtype=out_dtype)
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8  # loads Mosaic: seconds that a CPU process can save

    return pallas_gpu_fp8.grouped_fp8_weight_gradient(a, b, group_sizes_E, alignment=alignment, out_dtype=out_dtype)


def grouped_fp8_weight_gradient_with_squares(
    a: QuantizedArray,
    b: QuantizedArray,
    group_sizes_E: jax.Array,
    *,
    alignment: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns what `grouped_fp8_weight_gradient` does in float32, and the sum of the squares of all of it.

    See `fp8_matmul.fp8_matmul_with_squares`.
    """
    _require_columns(a, b, group_sizes_E, alignment)
    if not dispatch.runs_pallas(implementation, fp8_matmul.empty_problem(a, b)):
        settings = {"alignment": alignment, "out_dtype": jnp.float32}
        dw_EXY = reference_fp8.grouped_fp8_weight_gradient(a, b, group_sizes_E, **settings)
        return dw_EXY, jnp.sum(jnp.square(dw_EXY))
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8

    return pallas_gpu_fp8.grouped_fp8_weight_gradient_with_squares(a, b, group_sizes_E, alignment=alignment)


def _require_columns(a: QuantizedArray, b: QuantizedArray, group_sizes_E: jax.Array, alignment: int) -> None:
    require_quantized(a, "a", tiles=("row",), ndim=2)
    require_quantized(b, "b", tiles=("row",), ndim=2)
    fp8_matmul.require_same_contraction(a, b)
    _require_groups(group_sizes_E, alignment, num_rows=a.codes.shape[1])


def _require_groups(group_sizes_E: jax.Array, alignment: int, *, num_rows: int) -> None:
    if alignment <= 0 or alignment % TILE:
        raise ValueError(f"alignment={alignment}: FP8 groups start at multiples of {TILE}; use alignment={TILE}")
    if num_rows % alignment:
        raise ValueError(f"M={num_rows}: must be a multiple of alignment={alignment} (padded_rows says how many)")
    if group_sizes_E.ndim != 1 or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"group_sizes {group_sizes_E.dtype}{group_sizes_E.shape}: need int32 [E]")
