"""One transformer block, and a stack of them scanned: the compiled program does not grow with depth."""

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import Attention
from dsv3_jax.model.layers import FeedForward, Normed
from dsv3_jax.model.moe import MoE, MoEStatistics
from dsv3_jax.model.params import declare, gather_layer
from dsv3_jax.sharding.collectives import scatter_tokens
from dsv3_jax.sharding.expert_exchange import ROUTES_NAME, ROWS_NAME

# What each policy keeps for the backward pass; None keeps everything. "report" recomputes what §3.2.3 and §3.3.3 do:
# RMSNorms, the up-projections of MLA and SwiGLU outputs. "full" keeps the blocks' inputs only.
SAVED_NAMES = {
    "none": None,
    "report": (
        "q_latent",
        "kv_latent",
        "attention_out",
        "attention_lse",
        "attention_projected",
        "gate_up",
        ROUTES_NAME,  # on a mesh: what came to the experts, which would travel once more otherwise
        ROWS_NAME,
    ),
    "full": (),
}


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    On a mesh the stream holds the tokens that this device owns: pieces of its sequences, or in `decode`, where every
    sequence has few new tokens, those of some sequences.
    """

    def __init__(self, config: ModelConfig, *, is_moe: bool):
        self.config = config
        self.is_moe = is_moe
        embed = ("embed", config.hidden_size)
        self.input_layernorm = declare(embed, init="ones")
        self.self_attn = Attention(config)
        self.post_attention_layernorm = declare(embed, init="ones")
        self.mlp = MoE(config) if is_moe else FeedForward(config.hidden_size, config.intermediate_size, ffn_axis="ffn")

    def __call__(
        self, x_BTD, cosines, sines, first_key_BT=None, is_live_BT=None
    ) -> tuple[jax.Array, jax.Array, MoEStatistics | None]:
        """Returns the block's output, the latents that a cache keeps, and the routing of a MoE block."""
        normed = self._norm(x_BTD, self.input_layernorm)
        with jax.named_scope("attention"):
            attended, cached_BTZ = self.self_attn(normed, cosines, sines, first_key_BT)
        y_BTD, statistics = self._feed_forward(x_BTD + attended, is_live_BT, token_dim=1)
        return y_BTD, cached_BTZ, statistics

    def decode(
        self, x_BTD, cosines, sines, cache_BSZ, lengths_B, is_live_BT
    ) -> tuple[jax.Array, jax.Array, MoEStatistics | None]:
        """Returns the output of new tokens, the cache with them in it, and the routing of a MoE block."""
        normed = self._norm(x_BTD, self.input_layernorm)
        with jax.named_scope("attention"):
            attended, cache_BSZ = self.self_attn.decode(normed, cosines, sines, cache_BSZ, lengths_B)
        y_BTD, statistics = self._feed_forward(x_BTD + attended, is_live_BT, token_dim=0)
        return y_BTD, cache_BSZ, statistics

    def _feed_forward(self, x_BTD, is_live_BT, token_dim: int) -> tuple[jax.Array, MoEStatistics | None]:
        normed = self._norm(x_BTD, self.post_attention_layernorm)
        if not self.is_moe:
            with jax.named_scope("feed_forward"):
                return x_BTD + scatter_tokens(self.mlp(normed.gather(token_dim)), token_dim), None
        y_BTD, statistics = self.mlp(normed, is_live_BT)
        return x_BTD + y_BTD, statistics

    def _norm(self, x_BTD, weight) -> Normed:
        return Normed(x_BTD, weight[...], self.config.rms_norm_eps)


def scan_blocks(blocks: Block, x_BTD, cosines, sines, first_key_BT) -> tuple[jax.Array, MoEStatistics | None]:
    """Runs a stack of blocks; returns the output and the routing of every layer, stacked."""
    graphdef, layers = nnx.split(blocks)

    def run_layer(x_BTD, layer):
        layer = gather_layer(layer)
        y_BTD, _, statistics = nnx.merge(graphdef, layer)(x_BTD, cosines, sines, first_key_BT)
        return y_BTD, statistics

    return jax.lax.scan(remat(run_layer, blocks.config.remat_policy), x_BTD, layers)


def scan_blocks_with_cache(
    blocks: Block, x_BTD, cosines, sines, is_live_BT
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Runs a stack of blocks.

    Returns:
      The output; what a cache keeps, [L, B, T, C + R]; of MoE blocks the live tokens of every expert, int32 [L, E].
    """
    graphdef, layers = nnx.split(blocks)

    def run_layer(x_BTD, layer):
        y_BTD, cached_BTZ, statistics = nnx.merge(graphdef, layer)(x_BTD, cosines, sines, None, is_live_BT)
        return y_BTD, (cached_BTZ, statistics and statistics.tokens_per_expert_E)

    y_BTD, (cached_LBTZ, tokens_per_expert_LE) = jax.lax.scan(run_layer, x_BTD, layers)
    return y_BTD, cached_LBTZ, tokens_per_expert_LE


def remat(layer_function, policy: str):
    """Wraps a layer so that its backward pass keeps only what the named policy keeps."""
    names = SAVED_NAMES[policy]
    if names is None:
        return layer_function
    is_saved = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(layer_function, policy=is_saved, prevent_cse=False)
