"""Quantization to E4M3 with power-of-two scales per 128 values, alone or fused with what makes the values.

The numerics are those of `dsv3_jax.fp8.formats`; the fused ones quantize straight from float32. "Rows" are 1x128 tiles
of x, for products over its last dimension; "columns" are 128x1 tiles of x stored as its transpose, for products over
its rows (the weight gradients). Weights have 128x128 blocks with float32 scales. Not differentiable.

Every function takes `implementation`: "pallas_gpu" (Hopper; 16-bit floats, R a multiple of 16, K of 64) or
"reference". None picks pallas_gpu on a Hopper GPU for operands it supports, else the reference; a named one runs or
raises ValueError, as do operands of other ranks or dtypes than documented.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import TILE, E5M6Array, QuantizedArray, require_quantized
from dsv3_jax.kernels import dispatch
from dsv3_jax.kernels.block_quantize import reference

# Of the Hopper kernels: rows of the transpose start at multiples of 16 bytes; columns come in swizzled segments.
ROW_MULTIPLE, COLUMN_MULTIPLE = 16, 64
WIDEST_NORM, NORM_MULTIPLE = 8192, 2 * TILE  # of the Hopper kernel, which reads a row once, two tiles at a time


def quantize_rows(x_RK: jax.Array, *, implementation: str | None = None) -> QuantizedArray:
    """Quantizes [R, K] in 1x128 tiles: row-quantized [R, K]."""
    _require_matrix(x_RK, "x")
    return _choose(implementation, _array_problem(x_RK)).quantize_rows(x_RK)


def quantize_columns(x_RK: jax.Array, *, implementation: str | None = None) -> QuantizedArray:
    """Quantizes [R, K] in 128x1 tiles: row-quantized [K, R]."""
    _require_matrix(x_RK, "x")
    return _choose(implementation, _array_problem(x_RK)).quantize_columns(x_RK)


def quantize_rows_and_columns(
    x_RK: jax.Array, *, implementation: str | None = None
) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes [R, K] both ways in one pass: row-quantized [R, K] and [K, R]."""
    _require_matrix(x_RK, "x")
    return _choose(implementation, _array_problem(x_RK)).quantize_rows_and_columns(x_RK)


def rows_to_columns(rows: QuantizedArray, *, implementation: str | None = None) -> QuantizedArray:
    """Converts row-quantized [R, K] to row-quantized [K, R]; values change only where they underflow."""
    require_quantized(rows, "rows", tiles=("row",), ndim=2)
    return _choose(implementation, _size_problem(rows.codes.shape)).rows_to_columns(rows)


def quantize_rows_and_encode(
    x_RK: jax.Array, *, implementation: str | None = None
) -> tuple[QuantizedArray, E5M6Array]:
    """Quantizes [R, K] in 1x128 tiles to E4M3, for a product, and to E5M6, which is kept for the backward pass.

    pallas_gpu needs K a multiple of 256.
    """
    _require_matrix(x_RK, "x")
    problem = _array_problem(x_RK) or _pairs_problem(x_RK.shape[1])
    return _choose(implementation, problem).quantize_rows_and_encode(x_RK)


def decode_columns(encoded: E5M6Array, *, implementation: str | None = None) -> QuantizedArray:
    """Quantizes E5M6 [R, K] to E4M3 in 128x1 tiles: row-quantized [K, R]. pallas_gpu needs K a multiple of 256."""
    if not isinstance(encoded, E5M6Array) or encoded.high.ndim != 2:
        raise ValueError(f"encoded is {jax.tree.map(jnp.shape, encoded)}: need a matrix in E5M6 (formats.encode_e5m6)")
    shape = encoded.high.shape
    return _choose(implementation, _size_problem(shape) or _pairs_problem(shape[1])).decode_columns(encoded)


