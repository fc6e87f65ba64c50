"""The model against values that transformers computed, without torch."""

import dataclasses
import functools
import gzip
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dsv3_jax import model
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import rope
from dsv3_jax.model.block import Block
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.router import route
from dsv3_jax.testing.networks import QUICK_COMPILE, run_layer_by_layer
from dsv3_jax.testing.published_layout import params_from_tensors, tensors_from_params
from dsv3_jax.testing.tolerances import FLOAT32_GRADIENTS, FLOAT32_VALUES, assert_close

DIRECTORY = pathlib.Path(__file__).parents[1] / "golden"


def _config(path: pathlib.Path, **changes) -> ModelConfig:
    published = json.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(ModelConfig)} & published.keys() - {"rope_scaling"}
    return ModelConfig(
        **{name: published[name] for name in names}, rope_scaling=RopeScaling(**published["rope_scaling"]), **changes
    )


@pytest.fixture(scope="module")
def config():
    return _config(DIRECTORY / "ckpt" / "config.json", precision="fp32")


@pytest.fixture(scope="module")
def params(config):
    return params_from_tensors(config, load_file(DIRECTORY / "ckpt" / "model-00001-of-000001.safetensors"))


@pytest.fixture(scope="module")
def golden():
    return np.load(DIRECTORY / "golden.npz")


@pytest.fixture(scope="module")
def outputs(config, params, golden):
    """The loss, its gradients, and the logits of the main model and of the MTP module."""
    tokens_BT = golden["ids"].astype(np.int32)

    def loss_and_logits(params):
        output = model.forward(config, params, tokens_BT, next_tokens_BT=jnp.roll(tokens_BT, -1, axis=1))
        logits_BTV = model.logits(config, params, output.h_BTD)
        log_probabilities = jax.nn.log_softmax(logits_BTV[:, :-1])
        loss = -jnp.take_along_axis(log_probabilities, tokens_BT[:, 1:, None], axis=-1).mean()
        return loss, (output.h_BTD, logits_BTV, model.logits(config, params, output.mtp_h[0]))

    (loss, (h_BTD, logits_BTV, mtp_logits_BTV)), gradients = jax.jit(
        jax.value_and_grad(loss_and_logits, has_aux=True), compiler_options=QUICK_COMPILE
    )(params)
    return {"loss": loss, "h": h_BTD, "logits": logits_BTV, "mtp_logits": mtp_logits_BTV, "gradients": gradients}


@pytest.fixture(scope="module")
def layers(config, params, golden):
    run = jax.jit(functools.partial(run_layer_by_layer, config), compiler_options=QUICK_COMPILE)
    return run(params, golden["ids"].astype(np.int32))


def test_logits_loss_and_hidden_states(outputs, golden):
    assert_close(outputs["logits"], golden["logits"], FLOAT32_VALUES, "logits")
    assert_close(outputs["loss"], golden["loss"], FLOAT32_VALUES, "loss")
    assert_close(outputs["h"], golden["last_hidden"], FLOAT32_VALUES, "h")


def test_logits_of_the_mtp_module(outputs, golden):
    """The last position has no next token, and the golden values leave it out."""
    assert_close(outputs["mtp_logits"][:, :-1], golden["mtp_logits"], FLOAT32_VALUES, "mtp logits")


def test_gradient_of_every_published_tensor(config, outputs):
    expected = np.load(DIRECTORY / "grads.npz")
    main_only = dataclasses.replace(config, num_nextn_predict_layers=0)
    actual = tensors_from_params(main_only, outputs["gradients"])
    biases = {name for name in actual if name.endswith("e_score_correction_bias")}
    assert actual.keys() - biases == set(expected.files)
    for name in expected.files:
        assert_close(actual[name], expected[name], FLOAT32_GRADIENTS, name)
    for name in biases:
        np.testing.assert_array_equal(actual[name], 0)


def test_every_layers_input(layers, golden):
    hidden, _ = layers
    for actual, name in zip(hidden, ("embed_out", "layer1_in", "layer2_in")):
        assert_close(actual, golden[name], FLOAT32_VALUES, name)


