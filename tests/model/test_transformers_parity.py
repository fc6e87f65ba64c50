"""Random small networks against transformers in torch float32: logits, routing and the gradient of every parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dsv3_jax import model
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import moe
from dsv3_jax.testing import reference
from dsv3_jax.testing.networks import QUICK_COMPILE, random_tokens, small_config, telling_params
from dsv3_jax.testing.tolerances import FLOAT32_GRADIENTS, FLOAT32_VALUES, assert_close, assert_trees_close

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.14")
from dsv3_jax.testing import transformers_model  # noqa: E402

pytestmark = pytest.mark.parity

# Below this lead of the chosen over the next best, rounding may choose otherwise, in either program.
SMALLEST_MARGIN = 2e-5


@st.composite
def configs(draw) -> ModelConfig:
    """Draws a network; every alternative of the architecture is as likely as not."""
    group_size = draw(st.sampled_from([2, 3, 4]))
    n_group = draw(st.sampled_from([1, 2, 4]))
    topk_group = draw(st.integers(1, n_group))
    num_layers = draw(st.sampled_from([2, 3]))
    yarn = RopeScaling(
        factor=draw(st.sampled_from([2.0, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([16, 64])),
        mscale=draw(st.sampled_from([1.0, 0.7])),
    )
    return small_config(
        hidden_size=draw(st.sampled_from([16, 24])),
        num_hidden_layers=num_layers,
        first_k_dense_replace=draw(st.sampled_from([0, 1, num_layers])),
        num_nextn_predict_layers=0,
        num_attention_heads=draw(st.integers(1, 3)),
        q_lora_rank=draw(st.sampled_from([None, 9, 14])),
        kv_lora_rank=draw(st.sampled_from([7, 12])),
        qk_rope_head_dim=draw(st.sampled_from([2, 4, 8])),
        qk_nope_head_dim=draw(st.sampled_from([3, 6])),
        v_head_dim=draw(st.sampled_from([2, 5])),
        n_routed_experts=n_group * group_size,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=draw(st.integers(1, min(4, topk_group * group_size))),
        n_shared_experts=draw(st.sampled_from([0, 1, 2])),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        rope_scaling=draw(st.sampled_from([None, yarn])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
    )


@settings(max_examples=8, deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck))
@given(
    configs(),
    st.sampled_from([(1, 1), (1, 9), (2, 12), (3, 7)]),
    st.sampled_from([0.15, 0.3]),
    st.integers(0, 2**16),
)
def test_main_model(config, batch_and_length, init_std, seed):
    """Logits, chosen experts, gate weights and every gradient equal transformers'."""
    params = telling_params(config, seed, init_std=init_std)
    tokens_BT = random_tokens(config, seed, *batch_and_length)
    cotangent_BTV = np.random.default_rng(seed).normal(size=(*tokens_BT.shape, config.vocab_size)).astype(np.float32)

    theirs = transformers_model.build(config, params)
    routings, router_inputs = _record_routing(theirs)
    their_logits = theirs(torch.from_numpy(tokens_BT).long()).logits
    (their_logits * torch.from_numpy(cotangent_BTV)).sum().backward()
    for layer, x_TD in router_inputs.items():
        mlp = jax.tree.map(lambda leaf, index=layer - config.num_dense_layers: leaf[index], params["moe_layers"]["mlp"])
        _, _, margin = reference.route(config, mlp["gate"], mlp["e_score_correction_bias"], x_TD)
        assume(margin > SMALLEST_MARGIN)

    def weighted_logits(params):
        output = model.forward(config, params, tokens_BT)
        logits_BTV = model.logits(config, params, output.h_BTD)
        return jnp.sum(logits_BTV * cotangent_BTV), logits_BTV

    with _recorded(config, params) as our_routings:
        (_, logits_BTV), gradients = jax.jit(
            jax.value_and_grad(weighted_logits, has_aux=True), compiler_options=QUICK_COMPILE
        )(params)
        jax.effects_barrier()
    assert_close(logits_BTV, their_logits.detach().numpy(), FLOAT32_VALUES, "logits")
    assert our_routings.keys() == routings.keys()
    for layer, (experts_TK, weights_TK) in our_routings.items():
        np.testing.assert_array_equal(experts_TK, routings[layer][0], err_msg=f"experts of layer {layer}")
        assert_close(weights_TK, routings[layer][1], FLOAT32_VALUES, f"gate weights of layer {layer}")
    assert_trees_close(gradients, transformers_model.gradients(config, theirs), FLOAT32_GRADIENTS)