def rms_norm_rows(
    x_RD: jax.Array, weight_D: jax.Array, eps: float, *, implementation: str | None = None
) -> QuantizedArray:
    """Normalises rows of [R, D] by their root mean square, times the weight: row-quantized [R, D].

    Args:
      x_RD: rows.
      weight_D: the norm's weight, any float dtype.
      eps: added to the mean square.
      implementation: as above; pallas_gpu needs D a multiple of 256 up to 8192, and eps a Python number.
    """
    _require_matrix(x_RD, "x")
    width = x_RD.shape[1]
    if weight_D.shape != (width,):
        raise ValueError(f"weight {weight_D.shape} for x {x_RD.shape}: need [{width}]")
    problem = _array_problem(x_RD)
    if width % NORM_MULTIPLE or width > WIDEST_NORM:
        problem = f"a norm of D={width}: must be a multiple of {NORM_MULTIPLE} up to {WIDEST_NORM}"
    return _choose(implementation, problem).rms_norm_rows(x_RD, weight_D, eps)


def swiglu_rows(gate_up_MX: jax.Array, *, implementation: str | None = None) -> tuple[QuantizedArray, QuantizedArray]:
    """Computes silu(gate) · up.

    Args:
      gate_up_MX: [M, 2F], columns [0, F) the gate and [F, 2F) up.
      implementation: as above; pallas_gpu needs F a multiple of 128.

    Returns:
      The product, from the unquantized gate and up, row-quantized [M, F]; and gate_up row-quantized [M, 2F], what the
      backward pass keeps.
    """
    _require_matrix(gate_up_MX, "gate_up")
    _require_halves(gate_up_MX.shape)
    problem = _array_problem(gate_up_MX) or _halves_problem(gate_up_MX.shape)
    return _choose(implementation, problem).swiglu_rows(gate_up_MX)


def swiglu_columns(gate_up: QuantizedArray, *, implementation: str | None = None) -> QuantizedArray:
    """Recomputes silu(gate) · up from row-quantized [M, 2F]: row-quantized [F, M], for the weight gradient.

    pallas_gpu needs F a multiple of 128.
    """
    require_quantized(gate_up, "gate_up", tiles=("row",), ndim=2)
    shape = gate_up.codes.shape
    _require_halves(shape)
    return _choose(implementation, _size_problem(shape) or _halves_problem(shape)).swiglu_columns(gate_up)


def swiglu_gradient(
    gate_up: QuantizedArray, dhidden_MF: jax.Array, *, implementation: str | None = None
) -> tuple[QuantizedArray, QuantizedArray]:
    """Computes the gradients of gate and up from that of silu(gate) · up.

    Args:
      gate_up: row-quantized [M, 2F].
      dhidden_MF: the gradient of the product.
      implementation: as above; pallas_gpu needs F a multiple of 128.

    Returns:
      The gradients side by side like gate_up, row-quantized [M, 2F] and [2F, M].
    """
    problem = _gradient_problem(gate_up, dhidden_MF)
    return _choose(implementation, problem).swiglu_gradient(gate_up, dhidden_MF)


def weighted_swiglu_gradient(
    gate_up: QuantizedArray, dhidden_MF: jax.Array, weights_M: jax.Array, *, implementation: str | None = None
) -> tuple[QuantizedArray, QuantizedArray, jax.Array]:
    """Computes the gradients of gate, up and weights from that of silu(gate) · up · weights, before its rows' weights.

    Args:
      gate_up: row-quantized [M, 2F].
      dhidden_MF: the gradient of the weighted product, divided by the weights: the product's own is it times them.
      weights_M: one per row, float32.
      implementation: as above; pallas_gpu needs M and F multiples of 128.

    Returns:
      The gradients of gate and up as `swiglu_gradient` returns them, and those of the weights: the sums over each row
      of the product times dhidden, float32 [M].
    """
    problem = _gradient_problem(gate_up, dhidden_MF)
    if weights_M.shape != dhidden_MF.shape[:1] or weights_M.dtype != jnp.float32:
        raise ValueError(f"weights {weights_M.dtype}{list(weights_M.shape)}: need float32[{len(dhidden_MF)}]")
    if len(weights_M) % TILE:
        problem = f"{len(weights_M)} weighted rows: must be a multiple of {TILE}"
    return _choose(implementation, problem).weighted_swiglu_gradient(gate_up, dhidden_MF, weights_M)


