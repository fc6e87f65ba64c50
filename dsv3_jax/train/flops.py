"""Floating-point operations of training, by the usual count: what the network needs, not what recomputation adds."""

from dsv3_jax.config import ModelConfig


def train_flops_per_token(config: ModelConfig, *, sequence_length: int) -> float:
    """Returns FLOPs per trained token, forward and backward, MTP modules included.

    6 per weight that multiplies a token (2 forward, 4 backward), plus attention's two products over the causal half:
    6 · N · (X + U) · T/2 per layer. The embedding lookup, norms and softmax count nothing.
    """
    num_blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    attention = num_blocks * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length / 2
    return 6.0 * (active_matmul_params(config) + attention)


def active_matmul_params(config: ModelConfig) -> int:
    """Returns how many weights multiply each token in training: chosen experts only, head once per prediction depth."""
    hidden, mtp_depth = config.hidden_size, config.num_nextn_predict_layers
    blocks = config.num_hidden_layers + mtp_depth
    mtp_projections = mtp_depth * 2 * hidden * hidden
    heads = (1 + mtp_depth) * hidden * config.vocab_size
    dense = config.num_dense_layers * 3 * hidden * config.intermediate_size
    moe = (config.num_moe_layers + mtp_depth) * _active_moe_params(config)
    return blocks * _attention_params(config) + dense + moe + mtp_projections + heads


def _active_moe_params(config: ModelConfig) -> int:
    num_experts = config.num_experts_per_tok + config.n_shared_experts
    router = config.hidden_size * config.n_routed_experts
    return num_experts * 3 * config.hidden_size * config.moe_intermediate_size + router


def _attention_params(config: ModelConfig) -> int:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if config.q_lora_rank is None:
        query = hidden * heads * config.qk_head_dim
    else:
        query = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    keys_and_values = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + latent + keys_and_values + heads * config.v_head_dim * hidden
