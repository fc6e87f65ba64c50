"""config.json: both layouts are read alike, and what this model is not is refused by name."""

import dataclasses
import json
import pathlib

import pytest
from random_models import STRUCTURES

from dsv3_jax.checkpoint import hf_config

OFFICIAL = json.loads((pathlib.Path(__file__).parents[1] / "golden/official_config.json").read_text())
YARN = OFFICIAL["rope_scaling"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_written_config_is_read_back(structure, precision):
    config = dataclasses.replace(STRUCTURES[structure], precision=precision)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert hf_config.from_json(json.loads(json.dumps(hf_config.to_json(config, dtype=dtype)))) == config


def test_transformers_5_layout_reads_like_the_published_one():
    values = {name: value for name, value in OFFICIAL.items() if name not in ("rope_scaling", "rope_theta")}
    values["rope_parameters"] = YARN | {"rope_theta": 10000, "rope_type": "yarn"}
    for field in ("scoring_func", "topk_method", "moe_layer_freq", "seq_aux", "ep_size", "torch_dtype"):
        del values[field]
    values |= {"dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192, "rope_interleave": True, "pad_token_id": None}
    assert hf_config.from_json(values) == hf_config.from_json(OFFICIAL)


def test_plain_rotary_positions_in_both_layouts():
    plain = hf_config.from_json(OFFICIAL | {"rope_scaling": None})
    assert plain.rope_scaling is None
    values = {name: value for name, value in OFFICIAL.items() if name not in ("rope_scaling", "rope_theta")}
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert hf_config.from_json(values | default) == plain


def test_yarn_without_mscale_reads_as_zero():
    """Transformers scales cos and sin by the factor's magnitude then, and the softmax not at all."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    read = hf_config.from_json(OFFICIAL | {"rope_scaling": scaling}).rope_scaling
    assert (read.mscale, read.mscale_all_dim, read.beta_fast, read.beta_slow) == (0.0, 0.0, 32.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["DeepseekV2ForCausalLM"]),
        ("model_type", "deepseek_v2"),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("num_key_value_heads", 8),
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("head_dim", 128),
        ("hidden_size", "7168"),
        ("hidden_size", 7168.5),
        ("hidden_size", None),
        ("norm_topk_prob", 1),
        ("eos_token_id", [1, 2]),
        ("torch_dtype", "float16"),
        ("num_experts_per_tok", 512),
        ("rope_theta", None),
        ("quantization_config", OFFICIAL["quantization_config"] | {"weight_block_size": [64, 64]}),
        ("quantization_config", {"quant_method": "awq"}),
        ("rope_scaling", YARN | {"type": "linear"}),
        ("rope_scaling", YARN | {"attention_factor": 2.0}),
        ("rope_scaling", YARN | {"facto": 40}),
        ("rope_scaling", {"type": "yarn", "factor": 40}),
    ],
)
def test_refusal_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=field) as error:
        hf_config.from_json(OFFICIAL | {field: value})
    shown = [value, *(value.values() if isinstance(value, dict) else [])]
    assert any(repr(part) in str(error.value) for part in [*shown, None]), error.value


def test_contradicting_layouts_are_refused():
    values = OFFICIAL | {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000, "factor": 8}}
    with pytest.raises(ValueError, match=r"rope_scaling.*contradicts rope_parameters"):
        hf_config.from_json(values)


@pytest.mark.parametrize("field", ["hidden_size", "n_group", "rope_theta", "first_k_dense_replace"])
def test_missing_field_is_named(field):
    with pytest.raises(ValueError, match=field):
        hf_config.from_json({name: value for name, value in OFFICIAL.items() if name != field})