def quantize_weights(
    weight_KN: jax.Array, *, implementation: str | None = None
) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes weights by the rule of published checkpoints: per block, scale = max(amax, 1e-4) / 448.

    A block with a value that is not finite has a scale that is not finite, and no number survives in it.

    Args:
      weight_KN: [..., K, N], computed in float32; leading dimensions are separate matrices.
      implementation: as above; pallas_gpu needs float32, K and N multiples of 16.

    Returns:
      Block-quantized [..., N, K], for the linear, and [..., K, N], for the gradient of its input: the same codes and
      scales.
    """
    if weight_KN.ndim < 2 or not jnp.issubdtype(weight_KN.dtype, jnp.floating):
        raise ValueError(f"weight is {weight_KN.dtype}{list(weight_KN.shape)}: need matrices of floats, [..., K, N]")
    return _choose(implementation, _weight_problem(weight_KN)).quantize_weights(weight_KN)


def _choose(implementation: str | None, problem: str | None):
    """Returns the module whose functions run."""
    if not dispatch.runs_pallas(implementation, problem):
        return reference
    from dsv3_jax.kernels.block_quantize import pallas_gpu  # loads Mosaic: seconds that a CPU process can save

    return pallas_gpu


def _require_matrix(x: jax.Array, name: str) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(f"{name} is {x.dtype}{list(x.shape)}: need a matrix of bfloat16, float16 or float32")


def _require_halves(shape: tuple[int, int]) -> None:
    if shape[1] % 2:
        raise ValueError(f"gate_up {shape}: need as many columns of gate as of up, [M, 2F]")


def _gradient_problem(gate_up: QuantizedArray, dhidden: jax.Array) -> str | None:
    """Checks the operands of a gradient; names what about them the Hopper kernels cannot run, or returns None."""
    require_quantized(gate_up, "gate_up", tiles=("row",), ndim=2)
    _require_matrix(dhidden, "dhidden")
    shape = gate_up.codes.shape
    _require_halves(shape)
    if dhidden.shape != (shape[0], shape[1] // 2):
        raise ValueError(f"dhidden {dhidden.shape} for gate_up {shape}: need [{shape[0]}, {shape[1] // 2}]")
    return _array_problem(dhidden) or _halves_problem(shape)


def _array_problem(x: jax.Array) -> str | None:
    """Names what about an unquantized operand the Hopper kernels cannot run, or returns None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x.dtype}: only 16-bit floats"
    return _size_problem(x.shape)


def _size_problem(shape: tuple[int, int]) -> str | None:
    if shape[0] % ROW_MULTIPLE or shape[1] % COLUMN_MULTIPLE or 0 in shape:
        return f"an array of {list(shape)}: must be positive multiples of {ROW_MULTIPLE} by {COLUMN_MULTIPLE}"
    return None


def _halves_problem(shape: tuple[int, int]) -> str | None:
    width = shape[1] // 2
    return f"gate and up of F={width}: must be a multiple of {TILE}" if width % TILE else None


def _pairs_problem(width: int) -> str | None:
    return f"E5M6 of K={width}: must be a multiple of {2 * TILE}" if width % (2 * TILE) else None


def _weight_problem(weight: jax.Array) -> str | None:
    if weight.dtype != jnp.float32:
        return f"{weight.dtype} weights: only float32"
    if weight.shape[-2] % ROW_MULTIPLE or weight.shape[-1] % ROW_MULTIPLE or 0 in weight.shape:
        return f"weights of {list(weight.shape)}: K and N must be positive multiples of {ROW_MULTIPLE}"
    return None
