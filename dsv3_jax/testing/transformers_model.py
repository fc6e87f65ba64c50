"""Our parameters inside transformers' DeepseekV3 and MtpModel, in torch float32. Needs the `parity` extra."""

import numpy as np
import torch
import transformers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from dsv3_jax.config import ModelConfig
from dsv3_jax.testing.published_layout import params_from_tensors, tensors_from_params


def build(config: ModelConfig, params: dict) -> transformers.DeepseekV3ForCausalLM:
    """Returns the main model with our weights."""
    model = transformers.DeepseekV3ForCausalLM._from_config(
        transformers_config(config), attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    tensors = tensors_from_params(config, params)
    state = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        state |= {prefix + name: value for name, value in _fused_layer(config, tensors, prefix).items()}
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        state[name] = _tensor(tensors[name])
    model.load_state_dict(state, strict=True)
    return model


def build_mtp(config: ModelConfig, params: dict, main_model: transformers.DeepseekV3ForCausalLM) -> MtpModel:
    """Returns the MTP modules with our weights, sharing the main model's embedding and head."""
    model = MtpModel(main_model, config.num_nextn_predict_layers)
    tensors = tensors_from_params(config, params)
    state = {}
    for k in range(config.num_nextn_predict_layers):
        published, own = f"model.layers.{config.num_hidden_layers + k}.", f"{k}."
        for name, value in _fused_layer(config, tensors, published).items():
            if name == "shared_head.norm.weight":
                state[own + "post_norm.weight"] = value
            elif name.startswith(("enorm", "hnorm", "eh_proj")):
                state[own + name] = value
            else:
                state[f"{own}mtp_block.{name}"] = value
    model.layers.load_state_dict(state, strict=True)
    return model


def mtp_logits(mtp_model: MtpModel, last_hidden_BTD: torch.Tensor, tokens_BT: torch.Tensor) -> list[torch.Tensor]:
    """Returns the logits of every depth, teacher-forced.

    Args:
      last_hidden_BTD: the main model's output after its final norm.
      tokens_BT: the tokens that follow the main model's inputs by one.

    Returns:
      One [B, T - depth, V] per module: at depth k (from 0) position i reads token i + k + 1 and predicts i + k + 2.
    """
    length = tokens_BT.shape[1]
    cache = MtpCache(config=mtp_model.config)
    found, hidden = [], last_hidden_BTD
    for k in range(mtp_model.num_mtp_layers):
        hidden = hidden[:, : length - k]
        positions = torch.arange(k + 1, length + 1)[None]
        hidden = mtp_model.forward_layer(k, hidden, positions, cache, input_ids=tokens_BT[:, k:])
        found.append(mtp_model._project_to_logits(hidden))
    return found


def gradients(config: ModelConfig, main_model, mtp_model: MtpModel | None = None) -> dict:
    """Returns the gradients that `backward` left, as our parameter tree; zeros where a parameter has none."""
    tensors = {}
    for name, parameter in main_model.named_parameters():
        _split_experts(tensors, name, _gradient(parameter))
    if mtp_model is not None:
        for name, parameter in mtp_model.named_parameters():
            if name.startswith("layers."):
                _, k, rest = name.split(".", 2)
                rest = "shared_head.norm.weight" if rest == "post_norm.weight" else rest.removeprefix("mtp_block.")
                layer = config.num_hidden_layers + int(k)
                _split_experts(tensors, f"model.layers.{layer}.{rest}", _gradient(parameter))
    return params_from_tensors(config, tensors)


def transformers_config(config: ModelConfig) -> transformers.DeepseekV3Config:
    """Returns the same network as transformers 5 describes it."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank",
        "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_group", "topk_group",
        "num_experts_per_tok", "first_k_dense_replace", "norm_topk_prob", "max_position_embeddings", "rms_norm_eps",
        "bos_token_id", "eos_token_id",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        rope |= {"rope_type": "yarn"} | {name: getattr(config.rope_scaling, name) for name in scaling}
    return transformers.DeepseekV3Config(
        **{name: getattr(config, name) for name in names},
        num_key_value_heads=config.num_attention_heads,
        num_mtp_layers=config.num_nextn_predict_layers,
        rope_parameters=rope,
    )


def _fused_layer(config: ModelConfig, tensors: dict, prefix: str) -> dict[str, torch.Tensor]:
    """Returns one layer's tensors without their prefix, the experts fused as transformers holds them in memory."""
    layer = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if "mlp.gate.weight" not in layer:
        return {name: _tensor(value) for name, value in layer.items()}
    experts = [{part: layer.pop(f"mlp.experts.{e}.{part}_proj.weight") for part in ("gate", "up", "down")}
               for e in range(config.n_routed_experts)]  # fmt: skip
    layer["mlp.experts.gate_up_proj"] = np.stack([np.concatenate([e["gate"], e["up"]]) for e in experts])
    layer["mlp.experts.down_proj"] = np.stack([e["down"] for e in experts])
    if not config.n_shared_experts:
        for part, shape in (("gate", (0, config.hidden_size)), ("up", (0, config.hidden_size)),
                            ("down", (config.hidden_size, 0))):  # fmt: skip
            layer[f"mlp.shared_experts.{part}_proj.weight"] = np.zeros(shape, np.float32)
    return {name: _tensor(value) for name, value in layer.items()}


def _split_experts(tensors: dict, name: str, value: np.ndarray) -> None:
    if name.endswith("mlp.experts.gate_up_proj"):
        for e, gate_up in enumerate(value):
            stem = name.removesuffix("gate_up_proj")
            tensors[f"{stem}{e}.gate_proj.weight"], tensors[f"{stem}{e}.up_proj.weight"] = np.split(gate_up, 2)
    elif name.endswith("mlp.experts.down_proj"):
        for e, down in enumerate(value):
            tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
    else:
        tensors[name] = value


def _gradient(parameter: torch.Tensor) -> np.ndarray:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().numpy()


def _tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(value, np.float32, copy=True, order="C"))
