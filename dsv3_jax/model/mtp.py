"""Multi-token prediction (§2.2): modules that each look one token further, sharing embedding and head."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block, remat
from dsv3_jax.model.layers import linear, rms_norm
from dsv3_jax.model.moe import MoEStatistics
from dsv3_jax.model.params import declare, gather_layer
from dsv3_jax.model.weights import Linear
from dsv3_jax.sharding.collectives import roll_sequence


class MTPModule(nnx.Module):
    """Combines the hidden state with the next token's embedding, then one MoE block and a norm."""

    def __init__(self, config: ModelConfig):
        self.config = config
        embed = ("embed", config.hidden_size)
        self.enorm = declare(embed, init="ones")
        self.hnorm = declare(embed, init="ones")
        self.eh_proj = declare((None, 2 * config.hidden_size), embed, linear=Linear())
        self.block = Block(config, is_moe=True)
        self.norm = declare(embed, init="ones")

    def __call__(
        self, h_BTD, embedded_BTD, cosines, sines, first_key_BT=None
    ) -> tuple[jax.Array, jax.Array, MoEStatistics]:
        """Returns the normed hidden state, the latents that a cache keeps, and the routing (eqs. 21-22).

        The published weights take the embedding half first, where the report writes the hidden state first.
        """
        eps = self.config.rms_norm_eps
        halves = [rms_norm(embedded_BTD, self.enorm[...], eps), rms_norm(h_BTD, self.hnorm[...], eps)]
        x_BTD = linear(jnp.concatenate(halves, axis=-1), self.eh_proj[...])
        y_BTD, cached_BTZ, statistics = self.block(x_BTD, cosines, sines, first_key_BT)
        return rms_norm(y_BTD, self.norm[...], eps), cached_BTZ, statistics


def scan_modules(
    modules: MTPModule, h_BTD, next_embedded_BTD, cosines, sines, first_key_BT
) -> tuple[jax.Array, MoEStatistics]:
    """Chains the modules of every depth.

    Args:
      h_BTD: the main model's output after its final norm.
      next_embedded_BTD: embedding of token i+1 at position i; deeper modules see it shifted further, and their last
        positions, where no token follows, see the first ones: the loss leaves these out.
      first_key_BT: where the document of every position begins, or None. A document's last positions see tokens of the
        next one, and no earlier position sees them: the loss leaves these out as well.

    Returns:
      The normed hidden states of every depth, [depth, B, T, D], and the routing of every depth, stacked.
    """
    graphdef, layers = nnx.split(modules)

    def run_module(carry, layer):
        h_BTD, embedded_BTD = carry
        layer = gather_layer(layer)
        h_BTD, _, statistics = nnx.merge(graphdef, layer)(h_BTD, embedded_BTD, cosines, sines, first_key_BT)
        with jax.named_scope("mtp"):
            embedded_BTD = roll_sequence(embedded_BTD)
        return (h_BTD, embedded_BTD), (h_BTD, statistics)

    run_module = remat(run_module, modules.config.remat_policy)
    return jax.lax.scan(run_module, (h_BTD, next_embedded_BTD), layers)[1]
