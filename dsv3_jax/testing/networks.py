"""Small networks for tests: one configuration with every part in it, and weights under which mistakes show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import ParamSpec, param_specs, rope
from dsv3_jax.model.deepseek_v3 import DeepseekV3

# Small programs run once: less time in the compiler, the same numbers up to the order of sums.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def small_config(**changes) -> ModelConfig:
    """Returns a float32 network of 1 dense and 2 MoE layers with all head widths different."""
    config = ModelConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=3,
        num_nextn_predict_layers=1, num_attention_heads=3, n_shared_experts=1, n_routed_experts=8,
        routed_scaling_factor=2.5, kv_lora_rank=10, q_lora_rank=14, qk_rope_head_dim=4, qk_nope_head_dim=6,
        v_head_dim=5, n_group=4, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1,
        max_position_embeddings=64, precision="fp32",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def telling_params(config: ModelConfig, seed: int, *, init_std: float = 0.2) -> dict:
    """Draws weights that hide no mistake: wide, norm weights off 1, correction biases partly negative; float32."""
    rng = np.random.default_rng(seed)

    def draw(path, spec: ParamSpec):
        if path[-1].key == "e_score_correction_bias":
            value = rng.uniform(-1, 0.5, spec.shape)
        elif spec.init == "ones":
            value = rng.uniform(0.5, 1.5, spec.shape)
        else:
            value = rng.normal(0, init_std, spec.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, param_specs(config))


def random_tokens(config: ModelConfig, seed: int, batch: int, length: int) -> np.ndarray:
    """Draws token ids, int32 [batch, length]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


def run_layer_by_layer(config: ModelConfig, params: dict, tokens_BT) -> tuple[list[jax.Array], jax.Array]:
    """Runs the main model as a Python loop over its layers, without scan.

    Returns:
      The input of every layer and, last, the output of the last; and the tokens per expert of every MoE layer.
    """
    model = nnx.merge(nnx.split(DeepseekV3(config))[0], nnx.State(jax.tree.map(jnp.asarray, params)))
    cosines, sines = rope.rotation(config, jnp.arange(tokens_BT.shape[1]))
    hidden, loads = [model.embed(tokens_BT)], []
    for blocks in model.stacks().values():
        graphdef, layers = nnx.split(blocks)
        for index in range(len(blocks.input_layernorm[...])):
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], layers))
            x_BTD, _, statistics = block(hidden[-1], cosines, sines)
            hidden.append(x_BTD)
            if statistics is not None:
                loads.append(statistics.tokens_per_expert_E)
    return hidden, loads
