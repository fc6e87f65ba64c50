"""How the parts of an array travel between devices, inside the program that `rules.per_device` gives to each.

Axes of one device cost nothing: outside such a program, as in a notebook, every axis is one.

Gradients follow one rule: what is differentiated is the sum, over all devices, of what each calls its loss. A value
that several devices compute alike counts once for each of them.
"""

import math

import jax
import jax.numpy as jnp

SEQUENCE_AXIS = "tensor"  # between blocks, devices of this axis own pieces of the same sequences


def size(axes: str | tuple[str, ...]) -> int:
    """Returns over how many devices the named mesh axes spread."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names if name in mesh.manual_axes)


def sum_over(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Adds up what the devices of the axes hold; each receives the sum."""
    return x if size(axes) == 1 else jax.lax.psum(x, axes)


def max_over(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Returns the largest of what the devices of the axes hold to each of them."""
    return x if size(axes) == 1 else jax.lax.pmax(x, axes)


def gather_tokens(x: jax.Array, dim: int) -> jax.Array:
    """Joins the tokens that the devices of the tensor axis own, along the given dimension."""
    return x if size(SEQUENCE_AXIS) == 1 else jax.lax.all_gather(x, SEQUENCE_AXIS, axis=dim, tiled=True)


def scatter_tokens(x: jax.Array, dim: int) -> jax.Array:
    """Adds up what the devices of the tensor axis computed for all tokens; each receives its own tokens' sums."""
    if size(SEQUENCE_AXIS) == 1:
        return x
    return jax.lax.psum_scatter(x, SEQUENCE_AXIS, scatter_dimension=dim, tiled=True)


def own_tokens(x: jax.Array, dim: int) -> jax.Array:
    """Returns the piece of an array of all tokens that belongs to this device of the tensor axis."""
    num_pieces = size(SEQUENCE_AXIS)
    if num_pieces == 1:
        return x
    length = x.shape[dim] // num_pieces
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(SEQUENCE_AXIS) * length, length, dim)


def roll_sequence(x_BtD: jax.Array) -> jax.Array:
    """Moves every token of a whole sequence one position forward, the first behind the last."""
    num_pieces = size(SEQUENCE_AXIS)
    first_B1D = x_BtD[:, :1]
    if num_pieces > 1:
        first_B1D = jax.lax.ppermute(first_B1D, SEQUENCE_AXIS, [(i, (i - 1) % num_pieces) for i in range(num_pieces)])
    return jnp.concatenate([x_BtD[:, 1:], first_B1D], axis=1)


def take_token(x_BtD: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns one token of every sequence, [B, D], to all devices of the tensor axis, by its index in the sequence."""
    length = x_BtD.shape[1]
    if size(SEQUENCE_AXIS) > 1:
        index_B = index_B - jax.lax.axis_index(SEQUENCE_AXIS) * length
    taken_BD = jnp.take_along_axis(x_BtD, jnp.clip(index_B, 0, length - 1)[:, None, None], axis=1)[:, 0]
    is_here_B = (index_B >= 0) & (index_B < length)
    return sum_over(jnp.where(is_here_B[:, None], taken_BD, jnp.zeros_like(taken_BD)), SEQUENCE_AXIS)
