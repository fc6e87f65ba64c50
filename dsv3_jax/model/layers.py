"""The pieces every block is made of: linear, RMSNorm, SwiGLU feed-forward."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.fp8 import feed_forward as fp8_feed_forward
from dsv3_jax.fp8 import linear as fp8_linear
from dsv3_jax.fp8.weight import Fp8Weight
from dsv3_jax.kernels.swiglu import swiglu_gradients
from dsv3_jax.model.params import declare
from dsv3_jax.model.weights import Linear, RoundedWeight, as_rounded, is_fp8
from dsv3_jax.sharding.collectives import gather_tokens

Weight = jax.Array | RoundedWeight | Fp8Weight


class Normed(NamedTuple):
    """An input that is still to be normalised: what reads it decides in which precision that is written."""

    x: jax.Array
    weight: jax.Array
    eps: float

    def gather(self, dim: int) -> "Normed":
        """Returns the input of all tokens of the sequences; this device may own only some of them."""
        return self._replace(x=gather_tokens(self.x, dim))

    def value(self) -> jax.Array:
        """Returns the normalised input in x's dtype."""
        return rms_norm(self.x, self.weight, self.eps)


def linear(x: jax.Array | Normed, weight: Weight, contracted_dims: int = 1) -> jax.Array:
    """Contracts the last dimensions of x with the first of the weight; see `linears`."""
    return linears(x, (weight,), contracted_dims)[0]


def linears(x: jax.Array | Normed, weights: Sequence[Weight], contracted_dims: int = 1) -> tuple[jax.Array, ...]:
    """Multiplies one input with several weights, in FP8 where they are quantized.

    Args:
      x: [..., *K], the batch first.
      weights: [*K, *N] each.
      contracted_dims: how many dimensions K stands for.

    Returns:
      [..., *N] for every weight, in x's dtype.
    """
    if is_fp8(weights[0]):
        x, norm_weight, eps = x if isinstance(x, Normed) else (x, None, 0.0)
        return fp8_linear.linears(x, weights, norm_weight=norm_weight, eps=eps)
    x = x.value() if isinstance(x, Normed) else x
    return tuple(_linear(x, as_rounded(weight), contracted_dims) for weight in weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, weight: RoundedWeight, contracted_dims: int) -> jax.Array:
    """Contracts the last dimensions of x with the first of the weight.

    The weight is rounded to x's dtype; products accumulate in float32, and float32 operands are multiplied in float32
    on every device (no TF32). The weight's gradient has its master's dtype, so that of a float32 master is never
    rounded to bfloat16 (§3.3.2).

    Args:
      x: [..., *K].
      weight: [*K, *N].
      contracted_dims: how many dimensions K stands for.

    Returns:
      [..., *N] in x's dtype.
    """
    x_dims = tuple(range(x.ndim - contracted_dims, x.ndim))
    return _contract(x, weight.values.astype(x.dtype), x_dims, tuple(range(contracted_dims)), x.dtype)


def _linear_forward(x, weight, contracted_dims):
    return _linear(x, weight, contracted_dims), (x, weight)


def _linear_backward(contracted_dims, residuals, dy):
    x, weight = residuals
    num_batch_dims = x.ndim - contracted_dims
    batch_dims = tuple(range(num_batch_dims))
    dy_dims, weight_dims = tuple(range(num_batch_dims, dy.ndim)), tuple(range(contracted_dims, weight.values.ndim))
    dx = _contract(dy, weight.values.astype(dy.dtype), dy_dims, weight_dims, x.dtype)
    return dx, weight.gradient(_contract(x, dy, batch_dims, batch_dims, weight.master.dtype))


_linear.defvjp(_linear_forward, _linear_backward)


def _contract(a, b, a_dims, b_dims, dtype) -> jax.Array:
    contraction = ((a_dims, b_dims), ((), ()))
    return jax.lax.dot_general(a, b, contraction, precision=exact_if_float32(a.dtype), preferred_element_type=dtype)


def exact_if_float32(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Returns the precision that keeps float32 products float32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


# Saves only the inputs of an elementwise function for its backward pass, which recomputes the rest inside its own loop.
keeping_only_inputs = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(keeping_only_inputs, static_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises the last dimension by its root mean square, in float32; returns x's dtype."""
    x_float = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + eps)
    return (x_float * inverse_rms * weight).astype(x.dtype)


@jax.custom_vjp
def swiglu(gate_up: jax.Array) -> jax.Array:
    """Returns silu(gate) · up of [..., 2, F], computed in float32, in the input's dtype."""
    gate, up = _gate_and_up(gate_up)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _swiglu_forward(gate_up):
    return swiglu(gate_up), gate_up


def _swiglu_backward(gate_up, dhidden):
    gradients = swiglu_gradients(*_gate_and_up(gate_up), dhidden.astype(jnp.float32))
    return (jnp.stack(gradients, axis=-2).astype(gate_up.dtype),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gate_and_up(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gate_up[..., 0, :].astype(jnp.float32), gate_up[..., 1, :].astype(jnp.float32)


class FeedForward(nnx.Module):
    """A SwiGLU feed-forward: the dense layers' and the shared experts'."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, ffn_axis: str):
        embed, ffn = ("embed", hidden_size), (ffn_axis, intermediate_size)
        self.gate_up_proj = declare(embed, (None, 2), ffn, linear=Linear())
        self.down_proj = declare(ffn, embed, linear=Linear(cache_setting="fp8_swiglu_cache"))

    def weights(self) -> fp8_feed_forward.FeedForwardWeights:
        """Returns both weights, as FP8 feed-forwards take them."""
        return fp8_feed_forward.FeedForwardWeights(self.gate_up_proj[...], self.down_proj[...])

    def __call__(self, x: jax.Array | Normed) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        if is_fp8(self.gate_up_proj[...]):
            x, norm_weight, eps = x if isinstance(x, Normed) else (x, None, 0.0)
            return fp8_feed_forward.feed_forward(x, self.weights(), norm_weight=norm_weight, eps=eps)
        gate_up = checkpoint_name(linear(x, self.gate_up_proj[...]), "gate_up")
        return linear(swiglu(gate_up), self.down_proj[...])
