"""The mixture of experts (§2.1.2): routed experts, wherever they live, beside shared ones; no token is dropped."""

import typing
from collections.abc import Callable

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8 import experts as fp8_experts
from dsv3_jax.fp8.feed_forward import FeedForwardWeights, feed_forward
from dsv3_jax.fp8.linear import pad_rows
from dsv3_jax.kernels.block_quantize import quantize_rows
from dsv3_jax.model import experts
from dsv3_jax.model.layers import FeedForward, Normed
from dsv3_jax.model.params import declare
from dsv3_jax.model.router import balance_loss, route, tokens_per_expert
from dsv3_jax.model.weights import Linear, as_rounded, is_fp8
from dsv3_jax.sharding.collectives import size
from dsv3_jax.sharding.expert_exchange import Capacity, ExpertFunctions, plan_capacity, serve
from dsv3_jax.sharding.expert_placement import choose_slots
from dsv3_jax.sharding.mesh import EXPERT_AXES, INNER_AXES

EXPERTS = ExpertFunctions(experts.forward, experts.encode_gradient, experts.backward)
FP8_EXPERTS = ExpertFunctions(fp8_experts.forward, fp8_experts.encode_gradient, fp8_experts.backward)


class MoEStatistics(typing.NamedTuple):
    """What training needs to know of one layer's routing."""

    tokens_per_expert_E: jax.Array  # int32, over the live tokens of this device
    balance_loss: jax.Array  # float32 scalar, without alpha
    further_rounds: jax.Array  # int32 scalar, of the expert exchange beyond its first; on one device 0


class MoE(nnx.Module):
    """Routed experts beside shared ones. On a mesh it serves the tokens of one device with the experts of all."""

    def __init__(self, config: ModelConfig):
        self.config = config
        scored = ("router_outputs", config.n_routed_experts)  # on every device, unlike the experts themselves
        self.gate = declare(("embed", config.hidden_size), scored)
        self.e_score_correction_bias = declare(scored, init="zeros")
        self.experts = Experts(config)
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = FeedForward(config.hidden_size, width, ffn_axis="shared_ffn")

    def __call__(
        self, x_BTD: jax.Array | Normed, is_live_BT: jax.Array | None = None
    ) -> tuple[jax.Array, MoEStatistics]:
        """Maps [B, T, D] to [B, T, D] and reports the routing; counts of experts are those of live tokens."""
        x_BTD = x_BTD.value() if isinstance(x_BTD, Normed) else x_BTD
        routing = route(
            self.config, self.gate[...], self.e_score_correction_bias[...], x_BTD.reshape(-1, x_BTD.shape[-1])
        )
        y_BTD, further_rounds = self._run_experts(x_BTD, routing.experts_TK, routing.weights_TK)
        statistics = MoEStatistics(
            tokens_per_expert(
                routing.experts_TK, self.config.n_routed_experts, None if is_live_BT is None else is_live_BT.reshape(-1)
            ),
            balance_loss(self.config, routing.scores_TE.reshape(*x_BTD.shape[:2], -1)),
            further_rounds,
        )
        return y_BTD, statistics

    def _run_experts(self, x_BTD, experts_TK, weights_TK) -> tuple[jax.Array, jax.Array]:
        x_TD, has_shared = x_BTD.reshape(-1, x_BTD.shape[-1]), self.config.n_shared_experts > 0
        routing, capacity = (experts_TK, weights_TK), exchange_capacity(self.config, len(x_TD), size)
        if self.config.n_redundant_experts:
            first_token = jax.lax.axis_index(EXPERT_AXES) if capacity else 0
            routing = choose_slots(self.experts.slots_of_expert[...], experts_TK, first_token), weights_TK
        routed = self.experts.gate_up_proj[...], self.experts.down_proj[...]
        if not is_fp8(routed[0]):
            weights = experts.ExpertWeights(*map(as_rounded, routed))
            y_TD, further_rounds = serve(EXPERTS, x_TD, x_TD, *routing, weights, capacity=capacity)
            y_BTD = y_TD.reshape(x_BTD.shape)
            if has_shared:
                with jax.named_scope("shared_experts"):
                    y_BTD += self.shared_experts(x_BTD)
            return y_BTD, further_rounds
        # Quantized once for all that read it; routed experts keep it in E4M3 whatever model.fp8_input_cache says.
        quantized = quantize_rows(pad_rows(jax.lax.stop_gradient(x_TD)))
        payload = fp8_experts.pack(quantized, x_TD)
        weights = FeedForwardWeights(*routed)
        y_TD, further_rounds = serve(FP8_EXPERTS, x_TD, payload, *routing, weights, capacity=capacity)
        if has_shared:
            with jax.named_scope("shared_experts"):
                y_TD += feed_forward(x_TD, self.shared_experts.weights(), quantized=quantized)
        return y_TD.reshape(x_BTD.shape), further_rounds


class Experts(nnx.Module):
    """The weights of the routed experts' SwiGLU feed-forwards, of this device's experts on a mesh.

    With redundant experts those of slots, and the slots of every expert, see `sharding.expert_placement`.
    """

    def __init__(self, config: ModelConfig):
        num_slots = config.n_routed_experts + config.n_redundant_experts
        routed, ffn = ("routed_experts", num_slots), ("expert_ffn", config.moe_intermediate_size)
        embed = ("embed", config.hidden_size)
        self.gate_up_proj = declare(routed, embed, (None, 2), ffn, linear=Linear(batch_dims=1))
        after_swiglu = Linear(batch_dims=1, cache_setting="fp8_swiglu_cache")
        self.down_proj = declare(routed, ffn, embed, linear=after_swiglu)
        if config.n_redundant_experts:
            scored = ("router_outputs", config.n_routed_experts)
            self.slots_of_expert = declare(scored, (None, 1 + config.n_redundant_experts), init="zeros")


def exchange_capacity(config: ModelConfig, num_tokens: int, size_of: Callable) -> Capacity | None:
    """Returns the room of the expert exchange for the tokens of one device; None where every expert is here.

    Args:
      size_of: mesh axes -> over how many devices they spread.
    """
    return plan_capacity(
        num_tokens=num_tokens,
        top_k=config.num_experts_per_tok,
        num_experts=config.n_routed_experts + config.n_redundant_experts,
        n_group=config.n_group,
        topk_group=config.topk_group,
        num_nodes=size_of("node"),
        devices_per_node=size_of(INNER_AXES),
        factor=config.exchange_capacity,
    )
