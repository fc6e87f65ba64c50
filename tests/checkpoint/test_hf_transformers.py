"""Directories exchanged with transformers: what one writes the other computes with."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from random_models import BASE, STRUCTURES, random_params

from dsv3_jax.checkpoint import hf
from dsv3_jax.model import forward, logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(0, BASE.vocab_size, size=(2, 24))
# Float32 rounding between two orders of summation; a routing flip or a transposed weight moves logits by more than 0.1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def our_logits(directory):
    config = hf.read_config(directory)
    params = hf.load_params(directory, config, dtype="float32")
    return np.asarray(logits(config, params, forward(config, params, jnp.asarray(TOKENS)).h_BTD))


def their_logits(directory):
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("structure", ["published", "uncompressed_queries", "two_mtp_all_dense"])
def test_transformers_computes_the_same_from_our_export(tmp_path, structure):
    config = STRUCTURES[structure]
    hf.save(tmp_path, config, scaled(random_params(config)), dtype="float32")
    theirs = their_logits(tmp_path)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(our_logits(tmp_path), theirs, **TOLERANCE)


@pytest.mark.parametrize("fused", [False, True])
def test_directory_saved_by_transformers_computes_the_same(tmp_path, fused):
    """Its own config.json layout, its claim of an MTP module it did not save, several files without fused experts."""
    their_model(num_hidden_layers=3).save_pretrained(tmp_path, save_original_format=not fused, max_shard_size="20KB")
    theirs = their_logits(tmp_path)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(our_logits(tmp_path), theirs, **TOLERANCE)


def test_bfloat16_directory_with_an_mtp_module_loads(tmp_path):
    """Layer 2 of three becomes the module of a two-layer model, under the published names."""
    model = their_model(num_hidden_layers=3).bfloat16()
    model.save_pretrained(tmp_path)
    expected = hf.load_params(tmp_path, hf.read_config(tmp_path), dtype="float32")
    file = tmp_path / "model.safetensors"
    tensors = {name: np.array(values) for name, values in safetensors.numpy.load_file(file).items()}
    width = BASE.hidden_size
    tensors |= {f"model.layers.2.{name}.weight": np.full(width, index, tensors["model.norm.weight"].dtype)
                for index, name in enumerate(("enorm", "hnorm", "shared_head.norm"))}  # fmt: skip
    tensors["model.layers.2.eh_proj.weight"] = np.arange(2 * width * width).reshape(width, 2 * width).astype(np.float32)
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, file)
    config_file = tmp_path / "config.json"
    config_file.write_text(config_file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    config = hf.read_config(tmp_path)
    assert (config.num_hidden_layers, config.num_nextn_predict_layers, config.precision) == (2, 1, "bf16")
    module = hf.load_params(tmp_path, config, dtype="float32")["mtp_layers"]
    experts = expected["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    np.testing.assert_array_equal(module["block"]["mlp"]["experts"]["gate_up_proj"][0], experts[1])
    np.testing.assert_array_equal(module["hnorm"], np.ones((1, width)))
    np.testing.assert_array_equal(module["norm"], np.full((1, width), 2))
    assert module["eh_proj"][0, 3, 1] == 2 * width + 3


def scaled(params):
    """Weights of standard deviation 0.3: large enough for mistakes to show, small enough for softmax to stay soft."""
    return {
        name: scaled(value) if isinstance(value, dict) else value * np.float32(0.3) for name, value in params.items()
    }


def their_model(*, num_hidden_layers):
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=BASE.vocab_size, hidden_size=BASE.hidden_size, intermediate_size=20, moe_intermediate_size=8,
        num_hidden_layers=num_hidden_layers, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        kv_lora_rank=12, q_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64, initializer_range=0.3,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 16},
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    return model
