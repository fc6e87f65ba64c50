"""Rotary positions on interleaved pairs, with YaRN context extension (arXiv 2309.00071)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the angle per position of every pair, radians, float32 [R/2].

    YaRN keeps the frequencies that turn more than beta_fast times within the original context, divides those that turn
    less than beta_slow times by the factor, and blends in between along a ramp over the pair index.
    """
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.rope_scaling is None:
        return frequencies.astype(np.float32)
    low, high = _correction_range(config, config.rope_scaling)
    interpolated_share = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    blended = frequencies * (1 - interpolated_share) + frequencies / config.rope_scaling.factor * interpolated_share
    return blended.astype(np.float32)


def softmax_scale(config: ModelConfig) -> float:
    """Returns the factor on attention scores: (H + R)^-1/2, times mscale² under YaRN."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


def rotation(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of the given positions, float32 [..., R/2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    magnitude = _rotation_magnitude(config.rope_scaling)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turns each pair (x0, x1), (x2, x3), … of the last dimension by its angle, in float32; returns x's dtype.

    Args:
      x: [..., R].
      cosines, sines: broadcastable to [..., R/2].
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cosines - odd * sines, even * sines + odd * cosines], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def rotate_last(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turns the last columns, as many as the rotation has, and leaves those before as they are.

    It and its derivative write the turned columns alone where x's memory can be reused.

    Args:
      x: [..., X], X at least R.
      cosines, sines: broadcastable to [..., R/2]; they receive no gradient.
    """
    turned = rotate(x[..., -2 * cosines.shape[-1] :], cosines, sines)
    # Behind a barrier: XLA's CPU compiler, up to 0.10.2 at least, gets products of one head with such an update wrong.
    return jax.lax.optimization_barrier(x.at[..., -turned.shape[-1] :].set(turned))


def _rotate_last_forward(x, cosines, sines):
    return rotate_last(x, cosines, sines), (cosines, sines)


def _rotate_last_backward(rotation, dy):
    cosines, sines = rotation
    return rotate_last(dy, cosines, -sines), None, None


rotate_last.defvjp(_rotate_last_forward, _rotate_last_backward)


def _correction_range(config: ModelConfig, scaling: RopeScaling) -> tuple[float, float]:
    """Returns the pair indices between which YaRN blends."""
    dim = config.qk_rope_head_dim

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    return low, high if high != low else high + 0.001


def _magnitude(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _rotation_magnitude(scaling: RopeScaling | None) -> float:
    """Returns the factor on cosines and sines: 1 whenever mscale equals mscale_all_dim."""
    if scaling is None:
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)
