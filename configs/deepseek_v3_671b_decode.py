"""Continues sequences with DeepSeek-V3 on 256 GPUs, after the report's layout (§3.4.2): TP4, DP64, EP256.

Command:   python launch/plan.py --config=configs/deepseek_v3_671b_decode.py --program=decode --rows=128
Hardware:  32 nodes x 8 H200; the report: 40 nodes of H800.
Cost:      the least time, bytes and memory are what the command prints.
Result:    one token for each of 128 sequences per group of 4 GPUs, 8192 in all, whose caches hold 4096 tokens.

The report's TP4, DP80, EP320 takes more GPUs than there are experts: 64 of its 320 hold redundant copies of busy
experts and the shared one. Every expert exists once here, so EP must divide 256. As in the report, tokens go straight
to the GPU of their expert: for the exchange all GPUs are one node.
"""

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RopeScaling, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_nextn_predict_layers=0,
            rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096),
            precision="fp8",
        ),
        mesh=MeshConfig(node=1, gpu=64, tensor=4),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(batch_size=64, batch_ramp_tokens=0),
    )
