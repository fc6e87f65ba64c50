"""The weight of an FP8 linear: the float32 master beside its codes for both directions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from absl import logging

from dsv3_jax.fp8.formats import QuantizedArray, dequantize
from dsv3_jax.kernels import device
from dsv3_jax.kernels.block_quantize import quantize_weights


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("master", "forward", "backward", "squares"),
    meta_fields=("output_dims", "input_cache"),
)
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A weight [*batch, *K, *N] that a linear multiplies in E4M3; takes the weight's place in a parameter tree.

    The gradient belongs to the master alone, and its sum of squares to `squares`. 128x128 blocks stay blocks under
    transposition, so both directions hold the same codes.
    """

    master: jax.Array | None  # float32, the parameter itself; None where no gradient is wanted
    forward: QuantizedArray  # [*batch, N, K] in blocks
    backward: QuantizedArray | None  # [*batch, K, N] in blocks; None where no gradient is wanted
    output_dims: tuple[int, ...]  # the dimensions that N stands for
    input_cache: str  # what the linear keeps of its input for the weight's gradient: "e4m3", "e5m6" or "bf16"
    squares: jax.Array | None = None  # float32 zero whose gradient is the sum of squares of the master's; None: unasked

    def __getitem__(self, index) -> "Fp8Weight":
        """Returns the weight itself for `[...]`, as an array does."""
        assert index is ..., index
        return self

    def as_matrix(self) -> "Fp8Weight":
        """Returns the weight with its master as [*batch, K, N]."""
        if self.master is None:
            return self
        *batch, outputs, contraction = self.forward.codes.shape
        return dataclasses.replace(self, master=self.master.reshape(*batch, contraction, outputs))

    def gradient(self, dmaster: jax.Array, squares: jax.Array | None) -> "Fp8Weight":
        """Returns the gradient of the weight: that of its master and, where it is asked for, the sum of its squares."""
        return dataclasses.replace(self, master=dmaster, forward=None, backward=None, squares=squares)

    def dequantize(self, contracted: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """Returns the codes' values as [*batch, *contracted, *output_dims]."""
        values_NK = dequantize(self.forward).astype(dtype)
        shape = (*values_NK.shape[:-2], *contracted, *self.output_dims)
        return jnp.swapaxes(values_NK, -1, -2).reshape(shape)


def quantize_weight(
    weight: jax.Array, *, contracted_dims: int, batch_dims: int, input_cache: str, with_gradient: bool
) -> Fp8Weight:
    """Quantizes a weight by the rule of published FP8 checkpoints.

    Args:
      weight: [*batch, *K, *N], any float dtype; computed in float32.
      contracted_dims: how many dimensions K stands for.
      batch_dims: leading dimensions that enumerate separate matrices: layers, experts.
      input_cache: see `Fp8Weight`.
      with_gradient: also keep the master and make the codes that gradients need.
    """
    batch, inner = weight.shape[:batch_dims], weight.shape[batch_dims:]
    contracted, output_dims = inner[:contracted_dims], inner[contracted_dims:]
    matrix_KN = jax.lax.stop_gradient(weight).reshape(*batch, math.prod(contracted), math.prod(output_dims))
    forward, backward = quantize_weights(matrix_KN)
    if not with_gradient:
        return Fp8Weight(None, forward, None, output_dims, input_cache)
    return Fp8Weight(weight, forward, backward, output_dims, input_cache)


@functools.cache
def warn_without_kernels() -> None:
    """Says once, where the default device has no FP8 kernels, that the numbers are right and the speed is not."""
    if not device.is_hopper():
        kind = jax.devices()[0].device_kind
        logging.warning("precision=fp8: %s has no FP8 kernels; the reference computes the same numbers, slowly", kind)
