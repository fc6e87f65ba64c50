"""The networks that whole steps are measured on."""

import dataclasses

from dsv3_jax.config import DataConfig, ModelConfig, RopeScaling, RunConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and the batch it is trained on."""

    model: ModelConfig
    batch_size: int  # sequences
    sequence_length: int  # tokens
    precisions: tuple[str, ...]  # what our training steps are measured in

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def run_config(self) -> RunConfig:
        """The report's recipe on this workload: float32 master weights, BF16 moments, a batch that does not grow."""
        train = TrainConfig(batch_size=self.batch_size, batch_size_start=self.batch_size, batch_ramp_tokens=0)
        return RunConfig(model=self.model, data=DataConfig(sequence_length=self.sequence_length), train=train)


# 108M parameters, for CPUs.
SMALL = Workload(
    model=ModelConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256, num_hidden_layers=8,
        num_nextn_predict_layers=0, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
        first_k_dense_replace=1, max_position_embeddings=4096, precision="fp32",
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=1024),
    ),
    batch_size=8,
    sequence_length=512,
    precisions=("fp32",),
)  # fmt: skip

# Three layers of the 671B network at full width with an eighth of its experts and vocabulary, for one 141 GB GPU.
SLICE = Workload(
    model=ModelConfig(
        vocab_size=16160, num_hidden_layers=3, num_nextn_predict_layers=0, n_routed_experts=32,
        first_k_dense_replace=1, max_position_embeddings=4096, precision="bf16",
    ),
    batch_size=2,
    sequence_length=4096,
    precisions=("fp8", "bf16"),
)  # fmt: skip

WORKLOADS = {"small": SMALL, "slice": SLICE}
PROMPT_LENGTH, NEW_TOKENS = 128, 64  # of the decode suite
DECODE_BATCHES = (1, 8)
