"""Causal softmax attention with key and value heads of different width: the core of expanded MLA.

Keys come from MLA in two parts. Every head's own part lies beside its value, as the up-projection of the latents makes
both; the last columns, which know the position, are the same for all heads. So do their gradients.
"""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import dispatch
from dsv3_jax.kernels.attention import cudnn, reference
from dsv3_jax.kernels.attention.shared_keys import keys_and_values, sum_over_heads, widths

IMPLEMENTATIONS = (*dispatch.IMPLEMENTATIONS, "cudnn")
LENGTH_MULTIPLE, WIDTH_MULTIPLE = 128, 64  # tiles of the Hopper kernel


def causal_attention(
    q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, first_key_BT: jax.Array | None = None, *,
    scale: float, implementation: str | None = None,
) -> jax.Array:  # fmt: skip
    """Computes softmax(scale · q kᵀ + mask) v per head; a query sees no later key, and none before its first key.

    Args:
      q_BTNX: queries, any float dtype.
      kv_BTNY: every head's key without its last R columns, then its value: Y = X - R + U.
      k_rope_BTR: the last columns of the keys.
      first_key_BT: int32 index of the first key that each query sees, where its document begins: at most the query's
        own index, and never falling along T. None: all queries see all earlier keys.
      scale: factor on the scores.
      implementation: "pallas_gpu" (Hopper; 16-bit floats, T a multiple of 128, X, R and U multiples of 64, R < X,
        U <= X <= 192, U <= 128), "cudnn" (any NVIDIA GPU; 16-bit floats, no first keys) or "reference". The last two
        build whole keys in memory. None picks pallas_gpu on a Hopper GPU for operands it supports, else the reference;
        a named one runs or raises.

    Returns:
      [B, T, N, U] in the dtype of q; scores and softmax are float32.

    Raises:
      ValueError: an unknown implementation, or operands or a device that the named one does not support.
    """
    implementation = _choose(q_BTNX, kv_BTNY, k_rope_BTR, implementation)
    if implementation == "pallas_gpu":
        from dsv3_jax.kernels.attention import pallas_gpu  # loads Mosaic: seconds that a CPU process can save

        return pallas_gpu.causal_attention(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, scale)
    k_BTNX, v_BTNU = keys_and_values(kv_BTNY, k_rope_BTR, q_BTNX.shape[-1])
    if implementation == "reference":
        return reference.causal_attention(q_BTNX, k_BTNX, v_BTNU, first_key_BT, scale=scale)
    if first_key_BT is not None:
        raise ValueError("implementation='cudnn' cannot run first_key_BT; use 'pallas_gpu' or 'reference'")
    return cudnn.causal_attention(q_BTNX, k_BTNX, v_BTNU, scale=scale)


def attend(
    q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, first_key_BT: jax.Array | None = None, *,
    scale: float,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Computes what `causal_attention` does, for a caller that differentiates by `attention_gradients`.

    The arguments are those of `causal_attention`.

    Returns:
      The output, and what the gradients need besides: the base-2 log-sum-exp of the scaled scores, float32 [B, N, T].
      None from the reference, whose gradients compute the scores from the beginning.
    """
    if _choose(q_BTNX, kv_BTNY, k_rope_BTR, None) == "reference":
        k_BTNX, v_BTNU = keys_and_values(kv_BTNY, k_rope_BTR, q_BTNX.shape[-1])
        return reference.causal_attention(q_BTNX, k_BTNX, v_BTNU, first_key_BT, scale=scale), None
    from dsv3_jax.kernels.attention import pallas_gpu

    return pallas_gpu.attend(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, scale)


def attention_gradients(
    q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, out_BTNU: jax.Array, lse_BNT: jax.Array | None,
    dout_BTNU: jax.Array, first_key_BT: jax.Array | None = None, *, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradients of the operands of `causal_attention`, given what `attend` took and returned, and dout.

    The output enters through its products with dout alone, so one that was kept in few bits will do.
    """
    if lse_BNT is None:
        rope_width = k_rope_BTR.shape[-1]
        k_BTNX, v_BTNU = keys_and_values(kv_BTNY, k_rope_BTR, q_BTNX.shape[-1])
        attend_again = functools.partial(reference.causal_attention, first_key_BT=first_key_BT, scale=scale)
        dq_BTNX, dk_BTNX, dv_BTNU = jax.vjp(attend_again, q_BTNX, k_BTNX, v_BTNU)[1](dout_BTNU)
        dkv_BTNY = jnp.concatenate([dk_BTNX[..., :-rope_width], dv_BTNU], axis=-1)
        return dq_BTNX, dkv_BTNY, sum_over_heads(dk_BTNX[..., -rope_width:])
    from dsv3_jax.kernels.attention import pallas_gpu

    operands = (q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, out_BTNU, lse_BNT)
    return pallas_gpu.gradients(*operands, dout_BTNU, scale=scale)


def _choose(q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, implementation: str | None) -> str:
    """Returns the implementation that runs.

    Raises:
      ValueError: it is unknown, or does not support the operands or the device.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: choose one of {IMPLEMENTATIONS} or None")
    if implementation == "cudnn":
        return implementation
    problem = _unsupported(q_BTNX, kv_BTNY, k_rope_BTR)
    return "pallas_gpu" if dispatch.runs_pallas(implementation, problem) else "reference"


def _unsupported(q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array) -> str | None:
    """Names what about these operands the Hopper kernel cannot run, or returns None."""
    length, width = q_BTNX.shape[1], q_BTNX.shape[-1]
    _, rope_width, value_width = widths(q_BTNX, kv_BTNY, k_rope_BTR)
    if q_BTNX.dtype not in (jnp.bfloat16, jnp.float16) or {kv_BTNY.dtype, k_rope_BTR.dtype} != {q_BTNX.dtype}:
        return f"q {q_BTNX.dtype}, kv {kv_BTNY.dtype}, k_rope {k_rope_BTR.dtype}: only one 16-bit float type for all"
    if length % LENGTH_MULTIPLE or not length:
        return f"T={length}: must be a multiple of {LENGTH_MULTIPLE}"
    if width % WIDTH_MULTIPLE or value_width % WIDTH_MULTIPLE or rope_width % WIDTH_MULTIPLE:
        return f"X={width}, U={value_width}, R={rope_width}: all must be multiples of {WIDTH_MULTIPLE}"
    if not 0 < rope_width < width:
        return f"X={width}, R={rope_width}: needs keys of which some columns are their own and some shared"
    if not 0 < value_width <= width <= 192 or value_width > 128:
        return f"X={width}, U={value_width}: needs U <= X <= 192 and U <= 128, or the registers do not hold them"
    return None
