"""Sampling against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.serve.sampling import keep_nucleus, sample


def nucleus_by_loop(logits_V: np.ndarray, top_p: float) -> set[int]:
    """Adds tokens from the most likely down until their probabilities reach top_p."""
    probabilities = np.exp(logits_V - logits_V.max())
    probabilities /= probabilities.sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if mass >= top_p:
            break
        kept.add(int(token))
        mass += probabilities[token]
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.72, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits_BV = np.random.default_rng(0).normal(size=(5, 40), scale=2).astype(np.float32)
    kept_BV = np.isfinite(keep_nucleus(jnp.asarray(logits_BV), jnp.float32(top_p)))
    for logits_V, kept_V in zip(logits_BV, kept_BV):
        assert set(np.flatnonzero(kept_V)) == nucleus_by_loop(logits_V.astype(np.float64), top_p)


def test_top_p_of_one_keeps_every_token():
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(2, 30)), jnp.float32)
    np.testing.assert_array_equal(keep_nucleus(logits_BV, jnp.float32(1.0)), logits_BV)


def test_draws_follow_the_tempered_probabilities():
    num_draws, temperature = 20_000, 0.7
    logits_V = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    keys = jax.random.split(jax.random.key(0), num_draws)
    draws = sample(
        jnp.tile(logits_V, (num_draws, 1)), keys, temperature=jnp.float32(temperature), top_p=jnp.float32(1.0)
    )
    expected = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    frequencies = np.bincount(draws, minlength=4) / num_draws
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / num_draws))  # four standard deviations


def test_temperature_zero_takes_the_most_likely_token():
    logits_BV = jnp.asarray(np.random.default_rng(2).normal(size=(6, 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    chosen = sample(logits_BV, keys, temperature=jnp.float32(0), top_p=jnp.float32(0.9))
    np.testing.assert_array_equal(chosen, np.argmax(logits_BV, axis=-1))
