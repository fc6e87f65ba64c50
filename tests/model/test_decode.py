"""Prefill and absorbed decoding against the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import model
from dsv3_jax.config import RopeScaling
from dsv3_jax.model import rope
from dsv3_jax.model.attention import Attention
from dsv3_jax.testing.networks import QUICK_COMPILE, random_tokens, small_config, telling_params
from dsv3_jax.testing.tolerances import FLOAT32_VALUES, assert_close

LENGTH = 12


def _all_logits(config, params, tokens_BT):
    return model.logits(config, params, model.forward(config, params, tokens_BT).h_BTD)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16)},
        {"q_lora_rank": None, "first_k_dense_replace": 3},
        {"first_k_dense_replace": 0},
    ],
    ids=["yarn", "dense, queries not compressed", "experts only"],
)
def test_prefill_and_decode_continue_the_full_forward_at_every_position(changes):
    """Rows with prompts of 1, 4 and 7 tokens; each step's logits are those of the whole sequence, row by row.

    The padding of the prompts holds other tokens, and the cache starts with garbage: neither may be seen.
    """
    config = small_config(**changes)
    params, tokens_BT = telling_params(config, 0), random_tokens(config, 1, 3, LENGTH)
    lengths_B = np.array([1, 4, 7])
    prompts = random_tokens(config, 2, 3, 7)
    for row, length in enumerate(lengths_B):
        prompts[row, :length] = tokens_BT[row, :length]
    jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    expected = jit(functools.partial(_all_logits, config))(params, tokens_BT)
    empty = model.init_cache(config, 3, LENGTH)
    dirty = jax.tree.map(lambda leaf: leaf + 50 if leaf.ndim > 1 else leaf, empty)
    width = config.kv_lora_rank + config.qk_rope_head_dim  # all that a token leaves behind in a layer
    assert sum(leaf.size for leaf in jax.tree.leaves(empty.latents)) == config.num_hidden_layers * 3 * LENGTH * width
    logits_BV, cache, _ = jit(functools.partial(model.prefill, config))(params, prompts, jnp.asarray(lengths_B), dirty)
    decode_step, split_params = jit(functools.partial(model.decode_step, config)), model.split_layers(params)
    rows = np.arange(3)
    for step in range(LENGTH - lengths_B.max() + 1):
        np.testing.assert_array_equal(cache.lengths_B, lengths_B + step)
        assert_close(logits_BV, expected[rows, lengths_B + step - 1], FLOAT32_VALUES, f"step {step}")
        if step < LENGTH - lengths_B.max():
            logits_BV, cache, _ = decode_step(split_params, tokens_BT[rows, lengths_B + step], cache)


def test_loads_are_those_of_live_tokens():
    """What `forward` counts for every row's real tokens: padding and rows without a sequence count for nothing."""
    config = small_config(num_nextn_predict_layers=0)
    params, tokens_BT = telling_params(config, 0), random_tokens(config, 1, 2, 5)
    lengths_B, next_B = np.array([5, 2]), np.array([-1, 3])
    jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    forward = jit(functools.partial(model.forward, config))

    def count(rows: list[np.ndarray]) -> np.ndarray:
        return sum(np.asarray(forward(params, row[None]).tokens_per_expert["moe_layers"]) for row in rows)

    prompts = [row[:length] for row, length in zip(tokens_BT, lengths_B, strict=True)]
    cache = model.init_cache(config, 2, 6)
    _, cache, prefill_LE = jit(functools.partial(model.prefill, config))(params, tokens_BT, lengths_B, cache)
    _, _, decode_LE = jit(functools.partial(model.decode_step, config))(params, next_B, cache)
    assert prefill_LE.dtype == decode_LE.dtype == jnp.int32
    np.testing.assert_array_equal(prefill_LE, count(prompts))
    np.testing.assert_array_equal(decode_LE, count([np.append(prompts[1], 3)]) - count(prompts[1:]))


def test_absorbed_attention_equals_expanded_attention_for_many_new_tokens():
    """Attention.decode of all tokens at once from an empty cache is Attention itself."""
    config = small_config()
    weights = jax.tree.map(lambda leaf: leaf[0], telling_params(config, 0)["dense_layers"]["self_attn"])
    attention = nnx.merge(nnx.split(Attention(config))[0], nnx.State(weights))
    x_BTD = np.random.default_rng(1).normal(size=(2, 9, config.hidden_size)).astype(np.float32)
    cosines, sines = rope.rotation(config, jnp.arange(9))
    expanded, latents = jax.jit(lambda x_BTD: attention(x_BTD, cosines, sines))(x_BTD)
    cache = jnp.zeros((2, 11, config.kv_lora_rank + config.qk_rope_head_dim))
    lengths_B = jnp.zeros(2, jnp.int32)
    decode = jax.jit(lambda x_BTD: attention.decode(x_BTD, cosines[None], sines[None], cache, lengths_B))
    absorbed, cache = decode(x_BTD)
    assert_close(absorbed, expanded, FLOAT32_VALUES)
    assert_close(cache[:, :9], latents, FLOAT32_VALUES)


def test_an_empty_cache_can_be_donated():
    """No two layers share a buffer."""
    cache = model.init_cache(small_config(), 2, 4)
    continued = jax.jit(lambda cache: jax.tree.map(lambda leaf: leaf + 1, cache), donate_argnums=0)(cache)
    np.testing.assert_array_equal(continued.lengths_B, 1)


def test_a_row_does_not_see_the_others_nor_the_future():
    """Changing the last token of one row changes nothing before it and nothing in other rows."""
    config = small_config()
    params, tokens_BT = telling_params(config, 0), random_tokens(config, 1, 2, 6)
    logits = jax.jit(functools.partial(_all_logits, config), compiler_options=QUICK_COMPILE)
    changed = tokens_BT.copy()
    changed[1, -1] = (changed[1, -1] + 1) % config.vocab_size
    before, after = logits(params, tokens_BT), logits(params, changed)
    assert_close(after[0], before[0], 1e-6)
    assert_close(after[1, :-1], before[1, :-1], 1e-6)
    assert np.abs(after[1, -1] - before[1, -1]).max() > 0.1
