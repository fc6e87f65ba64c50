import pytest

from dsv3_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig


@pytest.fixture(scope="session")
def micro() -> RunConfig:
    """One dense and one MoE layer, one MTP module, float32: everything that training touches, compiled in seconds."""
    model = ModelConfig(
        vocab_size=61, hidden_size=24, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=8, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, n_group=4, topk_group=2, num_experts_per_tok=2, first_k_dense_replace=1,
        max_position_embeddings=64, precision="fp32",
    )  # fmt: skip
    train = TrainConfig(
        batch_size=4, batch_size_start=4, batch_ramp_tokens=0, warmup_steps=2, learning_rate=1e-2, init_std=0.1,
        balance_loss_alpha=0.01, adam_moments="fp32", loss_chunk_tokens=20,
    )  # fmt: skip
    return RunConfig(model=model, data=DataConfig(sequence_length=12), train=train)