@pytest.mark.parametrize(
    ("depth", "changes"),
    [(2, {}), (1, {"first_k_dense_replace": 3, "q_lora_rank": None, "rope_scaling": RopeScaling(factor=2.0)})],
    ids=["depth 2", "all layers dense"],
)
def test_mtp(depth, changes):
    """Logits of every depth and all gradients through the chain equal transformers' MtpModel."""
    config = small_config(num_nextn_predict_layers=depth, **changes)
    params = telling_params(config, 3)
    tokens_BT = random_tokens(config, 4, 2, 11)
    inputs_BT, next_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    length = inputs_BT.shape[1]
    cotangent_BTV = np.random.default_rng(5).normal(size=(*inputs_BT.shape, config.vocab_size)).astype(np.float32)

    theirs = transformers_model.build(config, params)
    their_mtp = transformers_model.build_mtp(config, params, theirs)
    h_BTD = theirs.model(torch.from_numpy(inputs_BT).long()).last_hidden_state
    their_logits = transformers_model.mtp_logits(their_mtp, h_BTD, torch.from_numpy(next_BT).long())
    sum((x * torch.from_numpy(cotangent_BTV[:, : x.shape[1]])).sum() for x in their_logits).backward()

    def weighted_logits(params):
        output = model.forward(config, params, inputs_BT, next_tokens_BT=next_BT)
        every_depth = [model.logits(config, params, h_BTD)[:, : length - k] for k, h_BTD in enumerate(output.mtp_h)]
        return sum(jnp.sum(x * cotangent_BTV[:, : x.shape[1]]) for x in every_depth), every_depth

    (_, our_logits), gradients = jax.jit(
        jax.value_and_grad(weighted_logits, has_aux=True), compiler_options=QUICK_COMPILE
    )(params)
    assert len(our_logits) == depth
    for k, (ours, expected) in enumerate(zip(our_logits, their_logits, strict=True)):
        assert_close(ours, expected.detach().numpy(), FLOAT32_VALUES, f"logits at depth {k}")
    assert_trees_close(gradients, transformers_model.gradients(config, theirs, their_mtp), FLOAT32_GRADIENTS)


def _record_routing(their_model) -> tuple[dict, dict]:
    """Fills two dicts as the torch model runs: layer -> (sorted experts, their weights), and layer -> router input."""
    routings, inputs = {}, {}

    def hook(layer, _, args, output):
        _, weights_TK, experts_TK = output
        inputs[layer] = args[0].detach().numpy().reshape(-1, args[0].shape[-1])
        routings[layer] = _sorted_by_expert(experts_TK.numpy(), weights_TK.detach().numpy())

    for layer, block in enumerate(their_model.model.layers):
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.register_forward_hook(functools.partial(hook, layer))
    return routings, inputs


class _recorded:
    """Within it, our router reports what it chose: layer -> (sorted experts, their weights).

    Layers run inside a scan; the correction bias, which no two layers share, tells them apart.
    """

    def __init__(self, config, params):
        self.patch = pytest.MonkeyPatch()
        self.routings = {}
        self.layer_of_bias = {}
        if config.num_moe_layers:
            biases_LE = np.asarray(params["moe_layers"]["mlp"]["e_score_correction_bias"])
            self.layer_of_bias = {bias.tobytes(): config.num_dense_layers + i for i, bias in enumerate(biases_LE)}

    def __enter__(self) -> dict:
        self.patch.setattr(moe, "route", functools.partial(self._route, moe.route))
        return self.routings

    def __exit__(self, *_):
        self.patch.undo()

    def _route(self, original, config, gate_DE, bias_E, x_TD):
        routing = original(config, gate_DE, bias_E, x_TD)
        jax.debug.callback(self._record, bias_E, routing.experts_TK, routing.weights_TK)
        return routing

    def _record(self, bias_E, experts_TK, weights_TK):
        layer = self.layer_of_bias[np.asarray(bias_E).tobytes()]
        self.routings[layer] = _sorted_by_expert(np.asarray(experts_TK), np.asarray(weights_TK))


def _sorted_by_expert(experts_TK, weights_TK):
    order = np.argsort(experts_TK, axis=-1)
    return np.take_along_axis(experts_TK, order, axis=-1), np.take_along_axis(weights_TK, order, axis=-1)
