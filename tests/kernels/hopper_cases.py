"""Calls of the Hopper kernels at DeepSeek-V3's sizes, one for every tile that is tuned, and their operands' types."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import QuantizedArray, encode_e5m6, num_tiles, padded_blocks
from dsv3_jax.kernels.attention import pallas_gpu as attention
from dsv3_jax.kernels.block_quantize import pallas_gpu as quantizers
from dsv3_jax.kernels.fp8_matmul import pallas_gpu as dense
from dsv3_jax.kernels.grouped_matmul import pallas_gpu as grouped_bf16
from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8 as grouped
from dsv3_jax.kernels.scaled_matmul import Tile

# (outputs, inputs) of the linears and of their transposes: latents, heads, dense and expert feed-forwards.
LINEARS = [
    (2112, 7168), (1536, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
    (36864, 7168), (7168, 18432),
]  # fmt: skip
LINEARS += [(inputs, outputs) for outputs, inputs in LINEARS]
TOKENS = (1, 16, 64, 128, 136, 4096)
GROUPS, GROUPED_ROWS, ROWS_OF_LARGE_GROUPS = 8, 8192, 32768


class Call(NamedTuple):
    """A kernel's function and the types of its operands."""

    function: Callable[..., Any]
    operands: tuple


class _Reached(Exception):
    """Carries the tile that a product would run with."""


def rows(num_rows: int, contraction: int) -> QuantizedArray:
    """Returns the type of a row-quantized operand."""
    codes = jax.ShapeDtypeStruct((num_rows, contraction), jnp.float8_e4m3fn)
    return QuantizedArray(codes, jax.ShapeDtypeStruct((num_tiles(contraction), num_rows), jnp.float32), "row")


def blocks(*shape: int) -> QuantizedArray:
    """Returns the type of a block-quantized operand."""
    *leading, num_rows, contraction = shape
    scales = (*leading, num_tiles(num_rows), padded_blocks(contraction))
    codes = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
    return QuantizedArray(codes, jax.ShapeDtypeStruct(scales, jnp.float32), "block")


def product_calls() -> dict[str, Call]:
    """Returns a call of the FP8 products for every tile that the tuned tables hold, over all linears."""
    sizes = jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    aligned = {"alignment": 128}
    candidates = {}
    for outputs, inputs in LINEARS:
        for tokens in TOKENS:
            operands = (rows(tokens, inputs), blocks(outputs, inputs))
            candidates[f"{tokens} x {outputs} over {inputs}"] = Call(dense.fp8_matmul, operands)
        candidates[f"gradient {outputs} x {inputs}"] = Call(
            functools.partial(dense.fp8_matmul, out_dtype=jnp.float32), (rows(outputs, 4096), rows(inputs, 4096))
        )
        for name, num_rows in {"grouped": GROUPED_ROWS, "large groups": ROWS_OF_LARGE_GROUPS}.items():
            candidates[f"{name} {outputs} over {inputs}"] = Call(
                functools.partial(grouped.grouped_fp8_matmul, **aligned),
                (rows(num_rows, inputs), blocks(GROUPS, outputs, inputs), sizes),
            )
        candidates[f"grouped gradient {outputs} x {inputs}"] = Call(
            functools.partial(grouped.grouped_fp8_weight_gradient, **aligned),
            (rows(outputs, GROUPED_ROWS), rows(inputs, GROUPED_ROWS), sizes),
        )
    chosen = {}
    for name, call in candidates.items():
        chosen.setdefault((name.rstrip("0123456789 xover").split(" ")[0], tile_of(call)), (name, call))
    return dict(chosen.values())


def tile_of(call: Call) -> Any:
    """Returns the tile that a call of an FP8 product runs with."""

    def reach(*_, tile, **__):
        raise _Reached(tile)

    patches = [
        mock.patch.object(dense, "scaled_matmul", reach), mock.patch.object(dense, "few_rows_matmul", reach),
        mock.patch.object(grouped, "scaled_matmul", reach),
    ]  # fmt: skip
    with patches[0], patches[1], patches[2]:
        try:
            jax.eval_shape(call.function, *call.operands)
        except _Reached as reached:
            return reached.args[0]
    raise AssertionError("the product ran neither of its kernels")


def unusual_tiles(out_dtype: Any) -> dict[str, Tile]:
    """Returns tiles in clusters of two and with two partial products in flight, by what tells them apart."""
    width = 128 // jnp.dtype(out_dtype).itemsize
    two_in_flight = Tile(warpgroups=2, in_flight=2, store_columns=width)
    return {
        "in clusters": Tile(store_columns=width, cluster=2),
        "with two in flight": two_in_flight,
        "with two in flight of 2 stages": dataclasses.replace(two_in_flight, stages=2, early_addresses=True),
        "with two in flight in clusters of 5 stages": dataclasses.replace(
            two_in_flight, stages=5, cluster=2, store_columns=2 * width, early_addresses=True
        ),
    }


