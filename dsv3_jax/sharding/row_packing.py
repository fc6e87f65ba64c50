"""Rows of several arrays as one array of words, so that they travel together.

Words of four bytes, because XLA gathers them faster than bytes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

ROW_MULTIPLE = 4  # words: rows are multiples of 16 bytes
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes an element


def row_specs(rows: Any) -> Any:
    """Returns the shapes and dtypes of one row of a tree of arrays [R, ...]."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)


def row_bytes(rows: Any) -> int:
    """Returns the bytes of one packed row of a tree of arrays [R, ...], or of their specs."""
    words = sum(-(-math.prod(leaf.shape[1:]) * leaf.dtype.itemsize // 4) for leaf in jax.tree.leaves(rows))
    return -(-words // ROW_MULTIPLE) * ROW_MULTIPLE * 4


def pack(rows: Any) -> jax.Array:
    """Packs a tree of arrays [R, ...] into uint32 [R, words]."""
    words = jnp.concatenate([_as_words(leaf) for leaf in jax.tree.leaves(rows)], axis=1)
    return jnp.pad(words, ((0, 0), (0, -words.shape[1] % ROW_MULTIPLE)))


def unpack(words: jax.Array, like: Any) -> Any:
    """Reverts `pack`, given `row_specs` of what was packed."""
    leaves, start = [], 0
    specs, structure = jax.tree.flatten(like)
    for spec in specs:
        size = math.prod(spec.shape)
        num_words = -(-size * spec.dtype.itemsize // 4)
        bits = jax.lax.bitcast_convert_type(words[:, start : start + num_words], BITS[spec.dtype.itemsize])
        leaf = bits.reshape(len(words), num_words * 4 // spec.dtype.itemsize)[:, :size]
        leaves.append(jax.lax.bitcast_convert_type(leaf, spec.dtype).reshape(len(words), *spec.shape))
        start += num_words
    return jax.tree.unflatten(structure, leaves)


def _as_words(leaf: jax.Array) -> jax.Array:
    per_word = 4 // leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, BITS[leaf.dtype.itemsize]).reshape(len(leaf), math.prod(leaf.shape[1:]))
    if per_word == 1:
        return bits
    bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % per_word)))
    return jax.lax.bitcast_convert_type(bits.reshape(len(leaf), -1, per_word), jnp.uint32)
