"""Linears in E4M3: outputs, input gradients and weight gradients are all products of codes (§3.3.2).

An input is quantized once however many weights read it. For the backward pass it is kept as the weights' policy says
(§3.3.3): its E4M3 rows, 12-bit E5M6, or BF16; gradients are quantized as they come, in both directions in one pass.
Weight gradients are float32. Rows here are multiples of 16, which the Hopper kernels need; others are padded.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import E5M6Array, QuantizedArray
from dsv3_jax.fp8.weight import Fp8Weight
from dsv3_jax.kernels.block_quantize import (
    decode_columns,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    quantize_rows_and_encode,
    rms_norm_rows,
    rows_to_columns,
)
from dsv3_jax.kernels.fp8_matmul import fp8_matmul, fp8_matmul_with_squares

ROW_MULTIPLE = 16


def linears(
    x: jax.Array, weights: Sequence[Fp8Weight], *, norm_weight: jax.Array | None = None, eps: float = 0.0
) -> tuple[jax.Array, ...]:
    """Multiplies one input with several weights, normalised first where a norm weight is given.

    Args:
      x: [..., *K].
      weights: [*K, *N] each, all with one input cache.
      norm_weight: float32 [K] of an RMSNorm; the normalised input is quantized without being rounded before.
      eps: of the norm.

    Returns:
      [..., *N] for every weight, in x's dtype.
    """
    assert len({weight.input_cache for weight in weights}) == 1, "one input is kept once"
    contraction = weights[0].forward.codes.shape[-1]
    leading, num_rows = split_leading(x, contraction)
    x_RK = pad_rows(x.reshape(num_rows, contraction))
    outputs = _linears(x_RK, norm_weight, tuple(weight.as_matrix() for weight in weights), eps)
    return tuple(
        y_RN[:num_rows].reshape(*leading, *weight.output_dims) for y_RN, weight in zip(outputs, weights, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linears(x_RK, norm_weight, weights: tuple[Fp8Weight, ...], eps: float) -> tuple[jax.Array, ...]:
    return _linears_forward(x_RK, norm_weight, weights, eps)[0]


def _linears_forward(x_RK, norm_weight, weights, eps):
    rows, kept = quantize_and_keep(x_RK, norm_weight, eps, weights[0].input_cache)
    outputs = tuple(fp8_matmul(rows, weight.forward, out_dtype=x_RK.dtype) for weight in weights)
    return outputs, (kept, tuple(for_backward(weight) for weight in weights))


def _linears_backward(eps, residuals, doutputs):
    kept, weights = residuals
    columns = input_columns(kept, eps)
    dinputs, dweights = [], []
    for dy_RN, weight in zip(doutputs, weights, strict=True):
        dy_rows, dy_columns = quantize_rows_and_columns(dy_RN)
        dinputs.append(fp8_matmul(dy_rows, weight.backward, out_dtype=dy_RN.dtype))
        dweights.append(weight_gradient(weight, columns, dy_columns))
    return *input_gradient(dinputs, kept, eps), tuple(dweights)


_linears.defvjp(_linears_forward, _linears_backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("x", "norm_weight", "cached"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KeptInput:
    """What the backward pass of a linear knows of its input."""

    x: jax.Array | None  # where it is normalised first, or cached as it is
    norm_weight: jax.Array | None
    cached: QuantizedArray | E5M6Array | None  # of what is multiplied; None: computed again from x


def quantize_and_keep(
    x_RK: jax.Array, norm_weight: jax.Array | None, eps: float, input_cache: str
) -> tuple[QuantizedArray, KeptInput]:
    """Returns the rows of the input, normalised where there is a norm weight, and what to keep of it by the policy."""
    if input_cache == "e5m6":
        assert norm_weight is None, "E5M6 is for inputs that no norm makes"
        rows, encoded = quantize_rows_and_encode(x_RK)
        return rows, KeptInput(None, None, encoded)
    rows = quantize_input(x_RK, norm_weight, eps)
    return rows, keep_input(x_RK, norm_weight, rows, input_cache)


def quantize_input(x_RK: jax.Array, norm_weight: jax.Array | None, eps: float) -> QuantizedArray:
    """Returns the rows of the input, normalised where there is a norm weight."""
    return quantize_rows(x_RK) if norm_weight is None else rms_norm_rows(x_RK, norm_weight, eps)


def keep_input(x_RK: jax.Array, norm_weight: jax.Array | None, rows: QuantizedArray, input_cache: str) -> KeptInput:
    """Returns what to keep of an input, BF16 or E4M3; the input of a norm is kept besides, for the norm's gradient."""
    if input_cache == "bf16":
        return KeptInput(x_RK, norm_weight, None)
    assert input_cache == "e4m3", input_cache
    return KeptInput(None if norm_weight is None else x_RK, norm_weight, rows)


