"""Rows of several arrays as rows of one, so that they travel together.

The elements of the packed array are as small as the smallest packed, so that what is many bytes a row, and small
elements, is read where it lies: XLA reads a slice in place, but makes a pass over all of it to change element sizes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

ALIGNMENT = 16  # bytes in a row at which every array begins
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes an element


def row_specs(rows: Any) -> Any:
    """Returns the shapes and dtypes of one row of a tree of arrays [R, ...]."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)


def row_bytes(specs: Any) -> int:
    """Returns the bytes of one packed row, given `row_specs` of what is packed."""
    return sum(-(-_num_bytes(spec) // ALIGNMENT) * ALIGNMENT for spec in jax.tree.leaves(specs))


def pack(rows: Any) -> jax.Array:
    """Packs a tree of arrays [R, ...], elements of 1, 2 or 4 bytes, into one of unsigned integers [R, W]."""
    leaves = jax.tree.leaves(rows)
    element = min(leaf.dtype.itemsize for leaf in leaves)
    columns = []
    for leaf in leaves:
        bits = jax.lax.bitcast_convert_type(leaf, BITS[element])
        bits = bits.reshape(len(leaf), math.prod(bits.shape[1:]))
        columns.append(jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % (ALIGNMENT // element)))))
    return jnp.concatenate(columns, axis=1)


def unpack(packed: jax.Array, specs: Any) -> Any:
    """Reverts `pack`, given `row_specs` of what was packed."""
    leaves, start = [], 0
    element = packed.dtype.itemsize
    for spec in jax.tree.leaves(specs):
        bits = packed[:, start : start + _num_bytes(spec) // element]
        start += -(-_num_bytes(spec) // ALIGNMENT) * ALIGNMENT // element
        parts = (spec.dtype.itemsize // element,) if spec.dtype.itemsize > element else ()
        bits = bits.reshape(len(packed), *spec.shape, *parts)
        leaves.append(jax.lax.bitcast_convert_type(bits, spec.dtype))
    return jax.tree.unflatten(jax.tree.structure(specs), leaves)


def _num_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
