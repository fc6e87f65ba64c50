"""Block-scaled FP8 products at DeepSeek-V3's sizes, dense and grouped, beside torch's. Needs a Hopper GPU.

No quantizer is in these times: all FP8 entrants multiply the same codes with the same scales. The peer of the dense
products is cuBLASLt's block-scaled kernel (`torch.nn.functional.scaled_mm`); torch has none for groups, where the peer
multiplies BF16. Errors are relative to the float32 product of what was multiplied, in 256 rows.
"""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.contests import Contest, Entrant, hold
from dsv3_jax.benchmarks.replays import to_torch
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import QuantizedArray
from dsv3_jax.kernels import fp8_matmul, grouped_matmul

DENSE_SHAPES = (  # (tokens, N, K)
    (4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168),
    (4096, 7168, 2048), (8192, 8192, 8192),
)  # fmt: skip
DECODE_TOKENS = (64, 128)
DECODE_SHAPES = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))  # (N, K)
GROUPS = ((8, 4096), (32, 1024))  # (experts, tokens of each)
GROUPED_SHAPES = ((4096, 7168), (7168, 2048))  # (N, K)
CHECKED_ROWS = 256
OURS_FP8, OURS_BF16 = "dsv3_jax FP8", "dsv3_jax BF16"
TORCH_FP8, TORCH_BF16 = "torch FP8", "torch BF16"


def product_rows(*, with_torch: bool) -> list[Row]:
    """Times 1x128-scaled activations times 128x128-scaled weights, BF16 result: outputs and input gradients."""
    contests = [dense_contest(*shape, weights=True) for shape in DENSE_SHAPES]
    return hold(contests, against=TORCH_FP8, with_torch=with_torch, modes=("single", "burst", "steady"))


def decode_rows(*, with_torch: bool) -> list[Row]:
    """Times the product for few tokens, where reading the weights is the floor: steadily, weights never in cache."""
    contests = [dense_contest(tokens, *shape, weights=True) for tokens in DECODE_TOKENS for shape in DECODE_SHAPES]
    return hold(contests, against=TORCH_FP8, with_torch=with_torch, modes=("steady",))


def weight_gradient_rows(*, with_torch: bool) -> list[Row]:
    """Times products of 1x128-scaled operands over the tokens, float32 result [N, K]."""
    contests = [
        dense_contest(columns, contraction, tokens, weights=False) for tokens, columns, contraction in DENSE_SHAPES
    ]
    return hold(contests, against=TORCH_FP8, with_torch=with_torch, modes=("single", "burst", "steady"))


def grouped_rows(*, with_torch: bool) -> list[Row]:
    """Times the experts' products and weight gradients, ours in FP8 and BF16 beside torch's in BF16."""
    contests = [
        make(*groups, *shape)
        for make in (grouped_contest, grouped_gradient_contest)
        for groups in GROUPS
        for shape in GROUPED_SHAPES
    ]
    return hold(contests, against=TORCH_BF16, with_torch=with_torch, modes=("single", "burst", "steady"))


def dense_contest(rows: int, columns: int, contraction: int, *, weights: bool) -> Contest:
    """Multiplies [rows, contraction] with the transpose of [columns, contraction], block-scaled or row-scaled."""
    out_dtype = jnp.bfloat16 if weights else jnp.float32

    def draw():
        a_RK, b_CK = _draw((rows, contraction), 0), _draw((columns, contraction), 1)
        quantize_b = formats.quantize_weight_blocks if weights else formats.quantize_rows
        return {"fp8": (formats.quantize_rows(a_RK), quantize_b(b_CK)), "bf16": (a_RK, b_CK)}

    def exact_and_actual(operands, out_RC):
        a_RK, b_CK = map(_values, operands)
        return _multiply_exactly(a_RK[:CHECKED_ROWS], b_CK), _checked(out_RC)

    entrants = (
        Entrant(OURS_FP8, "fp8", functools.partial(fp8_matmul.fp8_matmul, out_dtype=out_dtype)),
        Entrant(TORCH_FP8, "fp8", functools.partial(_torch_scaled_mm, out_dtype=out_dtype), is_torch=True),
        Entrant(TORCH_BF16, "bf16", _torch_mm, is_torch=True),
    )
    return Contest(
        case=f"{rows} x {columns} over {contraction}",
        flops=2 * rows * columns * contraction,
        draw=draw,
        entrants=entrants,
        exact_and_actual=exact_and_actual,
    )


def grouped_contest(num_groups: int, group_rows: int, columns: int, contraction: int) -> Contest:
    """Multiplies the rows of each group with the transpose of its [columns, contraction] matrix."""
    num_rows = num_groups * group_rows

    def draw():
        x_MK, w_ECK = _draw((num_rows, contraction), 0), _draw((num_groups, columns, contraction), 1)
        sizes_E = jnp.full((num_groups,), group_rows, jnp.int32)
        fp8 = (formats.quantize_rows(x_MK), formats.quantize_weight_blocks(w_ECK), sizes_E)
        return {"fp8": fp8, "bf16": (x_MK, w_ECK.mT, sizes_E)}

    def exact_and_actual(operands, out_MC):
        x, w, _ = operands
        is_transposed = not isinstance(w, QuantizedArray)  # BF16 weights are [E, K, C]
        w_CK = _values(w[0]).T if is_transposed else _values(QuantizedArray(w.codes[0], w.scales[0], w.tile))
        checked = min(CHECKED_ROWS, group_rows)
        return _multiply_exactly(_values(x)[:checked], w_CK), _checked(out_MC[:checked])

    entrants = (
        Entrant(OURS_FP8, "fp8", functools.partial(grouped_matmul.grouped_fp8_matmul, alignment=formats.TILE)),
        Entrant(OURS_BF16, "bf16", functools.partial(grouped_matmul.grouped_matmul, alignment=formats.TILE)),
        Entrant(TORCH_BF16, "bf16", functools.partial(_torch_grouped_mm, group_rows=group_rows), is_torch=True),
    )
    return Contest(
        case=f"{num_groups} x {group_rows}: {columns} x {contraction}",
        flops=2 * num_rows * columns * contraction,
        draw=draw,
        entrants=entrants,
        exact_and_actual=exact_and_actual,
    )


