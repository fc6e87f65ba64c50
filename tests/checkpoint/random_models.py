"""Small configurations that differ in structure, and random parameters for them."""

import dataclasses

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import param_specs

BASE = ModelConfig(
    vocab_size=40, hidden_size=24, intermediate_size=20, moe_intermediate_size=8, num_hidden_layers=3,
    num_nextn_predict_layers=1, num_attention_heads=2, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=12,
    q_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5, n_group=2, topk_group=1,
    num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64,
    rope_scaling=RopeScaling(factor=4, original_max_position_embeddings=16), precision="fp32",
)  # fmt: skip
STRUCTURES = {
    "published": BASE,
    "uncompressed_queries": dataclasses.replace(BASE, q_lora_rank=None),
    "no_shared_experts": dataclasses.replace(BASE, n_shared_experts=0),
    "two_shared_experts": dataclasses.replace(BASE, n_shared_experts=2),
    "no_mtp_no_dense": dataclasses.replace(BASE, num_nextn_predict_layers=0, first_k_dense_replace=0),
    "two_mtp_all_dense": dataclasses.replace(BASE, num_nextn_predict_layers=2, first_k_dense_replace=3),
}
# Partial blocks in every direction; experts whole, as FP8 demands.
FP8 = dataclasses.replace(BASE, moe_intermediate_size=128, hidden_size=136, intermediate_size=200, kv_lora_rank=130)


def random_params(config: ModelConfig, *, seed: int = 0, is_bf16: bool = False) -> dict:
    """Draws float32 parameters, every one of them non-zero; representable in BF16 if asked."""
    generator = np.random.default_rng(seed)

    def draw(specs):
        if isinstance(specs, dict):
            return {name: draw(spec) for name, spec in specs.items()}
        values = generator.normal(size=specs.shape).astype(np.float32)
        return values.astype(ml_dtypes.bfloat16).astype(np.float32) if is_bf16 else values

    return draw(param_specs(config))


def flatten(params: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns path -> array."""
    flat = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat
