"""Generation: one jitted program reads the prompts into a latent cache and continues them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.model import decode_step, init_cache, prefill, prepare_params, split_layers
from dsv3_jax.serve.sampling import sample

SMALLEST_BUCKET = 32  # prompts and outputs are padded to powers of two from here on: few programs serve all lengths


def generate_tokens(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    num_token_ids: int,
) -> list[list[int]]:
    """Continues token prompts of any lengths.

    A row ends after its first end-of-document token, which is kept. What a row becomes depends on its prompt, its index
    and the seed, not on the other rows' contents.

    Args:
      prompts: one or more token ids each.
      max_new_tokens: most tokens added to a prompt.
      temperature: 0 takes the most likely token; larger values flatten the distribution.
      top_p: tokens outside the smallest set with this probability are never drawn.
      num_token_ids: ids from here on have an embedding but no meaning and are never chosen.

    Returns:
      The added tokens of every prompt.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, a setting out of range, or more tokens than positions.
    """
    _require_valid(config, prompts, max_new_tokens, temperature, top_p, num_token_ids)
    if not prompts or not max_new_tokens:
        return [[] for _ in prompts]
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    prompt_bucket = _bucket(lengths_B.max(), config.max_position_embeddings)
    tokens_BT = np.full((len(prompts), prompt_bucket), config.eos_token_id, np.int32)
    for row, prompt in zip(tokens_BT, prompts):
        row[: len(prompt)] = prompt
    generated = _generate(
        config, params, tokens_BT, lengths_B, max_new_tokens, jnp.float32(temperature), jnp.float32(top_p),
        jax.random.key(seed), num_token_ids, new_bucket=_bucket(max_new_tokens, config.max_position_embeddings),
    )  # fmt: skip
    return [row[:num_new].tolist() for row, num_new in zip(*jax.device_get(generated))]


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("new_bucket",))
def _generate(
    config, params, tokens_BT, lengths_B, max_new_tokens, temperature, top_p, key, num_token_ids, *, new_bucket
):  # fmt: skip
    """Returns the new tokens [B, new_bucket] and how many of each row count."""
    params = prepare_params(config, params)
    batch_size, prompt_bucket = tokens_BT.shape
    cache_length = min(prompt_bucket + new_bucket, config.max_position_embeddings)
    logits_BV, cache, _ = prefill(config, params, tokens_BT, lengths_B, init_cache(config, batch_size, cache_length))
    decode_params = split_layers(params)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch_size))
    is_real_V = jnp.arange(config.vocab_size) < num_token_ids

    def choose(logits_BV, step):
        step_keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(row_keys)
        return sample(jnp.where(is_real_V, logits_BV, -jnp.inf), step_keys, temperature=temperature, top_p=top_p)

    def is_unfinished(state):
        step, _, _, _, is_done_B, _ = state
        return (step < max_new_tokens) & ~is_done_B.all()

    def add_token(state):
        step, logits_BV, new_tokens_BT, num_new_B, is_done_B, cache = state
        token_B = choose(logits_BV, step)
        new_tokens_BT = new_tokens_BT.at[:, step].set(token_B)
        num_new_B = num_new_B + ~is_done_B
        is_done_B = is_done_B | (token_B == config.eos_token_id)
        logits_BV, cache, _ = decode_step(config, decode_params, token_B, cache)
        return step + 1, logits_BV, new_tokens_BT, num_new_B, is_done_B, cache

    new_tokens_BT = jnp.zeros((batch_size, new_bucket), jnp.int32)
    num_new_B = jnp.zeros(batch_size, jnp.int32)
    state = (0, logits_BV, new_tokens_BT, num_new_B, jnp.zeros(batch_size, bool), cache)
    state = jax.lax.while_loop(is_unfinished, add_token, state)
    return state[2], state[3]


def _bucket(length: int, limit: int) -> int:
    """Returns the next power of two that holds the length, at most the limit."""
    return min(max(SMALLEST_BUCKET, 1 << (int(length) - 1).bit_length()), int(limit))


def _require_valid(config, prompts, max_new_tokens, temperature, top_p, num_token_ids) -> None:
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "must not be negative")
    require(temperature >= 0, "temperature", temperature, "must not be negative; 0 takes the most likely token")
    require(0 < top_p <= 1, "top_p", top_p, "must lie in (0, 1]")
    for index, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompts[{index}]", prompt, "is empty; give at least one token, such as bos")
        total = len(prompt) + max_new_tokens
        require(total <= config.max_position_embeddings, f"prompts[{index}]", f"{len(prompt)} tokens",
                f"with max_new_tokens={max_new_tokens} exceeds model.max_position_embeddings="
                f"{config.max_position_embeddings}; shorten either")  # fmt: skip
        for token in prompt:
            require(0 <= token < num_token_ids, f"prompts[{index}]", token, f"is no token id below {num_token_ids}")
