"""The kernels alone at DeepSeek-V3's widths, beside torch's in the same process. Needs an NVIDIA GPU."""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.contests import BF16_PEAK
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.benchmarks.timing import Contender, burst_medians
from dsv3_jax.kernels import attention, grouped_matmul

GROUPED_CASES = [(8, 4096, 7168, 4096), (8, 4096, 2048, 7168), (32, 1024, 7168, 4096), (32, 1024, 2048, 7168)]
ATTENTION_SHAPE = {"batch": 2, "length": 4096, "num_heads": 128, "width": 192, "value_width": 128}
ROPE_WIDTH = 64  # of the width, columns of keys that all heads share


def grouped_matmul_rows(*, with_torch: bool) -> list[Row]:
    """Times the expert linears' product and both gradients: (groups, rows per group, K, N) of `GROUPED_CASES`."""
    rows = []
    for num_groups, group_rows, contraction, columns in GROUPED_CASES:
        operands = draw_grouped(num_groups, group_rows, contraction, columns)
        contenders = {"pallas_gpu": _ours_grouped(operands)}
        if with_torch:
            contenders["torch"] = _torch_grouped(operands, group_rows)
        flops = 2 * num_groups * group_rows * contraction * columns
        for pass_name in contenders["pallas_gpu"]:
            case = f"{num_groups} x {group_rows} rows, {contraction} -> {columns}, {pass_name}"
            passes = {name: by_pass[pass_name] for name, by_pass in contenders.items() if pass_name in by_pass}
            rows += _rows(case, flops, burst_medians(passes), peer="torch")
    return rows


def attention_rows(*, with_torch: bool) -> list[Row]:
    """Times causal attention at `ATTENTION_SHAPE`, forward alone and with its gradients."""
    shape = ATTENTION_SHAPE
    score_products = shape["batch"] * shape["num_heads"] * shape["length"] ** 2  # 2 · T²/2 per head
    forward_flops = score_products * (shape["width"] + shape["value_width"])
    backward_flops = score_products * (3 * shape["width"] + 2 * shape["value_width"])
    operands = _draw_attention(**shape)
    whole = _with_whole_keys(operands)
    contenders = {"pallas_gpu": _ours_attention(operands), "cudnn": _cudnn_attention(whole)}
    if with_torch:
        contenders["torch"] = _torch_attention(whole)
    rows = []
    for pass_name, flops in (("forward", forward_flops), ("forward + backward", forward_flops + backward_flops)):
        passes = {name: by_pass[pass_name] for name, by_pass in contenders.items()}
        rows += _rows(f"attention {pass_name}", flops, burst_medians(passes), peer="torch")
    return rows


def _rows(case: str, flops: float, seconds: dict[str, float], *, peer: str) -> list[Row]:
    return [
        {"case": case, "implementation": name, "ms": value * 1e3, "floor ms": flops / BF16_PEAK * 1e3,
         "TFLOP/s": flops / value / 1e12, f"of {peer}": seconds[peer] / value if peer in seconds else None}
        for name, value in seconds.items()
    ]  # fmt: skip


def jax_contender(function, *operands) -> Contender:
    return Contender(functools.partial(jax.jit(function), *operands), jax.block_until_ready)


def draw_grouped(num_groups: int, group_rows: int, contraction: int, columns: int) -> tuple[jax.Array, ...]:
    x_key, w_key, dy_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (num_groups * group_rows, contraction), jnp.bfloat16)
    w = jax.random.normal(w_key, (num_groups, contraction, columns), jnp.bfloat16)
    dy = jax.random.normal(dy_key, (num_groups * group_rows, columns), jnp.bfloat16)
    return jax.block_until_ready((x, w, dy, jnp.full((num_groups,), group_rows, jnp.int32)))


