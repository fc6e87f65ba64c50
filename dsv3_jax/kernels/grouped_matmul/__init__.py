"""Matrix products of row groups with one weight matrix each: the expert linears.

Layout. Rows are sorted by group; the rows of group e start at `group_starts(group_sizes, alignment)[e]`, a multiple of
the alignment, and fill `group_sizes[e]` rows. Rows between a group's end and its next multiple of the alignment must be
zero. What lies past the last group is neither read nor defined in the result. Work is proportional to the live rows,
whatever the number of groups, and the sizes live on the device: new sizes cause no synchronisation and no compilation.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import dispatch
from dsv3_jax.kernels.grouped_matmul import reference, tuned
from dsv3_jax.kernels.grouped_matmul.fp8 import (
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    grouped_fp8_weight_gradient_with_squares,
)

__all__ = [
    "group_starts",
    "grouped_fp8_matmul",
    "grouped_fp8_weight_gradient",
    "grouped_fp8_weight_gradient_with_squares",
    "grouped_matmul",
    "grouped_matmul_gradients",
    "padded_rows",
    "row_alignment",
]


def row_alignment(num_rows: int, num_groups: int, *, implementation: str | None = None) -> int:
    """Returns the multiple of rows at which every group must start.

    Args:
      num_rows: rows over all groups.
      num_groups: groups that share them.
      implementation: as in `grouped_matmul`.

    Raises:
      ValueError: an unknown implementation, or one that cannot run here.
    """
    if dispatch.runs_pallas(implementation, None):
        return tuned.ROW_ALIGNMENT
    return reference.row_alignment(num_rows, num_groups)


def padded_rows(num_rows: int, num_groups: int, alignment: int) -> int:
    """Returns the rows a buffer needs so that any split of `num_rows` into `num_groups` aligned groups fits."""
    num_partly_filled = min(num_groups, num_rows)
    return -(-(num_rows + num_partly_filled * (alignment - 1)) // alignment) * alignment


def group_starts(group_sizes_E: jax.Array, alignment: int) -> jax.Array:
    """Returns the first row of every group, int32 [E]."""
    aligned_E = -(-group_sizes_E // alignment) * alignment
    return jnp.cumsum(aligned_E) - aligned_E


def grouped_matmul(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    alignment: int,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies the rows of each group with that group's matrix; differentiable in x and w.

    Args:
      x_MK: rows in the layout above, any float dtype; M a multiple of the alignment.
      w_EKN: one matrix per group; rounded to the dtype of x. Its gradient has its own dtype, so that of a float32
        master weight is never rounded to bfloat16.
      group_sizes_E: int32 rows per group; empty groups are allowed.
      alignment: what the layout was made with, from `row_alignment`.
      implementation: "pallas_gpu" (Hopper; 16-bit floats, K and N multiples of 64, alignment a multiple of 128) or
        "reference". None picks pallas_gpu on a Hopper GPU for operands it supports, else the reference; a named one
        runs or raises.

    Returns:
      [M, N] in the dtype of x, accumulated in float32.

    Raises:
      ValueError: an unknown implementation, operands that do not fit together, or what the named implementation does
        not support: the operands or the device.
    """
    _require_fit(x_MK, w_EKN, group_sizes_E, alignment)
    if not dispatch.runs_pallas(implementation, _unsupported(x_MK, w_EKN, alignment)):
        return reference.grouped_matmul(x_MK, w_EKN, group_sizes_E, alignment)
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu  # loads Mosaic: seconds that a CPU process can save

    return pallas_gpu.grouped_matmul(x_MK, w_EKN, group_sizes_E)


def grouped_matmul_gradients(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    dy_MN: jax.Array,
    *,
    alignment: int,
    weight_dtype: jnp.dtype,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and w from that of `grouped_matmul`, which takes the same arguments.

    Args:
      dy_MN: gradient of the product.
      weight_dtype: dtype of w's gradient, [E, K, N]; x's has that of x.
    """
    _require_fit(x_MK, w_EKN, group_sizes_E, alignment)
    if not dispatch.runs_pallas(implementation, _unsupported(x_MK, w_EKN, alignment)):
        return reference.gradients(x_MK, w_EKN, group_sizes_E, dy_MN, alignment, weight_dtype)
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu  # see `grouped_matmul`

    return pallas_gpu.gradients(x_MK, w_EKN, group_sizes_E, dy_MN, weight_dtype)


def _require_fit(x_MK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, alignment: int) -> None:
    num_rows, contraction = x_MK.shape
    num_groups, w_contraction, _ = w_EKN.shape
    if contraction != w_contraction or group_sizes_E.shape != (num_groups,) or num_rows % alignment:
        raise ValueError(
            f"x {x_MK.shape}, w {w_EKN.shape}, group_sizes {group_sizes_E.shape}, alignment {alignment}: "
            "need x [M, K], w [E, K, N], group_sizes [E] and M a multiple of the alignment"
        )


def _unsupported(x_MK: jax.Array, w_EKN: jax.Array, alignment: int) -> str | None:
    """Names what about these operands the Hopper kernel cannot run, or returns None."""
    _, contraction, columns = w_EKN.shape
    if x_MK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x_MK.dtype}: only 16-bit floats"
    if contraction % tuned.STEP or columns % tuned.STEP:
        return f"K={contraction}, N={columns}: both must be multiples of {tuned.STEP}"
    if alignment % tuned.ROW_ALIGNMENT:
        return f"alignment={alignment}: must be a multiple of {tuned.ROW_ALIGNMENT}"
    return None
