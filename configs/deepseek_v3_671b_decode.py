"""Continues sequences with DeepSeek-V3 on 320 GPUs, in the report's layout (§3.4.2): TP4 with SP, DP80, EP320.

Command:   python launch/plan.py --config=configs/deepseek_v3_671b_decode.py --program=decode --rows=128
Hardware:  40 nodes x 8 H200; the report: H800.
Cost:      at least 40 ms: 191 GB moved in each GPU's memory; 11.4 GB sent by NVLink and 1.56 GB by the network.
Result:    one token for each of 128 sequences per group of 4 GPUs, 10,240 in all, whose caches hold 4096 tokens; 50.6
           GB of a GPU's memory, 36.8 of them caches and 13.4 weights.

Every GPU has one routed expert: 256, and 64 copies of the busiest, see `serve.placed_params.balance_experts`. The
report routes to the shared expert as to a ninth and gives it some of the 64; here it is on every GPU, for its tokens.

Few tokens come from each GPU, so the exchange has room for all of them everywhere: it neither arranges them nor ever
needs a second round. They cross the network once per node, then NVLink; the report sends them straight to their GPU.
"""

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RopeScaling, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_nextn_predict_layers=0,
            rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096),
            precision="fp8",
            exchange_capacity=40.0,  # a token goes to one GPU in 40 on average
            n_redundant_experts=64,
        ),
        mesh=MeshConfig(node=40, gpu=2, tensor=4),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(batch_size=80, batch_ramp_tokens=0),
    )