def input_columns(kept: KeptInput, eps: float) -> QuantizedArray:
    """Returns the input in 128x1 tiles, [K, R], for the weight's gradient."""
    if isinstance(kept.cached, E5M6Array):
        return decode_columns(kept.cached)
    if kept.cached is not None:
        return rows_to_columns(kept.cached)
    if kept.norm_weight is None:
        return quantize_columns(kept.x)
    normalised_RK, _ = _normalise(kept.x, eps)
    return quantize_columns((normalised_RK * kept.norm_weight).astype(kept.x.dtype))


def input_gradient(dinputs: Sequence[jax.Array], kept: KeptInput, eps: float) -> tuple[jax.Array, jax.Array | None]:
    """Sums the gradients of what was multiplied, in float32, and leads them back through the norm.

    Returns:
      the gradient of x, rounded once to the dtype of the summands, and that of the norm weight.
    """
    dtype = dinputs[0].dtype
    total_RK = sum(dinput.astype(jnp.float32) for dinput in dinputs)
    if kept.norm_weight is None:
        return total_RK.astype(dtype), None
    normalised_RK, inverse_rms_R1 = _normalise(kept.x, eps)
    dnorm_weight = jnp.sum(total_RK * normalised_RK, axis=0).astype(kept.norm_weight.dtype)
    scaled_RK = total_RK * kept.norm_weight
    projection_R1 = jnp.mean(scaled_RK * normalised_RK, axis=-1, keepdims=True)
    return (inverse_rms_R1 * (scaled_RK - normalised_RK * projection_R1)).astype(dtype), dnorm_weight


def _normalise(x_RK: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    x_RK = x_RK.astype(jnp.float32)
    inverse_rms_R1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_RK), axis=-1, keepdims=True) + eps)
    return x_RK * inverse_rms_R1, inverse_rms_R1


def for_backward(weight: Fp8Weight) -> Fp8Weight:
    """Returns the part of a weight that gradients need; codes for serving alone have none."""
    return dataclasses.replace(weight, master=None, forward=None)


def weight_gradient(weight: Fp8Weight, x: QuantizedArray, dy: QuantizedArray) -> Fp8Weight:
    """Returns the gradient of a weight, given those columns of its input and of its output's gradient."""
    if weight.squares is None:
        return weight.gradient(fp8_matmul(x, dy, out_dtype=jnp.float32), None)
    return weight.gradient(*fp8_matmul_with_squares(x, dy))


def split_leading(x: jax.Array, contraction: int) -> tuple[tuple[int, ...], int]:
    """Returns the leading dimensions of [..., *K] that are not contracted, and how many rows they make."""
    size, dims = 1, x.ndim
    while size < contraction:
        dims -= 1
        size *= x.shape[dims]
    return x.shape[:dims], math.prod(x.shape[:dims])


def pad_rows(x_RK: jax.Array) -> jax.Array:
    """Appends rows of zeros up to a multiple of 16."""
    missing = -len(x_RK) % ROW_MULTIPLE
    return jnp.pad(x_RK, ((0, missing), (0, 0))) if missing else x_RK
