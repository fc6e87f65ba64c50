"""Continues sequences with DeepSeek-V3 on 320 GPUs, in the report's layout (§3.4.2): TP4 with SP, DP80, EP320.

Command:   python launch/plan.py --config=configs/deepseek_v3_671b_decode.py --program=decode --rows=128
Hardware:  40 nodes x 8 H200; the report: H800.
Cost:      at least 27 ms: 131 GB moved in each GPU's memory; 2.97 GB sent by NVLink and 0.88 GB by the network.
Result:    one token for each of 128 sequences per group of 4 GPUs, 10,240 in all, whose caches hold 4096 tokens; 50.3
           GB of a GPU's memory, 36.8 of them caches and 13.4 weights.

Every GPU has one routed expert: 256, and 64 copies of the busiest, see `serve.placed_params.balance_experts`. The
report routes to the shared expert as to a ninth and gives it some of the 64; here it is on every GPU, for its tokens.

Each GPU has 32 tokens. A round has room for 18 of them in every node and 8 on every GPU, where even routing brings 6
and 0.8: a layer in a hundred takes a second round. They cross the network once per node, then NVLink; the report sends
them straight to their GPU. With exchange_capacity=40 all go everywhere, always in one round: 11.4 and 1.56 GB, 40 ms.
"""

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RopeScaling, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_nextn_predict_layers=0,
            rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096),
            precision="fp8",
            n_redundant_experts=64,
        ),
        mesh=MeshConfig(node=40, gpu=2, tensor=4),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(batch_size=80, batch_ramp_tokens=0),
    )
