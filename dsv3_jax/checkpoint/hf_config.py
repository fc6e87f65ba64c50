"""Translation between `ModelConfig` and Hugging Face's config.json.

Written in the layout of the published checkpoint (`rope_scaling` and `rope_theta`, the router's constants spelled
out), which every loader understands. Read in that layout and in the one of transformers 5 (`rope_parameters`).
"""

import dataclasses
import types
import typing
from typing import Any

from absl import logging

from dsv3_jax.config import ModelConfig, RopeScaling, require
from dsv3_jax.fp8.published_weights import BLOCK

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPE = "deepseek_v3"
# File names of the published repository's own code, which `auto_map` names.
REMOTE_CODE_FILES = ("configuration_deepseek.py", "modeling_deepseek.py")

# Fields with the one value this model has.
_CONSTANTS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
_WRITTEN_CONSTANTS = {name: value for name, value in _CONSTANTS.items() if name != "rope_interleave"}
# Fields of the published file that say nothing about what the network computes.
_WITHOUT_MEANING = {
    "ep_size": 1,
    "pretraining_tp": 1,
    "seq_aux": True,
    "transformers_version": "4.46.3",
    "use_cache": True,
}
_IGNORED = (
    *_WITHOUT_MEANING, "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "quantization_config",
    "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "qk_head_dim",
    "output_router_logits", "pad_token_id", "_name_or_path", "num_local_experts", "num_mtp_layers",
)  # fmt: skip
# What a file that lacks the field means, as transformers reads it.
_DEFAULTS = {
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
}
_OURS = (
    "rope_theta", "rope_scaling", "precision", "remat_policy", "fp8_input_cache", "fp8_attention_cache",
    "fp8_swiglu_cache", "exchange_capacity", "n_redundant_experts",
)  # fmt: skip
_PUBLISHED_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in _OURS)
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def to_json(config: ModelConfig, *, dtype: str, has_remote_code: bool = False) -> dict[str, Any]:
    """Returns the config.json of the published layout.

    Args:
      config: the network.
      dtype: of the weights beside it: "float32", "bfloat16" or "fp8".
      has_remote_code: names the published repository's Python files in `auto_map`; only true where they are.
    """
    values = {name: getattr(config, name) for name in _PUBLISHED_FIELDS}
    values |= _WRITTEN_CONSTANTS | _WITHOUT_MEANING
    values |= {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling_json(config.rope_scaling),
        "rope_theta": _integer_if_whole(config.rope_theta),
        "torch_dtype": "float32" if dtype == "float32" else "bfloat16",
    }
    if dtype == "fp8":
        values["quantization_config"] = dict(_QUANTIZATION)
    if has_remote_code:
        values["auto_map"] = {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        }
    return dict(sorted(values.items()))


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the generation_config.json: where generation starts and stops."""
    return {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "transformers_version": _WITHOUT_MEANING["transformers_version"],
    }


def from_json(values: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of the published or of transformers 5's layout.

    `precision` follows `torch_dtype` (or `dtype`): fp32 for float32, else bf16. A missing `num_nextn_predict_layers`
    means 0 here; `hf.read_config` looks at the weights.

    Raises:
      ValueError: another architecture, a missing field, or a value that this model does not have.
    """
    require(isinstance(values, dict), "config.json", values, "must be a JSON object")
    _require_architecture(values)
    for name, only in _CONSTANTS.items():
        require(values.get(name, only) == only, name, values.get(name), f"this model has only {only!r}")
    _require_quantization(values.get("quantization_config"))
    fields = {name: _field(values, name) for name in _PUBLISHED_FIELDS}
    for name, implied in _implied_fields(fields).items():
        require(values.get(name) in (None, implied), name, values.get(name), f"must be {implied} in this architecture")
    unknown = sorted(set(values) - set(_PUBLISHED_FIELDS) - set(_CONSTANTS) - set(_IGNORED))
    if unknown:
        logging.warning("config.json: fields that DeepSeek-V3 does not have are ignored: %s", ", ".join(unknown))
    rope_theta, rope_scaling = _rope(values)
    return ModelConfig(**fields, rope_theta=rope_theta, rope_scaling=rope_scaling, precision=_precision(values))


