"""DeepSeek-V3 as published: 671B parameters, 37B active per token, and a 14B MTP module.

Command:   python launch/export_hf.py --config=configs/deepseek_v3_671b.py --dtype=fp8 --dry_run
           Pre-training ran at 4K positions without YaRN (§4.2; YaRN came with the context extension, §4.3):
           python launch/train.py --config=configs/deepseek_v3_671b.py --config.model.rope_scaling=none ...
Hardware:  2048 H800: 32 copies of 8 nodes x 8 GPUs (the report: 16 pipeline stages x 64-way experts x 2).
           Without a pipeline it fits on H200s as planned with --config.mesh.fsdp=true: 116 GB of 147 each.
Cost:      2.66M H800 GPU-hours for 14.8T tokens, 180K per 1T (§1, Table 1).
Result:    0.548 bits per byte on Pile-test, 87.1 on MMLU, 65.2 pass@1 on HumanEval (§4.4, Table 3).

The network equals the published config.json; the recipe is §4.2's, the defaults of `TrainConfig`.
"""

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RopeScaling, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            first_k_dense_replace=3,
            num_nextn_predict_layers=1,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            max_position_embeddings=163840,
            rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096),
            precision="bf16",
            remat_policy="report",
        ),
        mesh=MeshConfig(replica=32, node=8, gpu=8),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(),
    )
