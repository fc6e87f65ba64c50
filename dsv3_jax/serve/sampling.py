"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp


def sample(logits_BV: jax.Array, keys_B: jax.Array, *, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws one token per row from the smallest set of tokens whose probabilities reach top_p.

    Args:
      logits_BV: float32.
      keys_B: one random key per row, so that a row's tokens do not depend on its neighbours.
      temperature: float32 scalar; 0 takes the most likely token.
      top_p: float32 scalar in (0, 1].

    Returns:
      int32 [B].
    """
    scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
    draw = jax.vmap(lambda key, logits_V: jax.random.categorical(key, logits_V))
    drawn_B = jax.lax.cond(
        temperature > 0,
        lambda: draw(keys_B, keep_nucleus(scaled_BV, top_p)).astype(jnp.int32),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )
    return drawn_B


def keep_nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Puts -inf on the tokens outside the nucleus: a token stays if those more likely hold less than top_p."""
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_probabilities = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    mass_before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    rank_BV = jnp.argsort(order_BV, axis=-1)
    is_kept_BV = jnp.take_along_axis(mass_before < top_p, rank_BV, axis=-1)
    return jnp.where(is_kept_BV, logits_BV, -jnp.inf)