def grouped_gradient_contest(num_groups: int, group_rows: int, columns: int, contraction: int) -> Contest:
    """Multiplies inputs [M, contraction] and output gradients [M, columns] over the rows of each group."""
    num_rows = num_groups * group_rows

    def draw():
        x_MK, dy_MC = _draw((num_rows, contraction), 0), _draw((num_rows, columns), 1)
        sizes_E = jnp.full((num_groups,), group_rows, jnp.int32)
        fp8 = (formats.quantize_columns(x_MK), formats.quantize_columns(dy_MC), sizes_E)
        return {"fp8": fp8, "bf16": (x_MK, dy_MC, sizes_E)}

    def exact_and_actual(operands, dw_EKC):
        x, dy, _ = operands
        is_by_columns = isinstance(x, QuantizedArray)  # FP8 operands are [K, M] and [C, M]
        x_KM, dy_CM = (_values(operand) if is_by_columns else _values(operand).T for operand in (x, dy))
        exact_KC = _multiply_exactly(x_KM[:CHECKED_ROWS, :group_rows], dy_CM[:, :group_rows])
        return exact_KC, _checked(dw_EKC[0])

    def ours_bf16(x_MK, dy_MC, sizes_E):
        w_EKC = jax.ShapeDtypeStruct((num_groups, contraction, columns), jnp.bfloat16)
        multiply = functools.partial(grouped_matmul.grouped_matmul, alignment=formats.TILE)
        return jax.vjp(lambda w: multiply(x_MK, w, sizes_E), jnp.zeros(w_EKC.shape, w_EKC.dtype))[1](dy_MC)[0]

    ours_fp8 = functools.partial(grouped_matmul.grouped_fp8_weight_gradient, alignment=formats.TILE)
    entrants = (
        Entrant(OURS_FP8, "fp8", ours_fp8),
        Entrant(OURS_BF16, "bf16", ours_bf16),
        Entrant(TORCH_BF16, "bf16", functools.partial(_torch_bmm, num_groups=num_groups), is_torch=True),
    )
    return Contest(
        case=f"{num_groups} x {group_rows}: weight gradient {contraction} x {columns}",
        flops=2 * num_rows * columns * contraction,
        draw=draw,
        entrants=entrants,
        exact_and_actual=exact_and_actual,
    )


def _draw(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _values(operand: jax.Array | QuantizedArray) -> jax.Array:
    return formats.dequantize(operand) if isinstance(operand, QuantizedArray) else operand.astype(jnp.float32)


@jax.jit
def _multiply_exactly(a_RK: jax.Array, b_CK: jax.Array) -> jax.Array:
    return jnp.matmul(a_RK, b_CK.T, precision="highest")


def _checked(out: jax.Array) -> jax.Array:
    return out[:CHECKED_ROWS].astype(jnp.float32)


def _torch_scaled_mm(a: QuantizedArray, b: QuantizedArray, *, out_dtype):
    import torch
    from torch.nn.functional import ScalingType, scaled_mm

    scaling = {"row": ScalingType.BlockWise1x128, "block": ScalingType.BlockWise128x128}
    codes_a, codes_b = to_torch(a.codes), to_torch(b.codes).t()
    scales_a, scales_b = to_torch(a.scales).t(), to_torch(b.scales).t()
    dtype = torch.bfloat16 if out_dtype == jnp.bfloat16 else torch.float32
    return lambda: scaled_mm(codes_a, codes_b, scales_a, scaling[a.tile], scales_b, scaling[b.tile], output_dtype=dtype)


def _torch_mm(a_RK: jax.Array, b_CK: jax.Array):
    import torch

    a, b = to_torch(a_RK), to_torch(b_CK).t()
    return lambda: torch.mm(a, b)


def _torch_grouped_mm(x_MK: jax.Array, w_EKC: jax.Array, sizes_E: jax.Array, *, group_rows: int):
    import torch

    x, w = to_torch(x_MK), to_torch(w_EKC)
    ends = torch.arange(group_rows, len(x) + 1, group_rows, device="cuda", dtype=torch.int32)
    return lambda: torch._grouped_mm(x, w, offs=ends)


def _torch_bmm(x_MK: jax.Array, dy_MC: jax.Array, sizes_E: jax.Array, *, num_groups: int):
    import torch

    x, dy = (to_torch(operand).unflatten(0, (num_groups, -1)) for operand in (x_MK, dy_MC))
    return lambda: torch.bmm(x.transpose(1, 2), dy)
