"""Multi-head latent attention (§2.1.1): keys and values come from one compressed latent per token.

Training expands the latent to per-head keys and values. Decoding never does: W_uk is absorbed into the query and W_uv
into the output, so attention runs on the cached latents themselves.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.attention import attention_and_projection
from dsv3_jax.kernels.attention import causal_attention
from dsv3_jax.model import rope
from dsv3_jax.model.layers import Normed, exact_if_float32, linear, linears
from dsv3_jax.model.params import declare
from dsv3_jax.model.weights import Linear, as_array, is_fp8
from dsv3_jax.sharding.collectives import gather_tokens, scatter_tokens

LATENT_EPS = 1e-6  # the official code leaves the latent norms at this, whatever rms_norm_eps says


class Attention(nnx.Module):
    """MLA with or without query compression.

    On a mesh every device of the tensor axis has some of the heads. It compresses its own tokens, attends over all
    tokens of its sequences with its own heads, and keeps its own tokens' sums over all heads.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        embed, heads = ("embed", config.hidden_size), ("heads", config.num_attention_heads)
        query = (None, config.qk_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = declare(embed, heads, query, linear=Linear())
        else:
            q_latent = ("q_latent", config.q_lora_rank)
            self.q_a_proj = declare(embed, q_latent, linear=Linear())
            self.q_a_layernorm = declare(q_latent, init="ones")
            self.q_b_proj = declare(q_latent, heads, query, linear=Linear())
        kv_latent = ("kv_latent", config.kv_lora_rank)
        latent_and_key = (None, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_proj_with_mqa = declare(embed, latent_and_key, linear=Linear())
        self.kv_a_layernorm = declare(kv_latent, init="ones")
        key_and_value = (None, config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = declare(kv_latent, heads, key_and_value, linear=Linear())
        after_attention = Linear(contracted_dims=2, cache_setting="fp8_attention_cache")
        self.o_proj = declare(heads, (None, config.v_head_dim), embed, linear=after_attention)

    def __call__(
        self, x_BTD: Normed, cosines: jax.Array, sines: jax.Array, first_key_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Attends causally over the whole sequence, or over the documents packed into it.

        Args:
          x_BTD: input of the tokens this device owns, to be normalised.
          cosines, sines: rotation of every position, [T, R/2] or [B, T, R/2].
          first_key_BT: int32 index where the document of every token begins; None: all tokens are one document.

        Returns:
          The output of the tokens this device owns, and what a cache keeps of every token: the latent and its rope
          key, [B, T, C + R].
        """
        query, kv_BTZ = self._project_down(x_BTD, token_dim=1)
        q_BTNX = self._queries(query, cosines, sines)
        latent_BTC, k_rope_BTR = self._latents(kv_BTZ, cosines, sines)
        kv_BTNY = linear(latent_BTC, self.kv_b_proj[...])  # of every head the key without position, then the value
        out_BTD = scatter_tokens(self._attend_and_project(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT), 1)
        out_BTD = checkpoint_name(out_BTD, "attention_projected")
        return out_BTD, jnp.concatenate([latent_BTC.value(), k_rope_BTR], axis=-1)

    def decode(self, x_BTD, cosines, sines, cache_BSZ, lengths_B) -> tuple[jax.Array, jax.Array]:
        """Attends from new tokens to the cache, with the up-projections absorbed (§2.1.1; DeepSeek-V2 §2.1.2).

        Args:
          x_BTD: input of T new tokens per row, of the rows this device owns, to be normalised.
          cosines, sines: rotation of the new tokens' positions, [B, T, R/2].
          cache_BSZ: latents and rope keys of earlier tokens, Z = C + R.
          lengths_B: how many of the cache's tokens are real; new tokens are written from there on.

        Returns:
          The output of the rows this device owns and the cache with the new tokens in it.
        """
        query, kv_BTZ = self._project_down(x_BTD, token_dim=0)
        q_BTNX = self._queries(query, cosines, sines)
        q_nope, q_rope = jnp.split(q_BTNX, [self.config.qk_nope_head_dim], axis=-1)
        latent_BTC, k_rope_BTR = self._latents(kv_BTZ, cosines, sines)
        new_BTZ = jnp.concatenate([latent_BTC.value(), k_rope_BTR], axis=-1).astype(cache_BSZ.dtype)
        positions_BT = lengths_B[:, None] + jnp.arange(kv_BTZ.shape[1])
        cache_BSZ = cache_BSZ.at[jnp.arange(len(lengths_B))[:, None], positions_BT].set(new_BTZ, mode="drop")
        return scatter_tokens(self._attend_absorbed(q_nope, q_rope, cache_BSZ, positions_BT), 0), cache_BSZ

    def _attend_absorbed(self, q_nope, q_rope, cache_BSZ, positions_BT) -> jax.Array:
        precision = exact_if_float32(q_nope.dtype)
        up_weight = as_array(self.kv_b_proj[...], (self.config.kv_lora_rank,), q_nope.dtype)
        k_up_CNH, v_up_CNU = jnp.split(up_weight, [self.config.qk_nope_head_dim], -1)
        q_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_nope, k_up_CNH, precision=precision)
        q_BTNZ = jnp.concatenate([q_BTNC, q_rope], axis=-1)
        cache_BSZ = cache_BSZ.astype(q_nope.dtype)
        scores_BTNS = rope.softmax_scale(self.config) * jnp.einsum(
            "BTNZ,BSZ->BTNS", q_BTNZ, cache_BSZ, precision=precision, preferred_element_type=jnp.float32
        )
        is_visible_BTS = jnp.arange(cache_BSZ.shape[1]) <= positions_BT[..., None]
        weights_BTNS = jax.nn.softmax(jnp.where(is_visible_BTS[:, :, None], scores_BTNS, -jnp.inf), axis=-1)
        # Of the whole cache, rope keys too: a copy of its latents alone would cost three times the reading.
        out_BTNZ = jnp.einsum("BTNS,BSZ->BTNZ", weights_BTNS.astype(cache_BSZ.dtype), cache_BSZ, precision=precision)
        out_BTNC = out_BTNZ[..., : self.config.kv_lora_rank]
        out_BTNU = jnp.einsum("BTNC,CNU->BTNU", out_BTNC, v_up_CNU, precision=precision)
        return linear(out_BTNU, self.o_proj[...], 2)

    def _project_down(self, x_BTD: Normed, token_dim: int) -> tuple[jax.Array, jax.Array]:
        """Returns the query latent, without compression the queries, and key-value latent beside rope key.

        They are those of all tokens. Compressed, the latents travel; otherwise the wider inputs have to.
        """
        if self.config.q_lora_rank is None:
            query, kv_BTZ = linears(x_BTD.gather(token_dim), (self.q_proj[...], self.kv_a_proj_with_mqa[...]))
            return query, checkpoint_name(kv_BTZ, "kv_latent")
        query, kv_BTZ = linears(x_BTD, (self.q_a_proj[...], self.kv_a_proj_with_mqa[...]))
        query, kv_BTZ = checkpoint_name(query, "q_latent"), checkpoint_name(kv_BTZ, "kv_latent")
        return gather_tokens(query, token_dim), gather_tokens(kv_BTZ, token_dim)

    def _queries(self, query, cosines, sines) -> jax.Array:
        """Returns the queries, [B, T, N, X]: the position-free part, then the rotated one."""
        if self.config.q_lora_rank is not None:
            query = linear(Normed(query, self.q_a_layernorm[...], LATENT_EPS), self.q_b_proj[...])
        return rope.rotate_last(query, cosines[..., None, :], sines[..., None, :])

    def _latents(self, kv_BTZ, cosines, sines) -> tuple[Normed, jax.Array]:
        """Returns the latent [B, T, C], to be normalised, and the rotated rope key [B, T, R] of every token."""
        latent_BTC, k_rope_BTR = jnp.split(kv_BTZ, [self.config.kv_lora_rank], axis=-1)
        return Normed(latent_BTC, self.kv_a_layernorm[...], LATENT_EPS), rope.rotate(k_rope_BTR, cosines, sines)

    def _attend_and_project(self, *operands: jax.Array | None) -> jax.Array:
        scale = rope.softmax_scale(self.config)
        if not is_fp8(self.o_proj[...]):
            return linear(causal_attention(*operands, scale=scale), self.o_proj[...], 2)
        return attention_and_projection(*operands, self.o_proj[...], scale=scale)