def test_router_chooses_and_weighs(config, params, layers, golden):
    """The router's own input is the layer's input after attention; here it is rebuilt from the layer's weights."""
    hidden, loads = layers
    for layer in (1, 2):
        x_TD, mlp = _router_input(config, params, hidden[layer], layer - 1)
        routing = route(config, mlp["gate"], mlp["e_score_correction_bias"], x_TD)
        order = np.argsort(routing.experts_TK, axis=-1)
        expected_order = np.argsort(golden[f"router_idx_{layer}"], axis=-1)
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(routing.experts_TK), order, axis=-1),
            np.take_along_axis(golden[f"router_idx_{layer}"], expected_order, axis=-1),
        )
        assert_close(
            np.take_along_axis(np.asarray(routing.weights_TK), order, axis=-1),
            np.take_along_axis(golden[f"router_w_{layer}"], expected_order, axis=-1),
            FLOAT32_VALUES,
            f"weights of layer {layer}",
        )
        expected_load = np.bincount(golden[f"router_idx_{layer}"].ravel(), minlength=config.n_routed_experts)
        np.testing.assert_array_equal(loads[layer - 1], expected_load)


def _router_input(config, params, x_BTD, moe_layer: int):
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf[moe_layer]), params["moe_layers"])
    block = nnx.merge(nnx.split(Block(config, is_moe=True))[0], nnx.State(weights))
    normed = rms_norm(x_BTD, weights["input_layernorm"], config.rms_norm_eps)
    attended, _ = block.self_attn(normed, *rope.rotation(config, jnp.arange(x_BTD.shape[1])))
    x_TD = rms_norm(x_BTD + attended, weights["post_attention_layernorm"], config.rms_norm_eps)
    return x_TD.reshape(-1, config.hidden_size), weights["mlp"]


def test_greedy_decoding(config, params, golden):
    """The generated tokens equal the golden ones, through prefill and absorbed decoding."""
    prompt_length = 32
    expected = golden["greedy"]
    prompts = golden["ids"][:, :prompt_length].astype(np.int32)
    np.testing.assert_array_equal(expected[:, :prompt_length], prompts)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def generate(params):
        cache = model.init_cache(config, len(prompts), expected.shape[1])
        lengths_B = jnp.full(len(prompts), prompt_length, jnp.int32)
        logits_BV, cache, _ = model.prefill(config, params, prompts, lengths_B, cache)

        def step(carry, _):
            logits_BV, cache = carry
            tokens_B = jnp.argmax(logits_BV, axis=-1)
            return model.decode_step(config, params, tokens_B, cache)[:2], tokens_B

        num_new = expected.shape[1] - prompt_length
        return jax.lax.scan(step, (logits_BV, cache), length=num_new)[1].T

    np.testing.assert_array_equal(generate(params), expected[:, prompt_length:])


def test_rotary_frequencies_and_softmax_scale(config, golden):
    np.testing.assert_allclose(rope.inverse_frequencies(config), golden["inv_freq"], rtol=1e-6)
    assert rope.softmax_scale(config) == pytest.approx(float(golden["softmax_scale"]), rel=1e-12)


def test_yarn_of_the_published_671b_configuration():
    config = _config(DIRECTORY / "official_config.json")
    assert rope.softmax_scale(config) == pytest.approx(0.1352337788608801, rel=1e-12)
    frequencies = rope.inverse_frequencies(config).astype(np.float64)
    plain = rope.inverse_frequencies(dataclasses.replace(config, rope_scaling=None)).astype(np.float64)
    share = np.clip((np.arange(32) - 10) / (23 - 10), 0, 1)  # kept up to pair 10, divided by 40 from pair 23 on
    np.testing.assert_allclose(frequencies, plain * (1 - share) + plain / 40 * share, rtol=1e-6)


def test_number_of_parameters_of_the_published_671b_configuration():
    """The published tensor list, without scales and the MTP module's copies, holds as many numbers."""
    config = _config(DIRECTORY / "official_config.json")
    with gzip.open(DIRECTORY / "official_tensors.json.gz", "rt") as file:
        tensors = json.load(file)
    counted = {"main": 0, "mtp": 0}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv") or (name.startswith("model.layers.61.") and ".embed_tokens." in name):
            continue
        if name.startswith("model.layers.61.") and ".shared_head.head." in name:
            continue
        counted["mtp" if name.startswith("model.layers.61.") else "main"] += math.prod(tensor["shape"])
    assert counted["main"] == 671_026_419_200
    assert model.count_params(config, with_mtp=False) == counted["main"]
    assert model.count_params(config, with_mtp=True) == counted["main"] + counted["mtp"]


def test_published_layout_round_trip(config, params):
    tensors = load_file(DIRECTORY / "ckpt" / "model-00001-of-000001.safetensors")
    written = tensors_from_params(config, params)
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert written.keys() == tensors.keys() - copies
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name])
