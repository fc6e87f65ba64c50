"""Rotation of the last columns against the rotation of these columns alone."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model import rope


def test_rotating_the_last_columns_leaves_the_others_and_differentiates_as_it_would_alone():
    """To the bit, in bfloat16 too, forward and backward."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 3, 24)), jnp.bfloat16) for _ in range(2))
    angles = jnp.asarray(rng.uniform(0, 6, size=(5, 1, 4)), jnp.float32)
    rotation = 1.25 * jnp.cos(angles), 1.25 * jnp.sin(angles)

    def in_two_parts(x):
        return jnp.concatenate([x[..., :16], rope.rotate(x[..., 16:], *rotation)], axis=-1)

    actual, vjp = jax.vjp(lambda x: rope.rotate_last(x, *rotation), x)
    expected, expected_vjp = jax.vjp(in_two_parts, x)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(vjp(dy)[0], expected_vjp(dy)[0])
    assert (np.asarray(actual) != np.asarray(x))[..., 16:].mean() > 0.9
