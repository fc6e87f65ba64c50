"""The network that FP8 is tested on: every kind of linear, expert widths that an FP8 export allows."""

import dataclasses

from dsv3_jax.config import ModelConfig


def fp8_config(**changes) -> ModelConfig:
    """Returns 1 dense and 1 MoE layer with query compression and a shared expert; no two widths are the same."""
    config = ModelConfig(
        vocab_size=61, hidden_size=96, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_nextn_predict_layers=0, num_attention_heads=3, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=48,
        q_lora_rank=80, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=16, n_group=2, topk_group=2,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64, precision="fp8",
        remat_policy="report",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)
