"""ZeRO: every device keeps a part of the master weights, gathers what it computes with, and sums gradients into it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.sharding.collectives import size, sum_over
from dsv3_jax.sharding.mesh import AXES

_BITS = {jnp.dtype(jnp.float8_e4m3fn): jnp.uint8, jnp.dtype(jnp.bfloat16): jnp.uint16}


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
        """Joins the parts of all devices; the gradient of float32 is summed over them and split again.

        Narrower floats travel as integers, which no compiler widens on the way.
        """
        dtype = self.array.dtype
        if dtype in _BITS:
            bits = self.map(lambda array: jax.lax.bitcast_convert_type(array, _BITS[dtype]))
            return jax.lax.bitcast_convert_type(bits.gather(), dtype)
        whole = self.array
        for dim, axes in self.splits:
            whole = jax.lax.all_gather(whole, axes, axis=whole.ndim + dim, tiled=True)
        return whole

    def gradient_slot(self) -> jax.Array:
        """Returns zeros of the whole's shape whose gradient is summed over all devices and split again.

        They take the gradient where something else, made of the part, is gathered and computed with. Nothing reads
        them, so that the compiled program does not hold them.
        """
        return _slot(self.splits, self.array)

    def whole_shape(self) -> tuple[int, ...]:
        """Returns the shape of what `gather` joins."""
        shape = list(self.array.shape)
        for dim, axes in self.splits:
            shape[dim] *= size(axes)
        return tuple(shape)

    def map(self, function: Callable) -> "Part":
        """Returns a part of what the function makes of the whole, element by element."""
        return Part(function(self.array), self.splits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slot(splits: tuple, part: jax.Array) -> jax.Array:
    return jnp.zeros(Part(part, splits).whole_shape(), part.dtype)


def _slot_forward(splits, part):
    return _slot(splits, part), None


def _slot_backward(splits, _, gradient):
    return (scatter_gradient(gradient, splits),)


_slot.defvjp(_slot_forward, _slot_backward)


def is_part(value: Any) -> bool:
    """Tells whether a leaf of a parameter tree is one device's part of a parameter."""
    return isinstance(value, Part)


def as_part(array: jax.Array, split: Split) -> Part:
    """Declares what this device keeps of a parameter."""
    return Part(array, split.further())


def scatter_gradient(gradient: jax.Array, splits: tuple[tuple[int, tuple[str, ...]], ...]) -> jax.Array:
    """Sums what the devices that share a parameter found for the whole; each receives the part that it keeps."""
    for dim, axes in splits:
        gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=gradient.ndim + dim, tiled=True)
    return gradient


def reduce_gradient(gradient: jax.Array | Part, split: Split) -> jax.Array:
    """Sums what all devices found for a parameter; each receives the part that it keeps.

    Of a part the sum over those that share it has been taken, where it was gathered.
    """
    own = gradient.array if is_part(gradient) else scatter_gradient(gradient, split.further())
    return sum_over(own, split.copies())
