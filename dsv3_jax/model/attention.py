"""Multi-head latent attention (§2.1.1): keys and values come from one compressed latent per token.

Training expands the latent to per-head keys and values. Decoding never does: W_uk is absorbed into the query and W_uv
into the output, so attention runs on the cached latents themselves.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.attention import causal_attention
from dsv3_jax.model import rope
from dsv3_jax.model.layers import exact_if_float32, linear, rms_norm
from dsv3_jax.model.params import declare
from dsv3_jax.sharding.rules import map_sequences

LATENT_EPS = 1e-6  # the official code leaves the latent norms at this, whatever rms_norm_eps says


class Attention(nnx.Module):
    """MLA with or without query compression."""

    def __init__(self, config: ModelConfig):
        self.config = config
        embed, heads = ("embed", config.hidden_size), ("heads", config.num_attention_heads)
        query = (None, config.qk_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = declare(embed, heads, query)
        else:
            q_latent = ("q_latent", config.q_lora_rank)
            self.q_a_proj = declare(embed, q_latent)
            self.q_a_layernorm = declare(q_latent, init="ones")
            self.q_b_proj = declare(q_latent, heads, query)
        kv_latent = ("kv_latent", config.kv_lora_rank)
        self.kv_a_proj_with_mqa = declare(embed, (None, config.kv_lora_rank + config.qk_rope_head_dim))
        self.kv_a_layernorm = declare(kv_latent, init="ones")
        self.kv_b_proj = declare(kv_latent, heads, (None, config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = declare(heads, (None, config.v_head_dim), embed)

    def __call__(self, x_BTD: jax.Array, cosines: jax.Array, sines: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Attends causally over the whole sequence.

        Args:
          x_BTD: normed input.
          cosines, sines: rotation of every position, [T, R/2].

        Returns:
          The output [B, T, D], and what a cache keeps of every token: the latent and its rope key, [B, T, C + R].
        """
        q_nope, q_rope = self._queries(x_BTD, cosines, sines)
        cached_BTZ = self._latents(x_BTD, cosines, sines)
        latent_BTC, k_rope_BTR = self._split_cached(cached_BTZ)
        expanded = linear(latent_BTC, self.kv_b_proj[...])
        k_nope, v_BTNU = jnp.split(expanded, [self.config.qk_nope_head_dim], axis=-1)
        k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*k_nope.shape[:-1], k_rope_BTR.shape[-1]))
        q_BTNX = jnp.concatenate([q_nope, q_rope], axis=-1)
        k_BTNX = jnp.concatenate([k_nope, k_rope_BTNR], axis=-1)
        attend = functools.partial(causal_attention, scale=rope.softmax_scale(self.config))
        out_BTNU = map_sequences(attend, (q_BTNX, k_BTNX, v_BTNU))
        return self._project_out(out_BTNU), cached_BTZ

    def decode(self, x_BTD, cosines, sines, cache_BSZ, lengths_B) -> tuple[jax.Array, jax.Array]:
        """Attends from new tokens to the cache, with the up-projections absorbed (§2.1.1; DeepSeek-V2 §2.1.2).

        Args:
          x_BTD: normed input of T new tokens per row.
          cosines, sines: rotation of the new tokens' positions, [B, T, R/2].
          cache_BSZ: latents and rope keys of earlier tokens, Z = C + R.
          lengths_B: how many of the cache's tokens are real; new tokens are written from there on.

        Returns:
          The output [B, T, D] and the cache with the new tokens in it.
        """
        num_new = x_BTD.shape[1]
        q_nope, q_rope = self._queries(x_BTD, cosines, sines)
        new_BTZ = self._latents(x_BTD, cosines, sines).astype(cache_BSZ.dtype)
        positions_BT = lengths_B[:, None] + jnp.arange(num_new)
        cache_BSZ = cache_BSZ.at[jnp.arange(len(lengths_B))[:, None], positions_BT].set(new_BTZ, mode="drop")
        return self._attend_absorbed(q_nope, q_rope, cache_BSZ, positions_BT), cache_BSZ

    def _attend_absorbed(self, q_nope, q_rope, cache_BSZ, positions_BT) -> jax.Array:
        precision = exact_if_float32(q_nope.dtype)
        k_up_CNH, v_up_CNU = jnp.split(self.kv_b_proj[...].astype(q_nope.dtype), [self.config.qk_nope_head_dim], -1)
        q_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_nope, k_up_CNH, precision=precision)
        q_BTNZ = jnp.concatenate([q_BTNC, q_rope], axis=-1)
        cache_BSZ = cache_BSZ.astype(q_nope.dtype)
        scores_BTNS = rope.softmax_scale(self.config) * jnp.einsum(
            "BTNZ,BSZ->BTNS", q_BTNZ, cache_BSZ, precision=precision, preferred_element_type=jnp.float32
        )
        is_visible_BTS = jnp.arange(cache_BSZ.shape[1]) <= positions_BT[..., None]
        weights_BTNS = jax.nn.softmax(jnp.where(is_visible_BTS[:, :, None], scores_BTNS, -jnp.inf), axis=-1)
        latent_BSC = cache_BSZ[..., : self.config.kv_lora_rank]
        out_BTNC = jnp.einsum("BTNS,BSC->BTNC", weights_BTNS.astype(latent_BSC.dtype), latent_BSC, precision=precision)
        return self._project_out(jnp.einsum("BTNC,CNU->BTNU", out_BTNC, v_up_CNU, precision=precision))

    def _queries(self, x_BTD, cosines, sines) -> tuple[jax.Array, jax.Array]:
        """Returns the position-free part [B, T, N, H] and the rotated part [B, T, N, R] of the queries."""
        if self.config.q_lora_rank is None:
            q_BTNX = linear(x_BTD, self.q_proj[...])
        else:
            q_latent = checkpoint_name(linear(x_BTD, self.q_a_proj[...]), "q_latent")
            q_BTNX = linear(rms_norm(q_latent, self.q_a_layernorm[...], LATENT_EPS), self.q_b_proj[...])
        q_nope, q_rope = jnp.split(q_BTNX, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, rope.rotate(q_rope, cosines[..., None, :], sines[..., None, :])

    def _latents(self, x_BTD, cosines, sines) -> jax.Array:
        """Returns the normed latent and the rotated rope key of every token, [B, T, C + R]."""
        kv_BTZ = checkpoint_name(linear(x_BTD, self.kv_a_proj_with_mqa[...]), "kv_latent")
        latent_BTC, k_rope_BTR = self._split_cached(kv_BTZ)
        latent_BTC = rms_norm(latent_BTC, self.kv_a_layernorm[...], LATENT_EPS)
        return jnp.concatenate([latent_BTC, rope.rotate(k_rope_BTR, cosines, sines)], axis=-1)

    def _split_cached(self, kv_BTZ) -> tuple[jax.Array, jax.Array]:
        return tuple(jnp.split(kv_BTZ, [self.config.kv_lora_rank], axis=-1))

    def _project_out(self, out_BTNU) -> jax.Array:
        return checkpoint_name(linear(out_BTNU, self.o_proj[...], 2), "attention_projected")