def _ours_grouped(operands: tuple[jax.Array, ...]) -> dict[str, Contender]:
    x, w, dy, sizes = operands

    def multiply(x, w, sizes):
        return grouped_matmul.grouped_matmul(x, w, sizes, alignment=128, implementation="pallas_gpu")

    return {
        "product": jax_contender(multiply, x, w, sizes),
        "input gradient": jax_contender(
            lambda x, w, dy, sizes: jax.vjp(lambda x: multiply(x, w, sizes), x)[1](dy), x, w, dy, sizes
        ),
        "weight gradient": jax_contender(
            lambda x, w, dy, sizes: jax.vjp(lambda w: multiply(x, w, sizes), w)[1](dy), x, w, dy, sizes
        ),
    }


def _torch_grouped(operands: tuple[jax.Array, ...], group_rows: int) -> dict[str, Contender]:
    import torch

    x, w, dy = (torch.from_dlpack(array) for array in operands[:3])
    num_groups = len(w)
    ends = torch.arange(group_rows, len(x) + 1, group_rows, device="cuda", dtype=torch.int32)
    x_groups, dy_groups = (array.view(num_groups, group_rows, -1) for array in (x, dy))
    starts = {
        "product": lambda: torch._grouped_mm(x, w, offs=ends),
        "input gradient": lambda: torch._grouped_mm(dy, w.transpose(1, 2), offs=ends),
        "weight gradient": lambda: torch.bmm(x_groups.transpose(1, 2), dy_groups),
    }
    return {name: Contender(start, lambda _: torch.cuda.synchronize()) for name, start in starts.items()}


def _draw_attention(batch: int, length: int, num_heads: int, width: int, value_width: int) -> tuple[jax.Array, ...]:
    """Returns queries, keys' own columns beside values, keys' shared columns and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    widths = (width, width - ROPE_WIDTH + value_width, value_width)
    shapes = [(batch, length, num_heads, w) for w in widths]
    shapes.insert(2, (batch, length, ROPE_WIDTH))
    drawn = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))
    return jax.block_until_ready(tuple(drawn))


def _with_whole_keys(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns queries, keys, values and the output's gradient, as the peers take them."""
    q, kv, k_rope, dout = operands
    return jax.block_until_ready((q, *attention.keys_and_values(kv, k_rope, q.shape[-1]), dout))


def _ours_attention(operands: tuple[jax.Array, ...]) -> dict[str, Contender]:
    *inputs, dout = operands
    scale = inputs[0].shape[-1] ** -0.5

    def gradients(q, kv, k_rope, dout):
        out, lse = attention.attend(q, kv, k_rope, scale=scale)
        return attention.attention_gradients(q, kv, k_rope, out, lse, dout, scale=scale)

    return {
        "forward": jax_contender(functools.partial(attention.attend, scale=scale), *inputs),
        "forward + backward": jax_contender(gradients, *inputs, dout),
    }


def _cudnn_attention(operands: tuple[jax.Array, ...]) -> dict[str, Contender]:
    q, k, v, dout = operands
    padding = [(0, 0)] * 3 + [(0, q.shape[-1] - v.shape[-1])]  # cuDNN wants values as wide as keys

    def attend(q, k, v):
        out = jax.nn.dot_product_attention(q, k, jnp.pad(v, padding), is_causal=True, implementation="cudnn")
        return out[..., : v.shape[-1]]

    return {
        "forward": jax_contender(attend, q, k, v),
        "forward + backward": jax_contender(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout), q, k, v, dout),
    }


def _torch_attention(operands: tuple[jax.Array, ...]) -> dict[str, Contender]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dout = (torch.from_dlpack(array).transpose(1, 2) for array in operands)
    leaves = [array.detach().requires_grad_() for array in (q, k, v)]

    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # the only one of torch's that takes 192 and 128
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    starts = {
        "forward": lambda: attend(q, k, v),
        "forward + backward": lambda: torch.autograd.grad(attend(*leaves), leaves, dout),
    }
    return {name: Contender(start, lambda _: torch.cuda.synchronize()) for name, start in starts.items()}
