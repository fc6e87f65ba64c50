"""Reads prompts with DeepSeek-V3 on 32 GPUs, in the report's layout (§3.4.1): TP4 with SP, DP8, EP32.

Command:   python launch/plan.py --config=configs/deepseek_v3_671b_prefill.py --program=prefill
Hardware:  4 nodes x 8 H200; the report: H800.
Cost:      at least 77 ms: every GPU sends 3.85 GB by the network; 14.1 GB by NVLink.
Result:    8 prompts of 4096 tokens at a time, one per group of 4 GPUs; 34.9 GB of a GPU's memory, 33.5 of them weights.

Every GPU has 9 slots for routed experts: 8, and one of 32 redundant ones, copies of the busiest. Copies stay in their
expert's node, see `serve.placed_params.balance_experts`. The shared expert is on every GPU, for its own tokens.
"""

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RopeScaling, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_nextn_predict_layers=0,
            rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096),
            precision="fp8",
            n_redundant_experts=32,
        ),
        mesh=MeshConfig(node=4, gpu=2, tensor=4),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(batch_size=8, batch_ramp_tokens=0),
    )
