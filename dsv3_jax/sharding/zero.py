"""ZeRO: every device keeps a part of the master weights, gathers what it computes with, and sums gradients into it."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsv3_jax.sharding.collectives import size, sum_over
from dsv3_jax.sharding.mesh import AXES


@dataclasses.dataclass(frozen=True)
class Split:
    """How a parameter is split where it is computed with, and further where its master copy is kept."""

    compute: PartitionSpec
    master: PartitionSpec

    def further(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """Returns the dimensions that are split further, counted from the last as -1, and over which mesh axes."""
        axes = [
            tuple(axis for axis in axis_names(master) if axis not in axis_names(compute))
            for compute, master in zip(self.compute, self.master, strict=True)
        ]
        return tuple((dim - len(axes), names) for dim, names in enumerate(axes) if size(names) > 1)

    def copies(self) -> tuple[str, ...]:
        """Returns the mesh axes whose devices keep the same part of the master copy."""
        used = {axis for axes in self.master for axis in axis_names(axes)}
        return tuple(axis for axis in AXES if axis not in used)


def axis_names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that a partition names for one dimension."""
    return (axes,) if isinstance(axes, str) else axes or ()


@functools.partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("splits",))
@dataclasses.dataclass(frozen=True)
class Part:
    """One device's part of a parameter; takes the parameter's place in a tree until it is computed with."""

    array: jax.Array
    splits: tuple[tuple[int, tuple[str, ...]], ...]  # see `Split.further`; holds for a layer of a stack as well

    @jax.named_scope("gather_weights")
    def gather(self) -> jax.Array:
        """Joins the parts of all devices; the gradient is summed over them and split again."""
        whole = self.array
        for dim, axes in self.splits:
            whole = jax.lax.all_gather(whole, axes, axis=whole.ndim + dim, tiled=True)
        return whole


def is_part(value: Any) -> bool:
    """Tells whether a leaf of a parameter tree is one device's part of a parameter."""
    return isinstance(value, Part)


def as_part(array: jax.Array, split: Split) -> Part:
    """Declares what this device keeps of a parameter."""
    return Part(array, split.further())


def gather_parts(params: dict) -> dict:
    """Returns a tree of parameters with whole ones in the place of parts."""
    return jax.tree.map(lambda leaf: leaf.gather() if is_part(leaf) else leaf, params, is_leaf=is_part)


def reduce_gradient(gradient: jax.Array | Part, split: Split) -> jax.Array:
    """Sums what all devices found for a parameter; each receives the part that it keeps."""
    if is_part(gradient):
        gradient = gradient.array  # gathered where it was used, so the sum over these parts has been taken
    else:
        for dim, axes in split.further():
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=gradient.ndim + dim, tiled=True)
    return sum_over(gradient, split.copies())