def _require_architecture(values: dict[str, Any]) -> None:
    architectures = values.get("architectures")
    is_ours = architectures is None or (isinstance(architectures, list) and ARCHITECTURE in architectures)
    require(is_ours, "architectures", architectures, f"only {ARCHITECTURE} can be read")
    model_type = values.get("model_type")
    require(model_type == MODEL_TYPE, "model_type", model_type, f"only {MODEL_TYPE!r} can be read")


def _require_quantization(quantization: Any) -> None:
    if quantization is None:
        return
    require(isinstance(quantization, dict), "quantization_config", quantization, "must be a JSON object")
    for name, only in _QUANTIZATION.items():
        value = quantization.get(name, None if name in ("quant_method", "weight_block_size") else only)
        require(value == only, f"quantization_config.{name}", value, f"only {only!r} can be read; dequantize it first")


def _field(values: dict[str, Any], name: str) -> Any:
    require(name in values or name in _DEFAULTS, name, None, "config.json lacks this field; add it")
    value = values[name] if name in values else _DEFAULTS[name]
    hint = typing.get_type_hints(ModelConfig)[name]
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = [arg for arg in hint.__args__ if arg is not types.NoneType]
    return _number(value, hint, name)


def _number(value: Any, kind: type, name: str) -> Any:
    accepted = (int, float) if kind is float else kind
    is_kind = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(is_kind, name, value, f"must be one {'number' if kind is float else kind.__name__}")
    return value


def _implied_fields(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "num_key_value_heads": fields["num_attention_heads"],
        "head_dim": fields["qk_rope_head_dim"],
        "qk_head_dim": fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
        "num_local_experts": fields["n_routed_experts"],
    }


def _precision(values: dict[str, Any]) -> str:
    name = "dtype" if "torch_dtype" not in values else "torch_dtype"
    dtype = values.get(name)
    require(dtype is None or dtype in _PRECISIONS, name, dtype, f"choose one of {tuple(_PRECISIONS)}")
    return _PRECISIONS["bfloat16" if dtype is None else dtype]


def _rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    found = [name for name in ("rope_parameters", "rope_scaling") if values.get(name) is not None]
    for name in found:
        require(isinstance(values[name], dict), name, values[name], "must be a JSON object")
    theta = values.get("rope_theta")
    if "rope_parameters" in found:
        own_theta = values["rope_parameters"].get("rope_theta")
        require(None in (theta, own_theta) or theta == own_theta, "rope_parameters.rope_theta", own_theta,
                f"contradicts rope_theta={theta}; keep one")  # fmt: skip
        theta = own_theta if own_theta is not None else theta
    require(theta is not None, "rope_theta", theta, "config.json lacks this field; add it")
    scalings = [_rope_scaling(values[name], name) for name in found]
    require(len(set(scalings)) < 2, "rope_scaling", values.get("rope_scaling"), "contradicts rope_parameters; keep one")
    return float(_number(theta, float, "rope_theta")), scalings[0] if scalings else None


def _rope_scaling(rope: dict[str, Any], section: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type"))
    require(kind in ("yarn", "default"), f"{section}.rope_type", kind, "only 'yarn' and 'default' are supported")
    constants = {"attention_factor": None, "partial_rotary_factor": 1.0, "truncate": True}
    for name, only in constants.items():
        require(rope.get(name) in (None, only), f"{section}.{name}", rope.get(name), f"this model has only {only!r}")
    known = {field.name for field in dataclasses.fields(RopeScaling)} | {"rope_type", "rope_theta"} | set(constants)
    for name in rope:
        require(name in known, f"{section}.{name}", rope[name], "is not supported; remove it")
    if kind == "default":
        return None
    numbers = {name: value for name, value in rope.items() if name not in ("type", "rope_type", "rope_theta")}
    numbers = {name: value for name, value in numbers.items() if name not in constants and value is not None}
    for name in ("factor", "original_max_position_embeddings"):
        require(name in numbers, f"{section}.{name}", None, "yarn needs this field; add it")
    hints = typing.get_type_hints(RopeScaling)
    numbers = {name: hints[name](_number(value, hints[name], f"{section}.{name}")) for name, value in numbers.items()}
    return RopeScaling(**({"mscale": 0.0, "mscale_all_dim": 0.0} | numbers))  # absent: 0, as transformers reads it


def _rope_scaling_json(scaling: RopeScaling) -> dict[str, Any]:
    values = dataclasses.asdict(scaling)
    for name in ("factor", "beta_fast", "beta_slow"):
        values[name] = _integer_if_whole(values[name])
    return dict(sorted(values.items()))


def _integer_if_whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
