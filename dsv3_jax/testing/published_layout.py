"""Parameters to and from the published per-expert tensors, line by line: the oracle of `checkpoint/`, and the bridge.

Written out without the table of names that the package uses, so that each can contradict the other. Holds copies of
everything in memory; only for small models.
"""

import numpy as np

from dsv3_jax.config import ModelConfig


def params_from_tensors(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict:
    """Builds the parameter tree from published tensors, float32; a missing router bias reads as zeros.

    Gradients under the published names pass through as well.
    """
    dense = [_block_from(config, tensors, layer, is_moe=False) for layer in range(config.num_dense_layers)]
    moe = [
        _block_from(config, tensors, layer, is_moe=True)
        for layer in range(config.num_dense_layers, config.num_hidden_layers)
    ]
    modules = [
        _mtp_module_from(config, tensors, config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers)
    ]
    params = {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "lm_head": tensors["lm_head.weight"].T,
    }
    for name, layers in (("dense_layers", dense), ("moe_layers", moe), ("mtp_layers", modules)):
        if layers:
            params[name] = _stack(layers)
    return params


def tensors_from_params(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """Returns the published tensors of a parameter tree; MTP modules without their copies of embedding and head."""
    tensors = {
        "model.embed_tokens.weight": np.asarray(params["embed_tokens"]),
        "model.norm.weight": np.asarray(params["norm"]),
        "lm_head.weight": np.asarray(params["lm_head"]).T,
    }
    for layer in range(config.num_hidden_layers):
        is_moe = layer >= config.num_dense_layers
        stack, index = ("moe_layers", layer - config.num_dense_layers) if is_moe else ("dense_layers", layer)
        _write_block(config, tensors, layer, _unstack(params[stack], index))
    for k in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + k
        module = _unstack(params["mtp_layers"], k)
        _write_block(config, tensors, layer, module["block"])
        prefix = f"model.layers.{layer}."
        tensors[prefix + "enorm.weight"] = module["enorm"]
        tensors[prefix + "hnorm.weight"] = module["hnorm"]
        tensors[prefix + "eh_proj.weight"] = module["eh_proj"].T
        tensors[prefix + "shared_head.norm.weight"] = module["norm"]
    return tensors


def _mtp_module_from(config, tensors, layer) -> dict:
    prefix = f"model.layers.{layer}."
    return {
        "enorm": tensors[prefix + "enorm.weight"],
        "hnorm": tensors[prefix + "hnorm.weight"],
        "eh_proj": tensors[prefix + "eh_proj.weight"].T,
        "block": _block_from(config, tensors, layer, is_moe=True),
        "norm": tensors[prefix + "shared_head.norm.weight"],
    }


def _block_from(config, tensors, layer: int, *, is_moe: bool) -> dict:
    prefix = f"model.layers.{layer}."
    return {
        "input_layernorm": tensors[prefix + "input_layernorm.weight"],
        "post_attention_layernorm": tensors[prefix + "post_attention_layernorm.weight"],
        "self_attn": _attention_from(config, tensors, prefix + "self_attn."),
        "mlp": _moe_from(config, tensors, prefix + "mlp.") if is_moe else _feed_forward_from(tensors, prefix + "mlp."),
    }


def _attention_from(config, tensors, prefix) -> dict:
    heads = config.num_attention_heads
    kv_a, kv_b, o = (tensors[prefix + f"{name}.weight"] for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
    attention = {
        "kv_a_proj_with_mqa": kv_a.T,
        "kv_a_layernorm": tensors[prefix + "kv_a_layernorm.weight"],
        "kv_b_proj": kv_b.T.reshape(config.kv_lora_rank, heads, config.qk_nope_head_dim + config.v_head_dim),
        "o_proj": o.T.reshape(heads, config.v_head_dim, config.hidden_size),
    }
    if config.q_lora_rank is None:
        q = tensors[prefix + "q_proj.weight"]
        return attention | {"q_proj": q.T.reshape(config.hidden_size, heads, config.qk_head_dim)}
    q_b = tensors[prefix + "q_b_proj.weight"]
    return attention | {
        "q_a_proj": tensors[prefix + "q_a_proj.weight"].T,
        "q_a_layernorm": tensors[prefix + "q_a_layernorm.weight"],
        "q_b_proj": q_b.T.reshape(config.q_lora_rank, heads, config.qk_head_dim),
    }


def _feed_forward_from(tensors, prefix) -> dict:
    gate, up, down = (tensors[prefix + f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {"gate_up_proj": np.stack([gate.T, up.T], axis=1), "down_proj": down.T}


def _moe_from(config, tensors, prefix) -> dict:
    num_experts = config.n_routed_experts
    moe = {
        "gate": tensors[prefix + "gate.weight"].T,
        "e_score_correction_bias": tensors.get(
            prefix + "gate.e_score_correction_bias", np.zeros(num_experts, np.float32)
        ),
        "experts": _stack([_feed_forward_from(tensors, f"{prefix}experts.{e}.") for e in range(num_experts)]),
    }
    if config.n_shared_experts:
        moe["shared_experts"] = _feed_forward_from(tensors, prefix + "shared_experts.")
    return moe


def _write_block(config, tensors, layer: int, block: dict) -> None:
    prefix = f"model.layers.{layer}."
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = block[name]
    _write_attention(config, tensors, prefix + "self_attn.", block["self_attn"])
    mlp = block["mlp"]
    if "gate" not in mlp:
        _write_feed_forward(tensors, prefix + "mlp.", mlp)
        return
    tensors[prefix + "mlp.gate.weight"] = mlp["gate"].T
    tensors[prefix + "mlp.gate.e_score_correction_bias"] = mlp["e_score_correction_bias"]
    for e in range(config.n_routed_experts):
        _write_feed_forward(tensors, f"{prefix}mlp.experts.{e}.", _unstack(mlp["experts"], e))
    if config.n_shared_experts:
        _write_feed_forward(tensors, prefix + "mlp.shared_experts.", mlp["shared_experts"])


def _write_attention(config, tensors, prefix, attention: dict) -> None:
    for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
        if name in attention:
            tensors[f"{prefix}{name}.weight"] = attention[name].reshape(attention[name].shape[0], -1).T
    tensors[prefix + "o_proj.weight"] = attention["o_proj"].reshape(-1, config.hidden_size).T
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if name in attention:
            tensors[f"{prefix}{name}.weight"] = attention[name]


def _write_feed_forward(tensors, prefix, feed_forward: dict) -> None:
    tensors[prefix + "gate_proj.weight"] = feed_forward["gate_up_proj"][:, 0].T
    tensors[prefix + "up_proj.weight"] = feed_forward["gate_up_proj"][:, 1].T
    tensors[prefix + "down_proj.weight"] = feed_forward["down_proj"].T


def _stack(trees: list[dict]) -> dict:
    return {
        key: _stack([tree[key] for tree in trees]) if isinstance(value, dict) else np.stack([t[key] for t in trees])
        for key, value in trees[0].items()
    }


def _unstack(tree: dict, index: int) -> dict:
    return {
        key: _unstack(value, index) if isinstance(value, dict) else np.asarray(value)[index]
        for key, value in tree.items()
    }
