"""The whole network in FP8: what is quantized, what stays, what is kept, and that every path runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_networks import fp8_config

from dsv3_jax import model
from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.hf_source import list_tensors
from dsv3_jax.config import override
from dsv3_jax.model.kept_activations import kept_bytes
from dsv3_jax.model.weights import is_fp8
from dsv3_jax.serve.engine import generate_tokens
from dsv3_jax.testing.networks import QUICK_COMPILE, random_tokens, telling_params

CONFIG = fp8_config()
PARAMS = telling_params(CONFIG, 0, init_std=0.1)
DENSE = fp8_config(num_hidden_layers=1)
DENSE_PARAMS = {name: value for name, value in PARAMS.items() if name != "moe_layers"}
TOKENS = random_tokens(CONFIG, 1, 2, 17)  # 34 rows: padded


def logits(config, params, tokens_BT):
    return model.logits(config, params, model.forward(config, params, tokens_BT).h_BTD)


@functools.lru_cache
def compiled_logits(config):
    return jax.jit(functools.partial(logits, config), compiler_options=QUICK_COMPILE)


def paths(params, is_wanted):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_fp8)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if is_wanted(leaf)}


def test_every_linear_and_nothing_else_is_quantized():
    config = fp8_config(num_nextn_predict_layers=1)
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model.param_specs(config))
    quantized = jax.eval_shape(functools.partial(model.prepare_params, config), shapes)
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    feed_forward = {"gate_up_proj", "down_proj"}
    of_layer = {f"self_attn/{name}" for name in attention}
    of_moe = {f"mlp/{part}/{name}" for part in ("experts", "shared_experts") for name in feed_forward}
    expected = {f"dense_layers/{name}" for name in of_layer | {f"mlp/{name}" for name in feed_forward}}
    expected |= {f"moe_layers/{name}" for name in of_layer | of_moe}
    expected |= {f"mtp_layers/block/{name}" for name in of_layer | of_moe} | {"mtp_layers/eh_proj"}
    assert paths(quantized, is_fp8) == expected
    without = fp8_config(q_lora_rank=None)
    assert model.param_specs(without)["dense_layers"]["self_attn"]["q_proj"].linear is not None


def test_quantized_and_raw_parameters_give_the_same_bits():
    raw = compiled_logits(DENSE)(DENSE_PARAMS, TOKENS)
    for prepare in (model.prepare_params, model.cast_params):
        np.testing.assert_array_equal(raw, compiled_logits(DENSE)(prepare(DENSE, DENSE_PARAMS), TOKENS))


def test_fp8_is_bf16_within_the_format():
    """Three products with 3.7% each (two operands of 2.6%) before the SwiGLU, which doubles it, and one after: 11%."""
    bf16 = np.asarray(compiled_logits(dataclasses.replace(DENSE, precision="bf16"))(DENSE_PARAMS, TOKENS))
    error = np.linalg.norm(np.asarray(compiled_logits(DENSE)(DENSE_PARAMS, TOKENS)) - bf16) / np.linalg.norm(bf16)
    assert 0.03 < error < 0.13


def test_a_poisoned_weight_reaches_the_logits():
    """A NaN in one value of an expert, in a norm, in a latent projection: never a plausible number."""
    for stack, *rest in (
        ("moe_layers", "mlp", "shared_experts", "down_proj"),
        ("dense_layers", "self_attn", "kv_b_proj"),
    ):
        poisoned = jax.tree.map(lambda leaf: leaf, PARAMS)
        parent = poisoned[stack]
        for name in rest[:-1]:
            parent = parent[name]
        parent[rest[-1]] = parent[rest[-1]].at[(0,) * parent[rest[-1]].ndim].set(jnp.nan)
        assert np.isnan(compiled_logits(CONFIG)(poisoned, TOKENS)).any(axis=-1).all()


def test_decode_continues_prefill_within_the_format():
    """Absorbed decoding multiplies with dequantized weights, the forward pass with quantized latents besides."""
    lengths_B = np.array([12, 9], np.int32)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def continue_prompts(params, tokens_BT, next_B):
        _, cache, _ = model.prefill(CONFIG, params, tokens_BT, lengths_B, model.init_cache(CONFIG, 2, 16))
        return model.decode_step(CONFIG, model.split_layers(params), next_B, cache)[0]

    decoded_BV = continue_prompts(model.cast_params(CONFIG, PARAMS), TOKENS[:, :12], TOKENS[[0, 1], lengths_B])
    expected_BV = np.asarray(compiled_logits(CONFIG)(PARAMS, TOKENS))[[0, 1], lengths_B]
    assert np.linalg.norm(decoded_BV - expected_BV) <= 0.15 * np.linalg.norm(expected_BV)


def test_generation_takes_raw_parameters():
    settings = {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0, "num_token_ids": 61}
    added = generate_tokens(DENSE, DENSE_PARAMS, [[3, 4, 5], [7]], **settings)
    first_logits = compiled_logits(DENSE)(DENSE_PARAMS, np.array([[3, 4, 5]]))[0, -1]
    assert added[0][0] == int(jnp.argmax(first_logits))


def test_exported_codes_are_those_of_training(tmp_path):
    """Codes and scales of an FP8 directory, gate and up apart, are the blocks that training multiplies."""
    hf.save(tmp_path / "out", CONFIG, PARAMS, dtype="fp8")
    quantized = model.prepare_params(CONFIG, PARAMS)
    tensors = {name: entry.read() for name, entry in list_tensors(tmp_path / "out").items()}

    def assert_same(name, weight, rows=slice(None)):
        codes, scales = np.asarray(weight.codes)[rows], np.asarray(weight.scales)
        exported, exported_scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
        np.testing.assert_array_equal(codes.view(np.uint8), exported.view(np.uint8), err_msg=name)
        first = (rows.start or 0) // 128
        blocks = scales[first : first + exported_scales.shape[0], : exported_scales.shape[1]]
        np.testing.assert_array_equal(blocks, exported_scales, err_msg=name)

    dense, moe = quantized["dense_layers"], quantized["moe_layers"]
    for name, weight in dense["self_attn"].items():
        if is_fp8(weight):
            layer = jax.tree.map(lambda leaf: leaf[0], weight)
            assert_same(f"model.layers.0.self_attn.{name}", layer.forward)
            np.testing.assert_array_equal(layer.forward.codes.T, layer.backward.codes)
    experts = jax.tree.map(lambda leaf: leaf[0, 3], moe["mlp"]["experts"])
    assert_same("model.layers.1.mlp.experts.3.gate_proj", experts["gate_up_proj"].forward, slice(0, 128))
    assert_same("model.layers.1.mlp.experts.3.up_proj", experts["gate_up_proj"].forward, slice(128, 256))
    assert_same("model.layers.1.mlp.experts.3.down_proj", experts["down_proj"].forward)


def tiles(size):
    return -(-size // 128)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_bytes_kept_are_those_of_the_report(precision):
    """Block input, latents, attention output, SwiGLU inputs and what the second norm needs (§3.2.3)."""
    rows = 2 * 64
    kept = kept_bytes(fp8_config(precision=precision), batch_size=2, length=64)
    attention_out = {"bf16": rows * 3 * 16 * 2, "fp8": rows * 3 * 16 * 3 // 2 + rows * 4}  # E5M6: 12 bits and a scale
    routed_rows = (rows * 2 + 4 * 127 + 127) // 128 * 128 if precision == "fp8" else None
    both = {
        "block_input": rows * 96 * 2, "q_latent": rows * 80 * 2, "kv_latent": rows * (48 + 16) * 2,
        "attention_out": attention_out[precision], "attention_projected": rows * 96 * 2,
    }  # fmt: skip

    def gate_up(rows, width):
        return rows * 2 * width * 2 if precision == "bf16" else rows * 2 * width + rows * tiles(2 * width) * 4

    assert kept["dense"] == both | {"gate_up": gate_up(rows, 256)}
    if precision == "fp8":
        assert kept["moe"] == both | {"gate_up": gate_up(routed_rows, 128) + gate_up(rows, 128)}


def test_caches_decide_what_is_kept():
    """Without recomputation: an input kept in E4M3 takes a byte and a scale per 128, in BF16 two bytes."""
    everything = {"fp8_input_cache": "bf16", "fp8_attention_cache": "bf16", "fp8_swiglu_cache": "bf16"}
    few = kept_bytes(fp8_config(remat_policy="none"), batch_size=2, length=64)["dense"]
    many = kept_bytes(fp8_config(remat_policy="none", **everything), batch_size=2, length=64)["dense"]
    rows = 2 * 64
    inputs_of_norms = rows * (96 + 4 + 80 + 4 + 48 + 4 + 96 + 4)  # kept beside their norms' inputs
    attention = rows * 48 * 2 - (rows * 48 * 3 // 2 + rows * 4)
    swiglu = rows * 512 * 2 - rows * (512 + 4 * 4)
    assert sum(many.values()) - sum(few.values()) == attention + swiglu - inputs_of_norms


@pytest.mark.parametrize("name", ["hidden_size", "moe_intermediate_size", "q_lora_rank", "v_head_dim"])
def test_dimensions_that_kernels_cannot_run_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"model.{name}=40: must be a multiple of 16 with precision=fp8"):
        fp8_config(**{name: 40})
    assert getattr(fp8_config(precision="bf16", **{name: 40}), name) == 40


def test_unknown_caches_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"model\.fp8_attention_cache='fp8': choose one of .*e5m6"):
        override(CONFIG, {"fp8_attention_cache": "fp8"})
