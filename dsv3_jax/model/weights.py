"""Weights as they are computed with: rounded to BF16 or quantized to E4M3, beside the float32 array of their gradient.

Where devices keep parts of a master, each rounds or quantizes its own part, and what is gathered is that: 2 bytes or 1
per element instead of 4, the same numbers as if the gathered master were rounded.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.formats import (
    TILE,
    QuantizedArray,
    block_scales,
    divide_by_scales,
    largest_magnitudes,
    num_tiles,
    pad_block_scales,
    transpose_blocks,
)
from dsv3_jax.fp8.weight import Fp8Weight, quantize_weight
from dsv3_jax.sharding.zero import Part, is_part


@dataclasses.dataclass(frozen=True)
class Linear:
    """How a weight [*batch, *K, *N] multiplies: matrix by matrix of its batch it contracts K."""

    contracted_dims: int = 1
    batch_dims: int = 0
    cache_setting: str = "fp8_input_cache"  # the setting that says what is kept of its input for the backward pass


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "master"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class RoundedWeight:
    """A weight [*batch, *K, *N] in the precision that it is multiplied in; takes its place in a parameter tree.

    The gradient belongs to the master alone and has the master's dtype: that of a float32 master is never rounded.
    """

    values: jax.Array | Part
    master: jax.Array | Part  # the parameter itself, or what takes the gradient in its place: nothing reads it

    def __getitem__(self, index) -> "RoundedWeight":
        """Returns the weight itself for `[...]`, as an array does."""
        assert index is ..., index
        return self

    def gradient(self, dmaster: jax.Array) -> "RoundedWeight":
        """Returns the gradient of the weight: that of its master."""
        return RoundedWeight(None, dmaster)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("contracted_dims", "num_output_dims"),
)
@dataclasses.dataclass(frozen=True)
class SplitCodes:
    """The block-quantized codes of a weight of which every device has a part; takes the place of all of them."""

    codes: Part  # of the weight [*batch, *K, *N]
    scales: Part  # of all blocks of its matrices [K, N], as in `QuantizedArray`
    contracted_dims: int
    num_output_dims: int

    def gather(self) -> QuantizedArray:
        """Joins the parts of all devices: [*batch, K, N] in blocks."""
        codes = self.codes.gather()
        num_batch_dims = codes.ndim - self.contracted_dims - self.num_output_dims
        batch, contracted = codes.shape[:num_batch_dims], codes.shape[num_batch_dims : -self.num_output_dims]
        return QuantizedArray(codes.reshape(*batch, math.prod(contracted), -1), self.scales.gather(), "block")


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the dtype of activations, and of the weights that are not in FP8."""
    return jnp.dtype(jnp.float32 if config.precision == "fp32" else jnp.bfloat16)


def is_fp8(value: Any) -> bool:
    """Tells whether a leaf of a parameter tree is the weight of an FP8 linear."""
    return isinstance(value, Fp8Weight)


def is_prepared(value: Any) -> bool:
    """Tells whether a leaf of a parameter tree is a weight as it is computed with."""
    return isinstance(value, Fp8Weight | RoundedWeight)


def as_rounded(weight: jax.Array | RoundedWeight) -> RoundedWeight:
    """Returns a weight that is not in FP8 beside what takes its gradient: an array takes its own.

    The values of an array are itself, whatever has no gradient: of anything made from it, even an identity, a scan over
    layers would keep a copy of all layers for the backward pass.
    """
    return weight if isinstance(weight, RoundedWeight) else RoundedWeight(weight, weight)