def ragged_calls() -> dict[str, Call]:
    """Returns calls of the FP8 products whose sizes no tile divides, of tuned and of other tiles."""
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    product, gradient = (rows(4071, 7185), blocks(2117, 7185)), (rows(581, 1007), rows(2117, 1007))
    grouped_product = (rows(896, 719), blocks(3, 581, 719), sizes)
    grouped_gradient = (rows(581, 1024), rows(719, 1024), sizes)
    multiply_groups = functools.partial(grouped.grouped_fp8_matmul, alignment=128)
    gradients_of_groups = functools.partial(grouped.grouped_fp8_weight_gradient, alignment=256)
    gradient_of = functools.partial(dense.fp8_matmul, out_dtype=jnp.float32)
    unusual = {}
    for name, tile in unusual_tiles(jnp.bfloat16).items():
        unusual[f"ragged {name}"] = Call(functools.partial(dense.fp8_matmul, tile=tile), product)
        unusual[f"ragged grouped {name}"] = Call(functools.partial(multiply_groups, tile=tile), grouped_product)
    for name, tile in unusual_tiles(jnp.float32).items():
        unusual[f"ragged gradient {name}"] = Call(functools.partial(gradient_of, tile=tile), gradient)
        unusual[f"ragged grouped gradient {name}"] = Call(
            functools.partial(gradients_of_groups, tile=tile), grouped_gradient
        )
        unusual[f"ragged gradient with squares {name}"] = Call(
            functools.partial(dense.fp8_matmul_with_squares, tile=tile), gradient
        )
    return unusual | {
        "ragged": Call(dense.fp8_matmul, product),
        "ragged, few rows": Call(dense.fp8_matmul, (rows(7, 1551), blocks(581, 1551))),
        "ragged gradient": Call(gradient_of, gradient),
        "ragged grouped": Call(multiply_groups, grouped_product),
        "ragged grouped gradient": Call(gradients_of_groups, grouped_gradient),
        "ragged gradient with squares": Call(dense.fp8_matmul_with_squares, gradient),
        "ragged grouped gradient with squares": Call(
            functools.partial(grouped.grouped_fp8_weight_gradient_with_squares, alignment=256), grouped_gradient
        ),
    }


def other_calls() -> dict[str, Call]:
    """Returns calls of the other kernels of FP8 training: quantizers, attention, and the grouped products in BF16."""
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    tokens, gate_up = bf16((4096, 7168)), bf16((4096, 4096))
    sizes = jax.ShapeDtypeStruct((GROUPS,), jnp.int32)

    def experts(x, w, dy, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_bf16.grouped_matmul(x, w, sizes), x, w)
        return y, vjp(dy)

    def attend(first_key_BT, q, kv, k_rope):
        out, vjp = jax.vjp(lambda *inputs: attention.causal_attention(*inputs, first_key_BT, 0.1), q, kv, k_rope)
        return out, vjp(out)

    heads = (bf16((2, 4096, 128, 192)), bf16((2, 4096, 128, 256)), bf16((2, 4096, 64)))
    return {
        "quantize_rows": Call(quantizers.quantize_rows, (tokens,)),
        "quantize_columns": Call(quantizers.quantize_columns, (tokens,)),
        "quantize_rows_and_columns": Call(quantizers.quantize_rows_and_columns, (tokens,)),
        "quantize_rows_and_encode": Call(quantizers.quantize_rows_and_encode, (tokens,)),
        "decode_columns": Call(quantizers.decode_columns, (jax.eval_shape(encode_e5m6, tokens),)),
        "rows_to_columns": Call(quantizers.rows_to_columns, (rows(4096, 7168),)),
        "rms_norm_rows": Call(
            lambda x, weight: quantizers.rms_norm_rows(x, weight, 1e-6),
            (tokens, jax.ShapeDtypeStruct((7168,), jnp.float32)),
        ),
        "swiglu_rows": Call(quantizers.swiglu_rows, (gate_up,)),
        "swiglu_columns": Call(quantizers.swiglu_columns, (rows(4096, 4096),)),
        "swiglu_gradient": Call(quantizers.swiglu_gradient, (rows(4096, 4096), bf16((4096, 2048)))),
        "weighted_swiglu_gradient": Call(
            quantizers.weighted_swiglu_gradient,
            (rows(4096, 4096), bf16((4096, 2048)), jax.ShapeDtypeStruct((4096,), jnp.float32)),
        ),
        "quantize_weights": Call(
            quantizers.quantize_weights, (jax.ShapeDtypeStruct((GROUPS, 7168, 4096), jnp.float32),)
        ),
        "attention": Call(functools.partial(attend, None), heads),
        "attention within documents": Call(attend, (jax.ShapeDtypeStruct((2, 4096), jnp.int32), *heads)),
        "grouped bf16": Call(
            experts, (bf16((GROUPED_ROWS, 7168)), bf16((GROUPS, 7168, 4096)), bf16((GROUPED_ROWS, 4096)), sizes)
        ),
    }
