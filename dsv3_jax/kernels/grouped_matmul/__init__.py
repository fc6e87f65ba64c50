"""Matrix products of row groups with one weight matrix each: the expert linears.

Layout. Rows are sorted by group; the rows of group e start at `group_starts(group_sizes, alignment)[e]`, a multiple of
the alignment, and fill `group_sizes[e]` rows. Rows between a group's end and its next multiple of the alignment must be
zero. What lies past the last group is neither read nor defined in the result. Work is proportional to the live rows,
whatever the number of groups, and the sizes live on the device: new sizes cause no synchronisation and no compilation.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.grouped_matmul import reference

IMPLEMENTATIONS = ("reference",)


def row_alignment(num_rows: int, num_groups: int, *, implementation: str | None = None) -> int:
    """Returns the multiple of rows at which every group must start.

    Args:
      num_rows: rows over all groups.
      num_groups: groups that share them.
      implementation: as in `grouped_matmul`.
    """
    del implementation
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
      implementation: None picks the fastest that the device supports; a named one runs or raises.

    Returns:
      [M, N] in the dtype of x, accumulated in float32.

    Raises:
      ValueError: an unknown implementation, or operands that do not fit together.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: choose one of {IMPLEMENTATIONS} or None")
    num_rows, contraction = x_MK.shape
    num_groups, w_contraction, _ = w_EKN.shape
    if contraction != w_contraction or group_sizes_E.shape != (num_groups,) or num_rows % alignment:
        raise ValueError(
            f"x {x_MK.shape}, w {w_EKN.shape}, group_sizes {group_sizes_E.shape}, alignment {alignment}: "
            "need x [M, K], w [E, K, N], group_sizes [E] and M a multiple of the alignment"
        )
    return reference.grouped_matmul(x_MK, w_EKN, group_sizes_E, alignment)