def as_array(weight: jax.Array | RoundedWeight | Fp8Weight, contracted: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Returns a weight [*contracted, *N] as numbers, those of its codes where it is quantized."""
    return weight.dequantize(contracted, dtype) if is_fp8(weight) else as_rounded(weight).values.astype(dtype)


def prepare_weight(
    config: ModelConfig, linear: Linear, weight: jax.Array | Part
) -> jax.Array | Part | RoundedWeight | Fp8Weight:
    """Makes of a master, or of one device's part of it, what a linear multiplies in the config's precision.

    FP8 scales are those of the whole weight: devices whose parts share a 128x128 block agree on its largest magnitude.
    Without FP8 a weight that is whole on its device is rounded where it is multiplied, and stays as it is.
    """
    if config.precision != "fp8":
        return round_weight(config, weight)
    if _is_split(weight):
        codes = _quantize_part(weight, linear)
        output_dims = weight.whole_shape()[linear.batch_dims + linear.contracted_dims :]
        return Fp8Weight(weight, None, codes, output_dims, getattr(config, linear.cache_setting))
    quantized = quantize_whole(config, linear, weight.array if is_part(weight) else weight, with_gradient=True)
    return dataclasses.replace(quantized, master=weight)


def round_weight(config: ModelConfig, weight: jax.Array | Part) -> jax.Array | Part | RoundedWeight:
    """Rounds one device's part of a master to the compute dtype; what is whole is rounded where it is read."""
    if not _is_split(weight):
        return weight
    dtype = compute_dtype(config)
    return RoundedWeight(weight.map(lambda part: part.astype(dtype)), weight)


def _is_split(weight: jax.Array | Part) -> bool:
    return is_part(weight) and weight.splits != ()


def quantize_whole(config: ModelConfig, linear: Linear, weight: jax.Array, *, with_gradient: bool) -> Fp8Weight:
    """Quantizes a weight that is whole on its device; see `fp8.weight.quantize_weight`."""
    return quantize_weight(
        weight, contracted_dims=linear.contracted_dims, batch_dims=linear.batch_dims,
        input_cache=getattr(config, linear.cache_setting), with_gradient=with_gradient,
    )  # fmt: skip


def gather_weight(weight: Any) -> Any:
    """Returns a leaf of a parameter tree with the parts of all devices joined; the gradient is summed and split again.

    Of FP8 codes one direction travels, and the other is its transpose: reading and writing a byte of the own memory
    takes a small part of the time that receiving one takes.
    """
    if is_part(weight):
        return weight.gather()
    if not is_prepared(weight):
        return weight
    if is_part(weight.master):
        weight = dataclasses.replace(weight, master=weight.master.gradient_slot())
    if isinstance(weight, RoundedWeight):
        return dataclasses.replace(weight, values=weight.values.gather()) if is_part(weight.values) else weight
    if isinstance(weight.backward, SplitCodes):
        backward = weight.backward.gather()
        return dataclasses.replace(weight, forward=transpose_blocks(backward), backward=backward)
    return weight


def _quantize_part(part: Part, linear: Linear) -> SplitCodes:
    """Quantizes a part of a weight by the rule of published FP8 checkpoints, with the scales of the whole weight."""
    array, whole_shape = jax.lax.stop_gradient(part.array), part.whole_shape()
    shape = array.shape
    first, last = linear.batch_dims, linear.batch_dims + linear.contracted_dims
    rows, columns = range(first, last), range(last, len(shape))
    row_tile, row_blocks = _tiles(part, rows)
    column_tile, column_blocks = _tiles(part, columns)
    tiles = array.reshape(*shape[:first], len(row_blocks), row_tile, len(column_blocks), column_tile)

    blocks = tuple(num_tiles(math.prod(whole_shape[dim] for dim in dims)) for dims in (rows, columns))
    own_maxima = jnp.zeros((*shape[:first], *blocks), jnp.int32)
    own_maxima = own_maxima.at[..., row_blocks[:, None], column_blocks].max(largest_magnitudes(tiles, (-3, -1)))
    num_inner_dims = len(shape) - first
    sharing = tuple(axis for dim, axes in part.splits if dim >= -num_inner_dims for axis in axes)
    scales = block_scales(jax.lax.pmax(own_maxima, sharing) if sharing else own_maxima)
    codes = divide_by_scales(tiles, scales[..., row_blocks[:, None], column_blocks][..., :, None, :, None])

    batch_splits = tuple((dim + num_inner_dims - 2, axes) for dim, axes in part.splits if dim < -num_inner_dims)
    codes, scales = Part(codes.reshape(shape), part.splits), Part(pad_block_scales(scales), batch_splits)
    return SplitCodes(codes, scales, linear.contracted_dims, len(columns))


def _tiles(part: Part, dims: range) -> tuple[int, jax.Array]:
    """Cuts a device's part of the given dimensions, flattened, into tiles that lie in one block each.

    Returns:
      the length of a tile, and the block of every tile in the flattened dimensions of the whole.
    """
    whole_shape, splits = part.whole_shape(), dict(part.splits)
    run, positions = 1, jnp.zeros((), jnp.int32)
    for dim in dims:
        own_size, axes = part.array.shape[dim], splits.get(dim - part.array.ndim)
        begin = jax.lax.axis_index(axes) * own_size if axes else 0
        run = own_size if axes else run * own_size  # what follows in the whole as it does in the part
        positions = positions[..., None] * whole_shape[dim] + begin + jnp.arange(own_size)
    length = math.gcd(run, TILE)
    return length, positions.reshape(-1)[::length] // TILE
