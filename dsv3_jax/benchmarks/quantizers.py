"""The quantizers beside a copy of as many bytes in the same run. Needs a Hopper GPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.contests import Contest, Entrant, hold
from dsv3_jax.benchmarks.replays import to_torch
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.fp8 import formats
from dsv3_jax.kernels import block_quantize

OURS, XLA_COPY, TORCH_COPY = "dsv3_jax", "XLA copy", "torch copy"
SHAPES = ((4096, 7168), (32768, 2048))  # tokens and the residual stream; rows of experts and their hidden width
NORM_SHAPES = ((4096, 7168), (4096, 1536))
ATTENTION_SHAPES = ((8192, 16384),)  # tokens and all heads' outputs
WEIGHT_SHAPES = ((7168, 2112), (8, 7168, 4096))  # the latents; gates of 8 experts
SWIGLU_SHAPES = ((4096, 2 * 18432), (32768, 2 * 2048))  # gate and up: the dense feed-forward and the experts


def quantizer_rows(*, with_torch: bool) -> list[Row]:
    """Times every quantizer; "of XLA copy" is its share of the bandwidth that the copy reaches, read plus written."""
    plain = (
        block_quantize.quantize_rows, block_quantize.quantize_columns, block_quantize.quantize_rows_and_columns,
    )  # fmt: skip
    contests = [_contest(op, shape, lambda x: (x,)) for op in plain for shape in SHAPES]
    contests += [_contest(block_quantize.rows_to_columns, shape, _rows) for shape in SHAPES]
    contests += [_contest(_rms_norm_rows, shape, lambda x: (x, jnp.ones(x.shape[1]))) for shape in NORM_SHAPES]
    contests += [_contest(block_quantize.swiglu_rows, shape, lambda x: (x,)) for shape in SWIGLU_SHAPES]
    contests += [_contest(block_quantize.swiglu_columns, shape, _rows) for shape in SWIGLU_SHAPES]
    contests += [
        _contest(block_quantize.swiglu_gradient, shape, lambda x: (*_rows(x), x[:, : x.shape[1] // 2]))
        for shape in SWIGLU_SHAPES
    ]
    contests += [
        _contest(block_quantize.weighted_swiglu_gradient, shape, _weighted_rows) for shape in SWIGLU_SHAPES[1:]
    ]
    for shape in ATTENTION_SHAPES:
        contests.append(_contest(block_quantize.quantize_rows_and_encode, shape, lambda x: (x,)))
        contests.append(_contest(block_quantize.decode_columns, shape, lambda x: (formats.encode_e5m6(x),)))
    contests += [_contest(block_quantize.quantize_weights, shape, _weights) for shape in WEIGHT_SHAPES]
    return hold(contests, against=XLA_COPY, with_torch=with_torch, modes=("burst", "steady"))


def _contest(
    operation: Callable[..., Any], shape: tuple[int, ...], operands_of: Callable[[jax.Array], tuple]
) -> Contest:
    """Quantizes normal BF16 values, or what is made of them, and copies as many bytes as that reads and writes."""
    name = operation.__name__.strip("_")

    def draw_operands():
        return operands_of(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))

    ours = Contest(name, 0.0, lambda: {"own": draw_operands()}, (Entrant(OURS, "own", operation),))

    def draw():
        return {"own": draw_operands(), "copied": (jnp.ones(ours.num_bytes // 4, jnp.bfloat16),)}

    entrants = (
        *ours.entrants,
        Entrant(XLA_COPY, "copied", jnp.copy),
        Entrant(TORCH_COPY, "copied", lambda x: to_torch(x).clone, is_torch=True),
    )
    return Contest(f"{name} {' x '.join(map(str, shape))}", 0.0, draw, entrants)


def _rows(x_RK: jax.Array) -> tuple[formats.QuantizedArray]:
    return (formats.quantize_rows(x_RK),)


def _weighted_rows(x_RK: jax.Array) -> tuple[formats.QuantizedArray, jax.Array, jax.Array]:
    return *_rows(x_RK), x_RK[:, : x_RK.shape[1] // 2], jnp.full(len(x_RK), 0.3, jnp.float32)


def _weights(x_KN: jax.Array) -> tuple[jax.Array]:
    return (x_KN.astype(jnp.float32),)


def _rms_norm_rows(x_RD: jax.Array, weight_D: jax.Array) -> formats.QuantizedArray:
    return block_quantize.rms_norm_rows(x_RD, weight_D, 1e-6)
