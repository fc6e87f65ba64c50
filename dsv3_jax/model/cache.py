"""What decoding keeps of earlier tokens: one latent and one rope key each, shared by all heads (§2.1.1)."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.model.params import compute_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The latents of every layer, and how many tokens of each row are real."""

    latents: tuple[jax.Array, ...]  # one [B, S, C + R] per layer
    lengths_B: jax.Array  # int32


def init_cache(config: ModelConfig, batch_size: int, max_length: int) -> Cache:
    """Returns an empty cache with room for max_length tokens per row, in the compute dtype.

    Raises:
      ValueError: more tokens than max_position_embeddings.
    """
    require(max_length <= config.max_position_embeddings, "cache length", max_length,
            f"exceeds model.max_position_embeddings={config.max_position_embeddings}")  # fmt: skip
    width = config.kv_lora_rank + config.qk_rope_head_dim
    shape, dtype = (batch_size, max_length, width), compute_dtype(config)
    latents = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))  # own buffers: may be donated
    return Cache(latents, jnp.zeros(batch_size, jnp.int32))
