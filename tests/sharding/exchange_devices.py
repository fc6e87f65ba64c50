"""Checks of the expert exchange on sixteen CPU devices, run by test_expert_exchange.py: the argument names one."""

import collections
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from dsv3_jax.fp8 import experts as fp8_experts
from dsv3_jax.fp8.feed_forward import FeedForwardWeights
from dsv3_jax.fp8.linear import pad_rows
from dsv3_jax.fp8.weight import quantize_weight
from dsv3_jax.kernels.block_quantize import quantize_rows
from dsv3_jax.model import experts
from dsv3_jax.model.moe import EXPERTS, FP8_EXPERTS, exchange_capacity
from dsv3_jax.model.weights import as_rounded
from dsv3_jax.plan import hlo, traffic
from dsv3_jax.sharding import row_packing
from dsv3_jax.sharding.exchange_plan import copies_to_send
from dsv3_jax.sharding.expert_exchange import (
    Capacity,
    ExpertFunctions,
    Tokens,
    combine,
    dispatch,
    plan_capacity,
    serve,
)
from dsv3_jax.sharding.mesh import AXES, EXPERT_AXES, make_mesh, num_devices
from dsv3_jax.testing.networks import random_tokens
from dsv3_jax.testing.tolerances import assert_close
from dsv3_jax.train import schedule
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import make_train_step, split_batch

NUM_EXPERTS, TOP_K, GROUPS, TOPK_GROUP, HIDDEN, WIDTH, TOKENS = 32, 4, 4, 2, 12, 5, 40  # TOKENS: per device
TOKEN_AXES = ("replica", *EXPERT_AXES)
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
FLOAT32 = 1e-6  # sums in another order
# Results are rounded by 2**-9 on their device, in the node and at the source. They are up to four times their sum.
BFLOAT16 = 3 * 4 * 2.0**-9


def forward(rows, experts_RK, weights_RK, params, max_choices):
    """Runs every expert of this device on every row; NaN where more choices are live than announced."""
    num_local = params["up"].shape[0]
    is_over = jnp.sum(experts_RK < num_local) > max_choices

    def run(x_RD, weights_RK, params):
        gate_RE = jnp.sum(jax.nn.one_hot(experts_RK, num_local) * weights_RK[..., None], axis=1)
        hidden_REF = jnp.square(jnp.einsum("rd,edf->ref", x_RD.astype(jnp.float32), params["up"]))
        y_RD = jnp.einsum("ref,efd,re->rd", hidden_REF, params["down"], gate_RE)
        return jnp.where(is_over, jnp.nan, y_RD).astype(x_RD.dtype)

    return jax.vjp(run, rows["x"], weights_RK, params)


def backward(kept, gradient, params):
    del params
    return kept(gradient["dy"])


FUNCTIONS = ExpertFunctions(forward, lambda dy_TD: {"dy": dy_TD}, backward)


def run_dense(x_TD, experts_TK, weights_TK, params, cotangent_TD):
    """Computes y and the gradients of sum(y · cotangent) in float64, every expert on every token, by hand."""
    x_TD, weights_TK, dy_TD = (np.asarray(array, np.float64) for array in (x_TD, weights_TK, cotangent_TD))
    up_EDF, down_EFD = (np.asarray(params[name], np.float64) for name in ("up", "down"))
    chosen_TKE = experts_TK[..., None] == np.arange(len(up_EDF))
    gate_TE = np.sum(chosen_TKE * weights_TK[..., None], axis=1)
    inner_TEF = np.einsum("td,edf->tef", x_TD, up_EDF)
    hidden_TEF = inner_TEF**2
    y_TED = np.einsum("tef,efd->ted", hidden_TEF, down_EFD)
    dgate_TE = np.einsum("ted,td->te", y_TED, dy_TD)
    dinner_TEF = np.einsum("td,efd,te->tef", dy_TD, down_EFD, gate_TE) * 2 * inner_TEF
    dparams = {
        "up": np.einsum("td,tef->edf", x_TD, dinner_TEF),
        "down": np.einsum("tef,td,te->efd", hidden_TEF, dy_TD, gate_TE),
    }
    dx_TD = np.einsum("tef,edf->td", dinner_TEF, up_EDF)
    return np.einsum("ted,te->td", y_TED, gate_TE), (dx_TD, np.einsum("tke,te->tk", chosen_TKE, dgate_TE), dparams)


def routings(num_tokens: int, num_devices: int, num_nodes: int) -> dict[str, np.ndarray]:
    """Returns experts [T, K] of all tokens, distinct within a token, by the name of the routing."""
    rng = np.random.default_rng(0)
    per_group, per_device = NUM_EXPERTS // GROUPS, NUM_EXPERTS // num_devices

    def choose(scores_TE):
        return np.argsort(-scores_TE, axis=1)[:, :TOP_K]

    def prefer(experts, tokens=slice(None)):
        scores_TE = rng.random((num_tokens, NUM_EXPERTS))
        scores_TE[tokens, experts] += 2
        return choose(scores_TE)

    limited_TE = rng.random((num_tokens, NUM_EXPERTS))
    for scores_E in limited_TE:
        for group in rng.permutation(GROUPS)[TOPK_GROUP:]:
            scores_E[group * per_group : (group + 1) * per_group] = -1
    zipf_TE = np.log(1 / np.arange(1, NUM_EXPERTS + 1)) + rng.gumbel(size=(num_tokens, NUM_EXPERTS)) * 0.5
    one_token = np.full((num_tokens, TOP_K), NUM_EXPERTS)
    one_token[num_tokens // 2] = [NUM_EXPERTS - 1, 0, 1, NUM_EXPERTS // 2]
    return {
        "uniform": prefer([]),
        "node limited": choose(limited_TE),
        "all to expert 3": prefer([3]),
        "all to the last device": prefer(slice(NUM_EXPERTS - per_device, None)),
        "all to one node": prefer(slice(0, NUM_EXPERTS // num_nodes)),
        "the first half of the experts has no tokens": prefer(slice(NUM_EXPERTS // 2, None)),
        "some devices' tokens to the first": prefer(slice(0, per_device), slice(0, num_tokens // 3)),
        "zipf": choose(zipf_TE),
        "one token": one_token,
        "no token": np.full((num_tokens, TOP_K), NUM_EXPERTS),
    }


def draw_problem(num_tokens: int, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    x_TD, cotangent_TD = (jnp.asarray(rng.normal(size=(num_tokens, HIDDEN)), dtype) for _ in range(2))
    weights_TK = jnp.asarray(rng.random((num_tokens, TOP_K)), jnp.float32)
    shapes = {"up": (NUM_EXPERTS, HIDDEN, WIDTH), "down": (NUM_EXPERTS, WIDTH, HIDDEN)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}
    return x_TD, weights_TK, params, cotangent_TD


class Exchange:
    """A mesh with the exchange's capacity on it."""

    def __init__(self, axes: dict[str, int], factor: float):
        self.name = f"{axes} {factor}"
        self.sizes = dict.fromkeys(AXES, 1) | axes
        self.num_devices = int(np.prod(list(self.sizes.values())))
        self.num_tokens = TOKENS * self.num_devices
        self.mesh = make_mesh(MeshConfig(**self.sizes), devices=jax.devices()[: self.num_devices])
        self.capacity = plan_capacity(
            num_tokens=TOKENS, top_k=TOP_K, num_experts=NUM_EXPERTS, n_group=GROUPS, topk_group=TOPK_GROUP,
            num_nodes=self.sizes["node"], devices_per_node=self.sizes["gpu"] * self.sizes["tensor"], factor=factor,
        )  # fmt: skip

    def serve(self, x_TD, experts_TK, weights_TK, params):
        return self.count_rounds(x_TD, experts_TK, weights_TK, params)[0]

    def count_rounds(self, x_TD, experts_TK, weights_TK, params):
        return serve(FUNCTIONS, x_TD, {"x": x_TD}, experts_TK, weights_TK, params, capacity=self.capacity)

    def map(self, function, *, stacked_params: bool = False):
        """Compiles function(x, experts, weights, params, cotangent) -> (y, gradients of x, weights and params)."""

        def run(*operands):
            y_TD, (dx_TD, dweights_TK, dparams) = function(*operands)
            return y_TD, (dx_TD, dweights_TK, jax.tree.map(lambda leaf: jax.lax.psum(leaf, "replica"), dparams))

        tokens, experts = P(TOKEN_AXES), P(None, EXPERT_AXES) if stacked_params else P(EXPERT_AXES)
        in_specs = (tokens, tokens, tokens, experts, tokens)
        out_specs = (tokens, (tokens, tokens, experts))
        mapped = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, compiler_options=QUICK_COMPILE)

    def run(self, x_TD, experts_TK, weights_TK, params, cotangent_TD):
        def loss(x_TD, weights_TK, params):
            y_TD = self.serve(x_TD, experts_TK, weights_TK, params)
            return jnp.sum(y_TD.astype(jnp.float32) * cotangent_TD.astype(jnp.float32)), y_TD

        (_, y_TD), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x_TD, weights_TK, params)
        return y_TD, gradients


def assert_all_close(actual, expected, tolerance: float, name: str):
    (y_TD, gradients), (expected_TD, expected_gradients) = actual, expected
    assert_close(y_TD, expected_TD, tolerance, f"{name}: y")
    for what, tree, expected_tree in zip(("dx", "dweights", "dparams"), gradients, expected_gradients, strict=True):
        compare = functools.partial(assert_close, tolerance=tolerance, name=f"{name}: {what}")
        jax.tree.map(compare, tree, expected_tree)


def check_routings(axes: dict[str, int], factor: float, dtype=jnp.float32) -> Capacity:
    """Every routing gives the outputs and gradients of dense experts, and all run one compiled program."""
    exchange = Exchange(axes, factor)
    x_TD, weights_TK, params, cotangent_TD = draw_problem(exchange.num_tokens, dtype)
    run = exchange.map(exchange.run)
    expert_devices = exchange.num_devices // exchange.sizes["replica"]
    for name, experts_TK in routings(len(x_TD), expert_devices, exchange.sizes["node"]).items():
        operands = (x_TD, experts_TK, weights_TK, params, cotangent_TD)
        actual = run(x_TD, experts_TK.astype(np.int32), *operands[2:])
        assert actual[0].dtype == actual[1][0].dtype == dtype
        tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
        assert_all_close(actual, run_dense(*operands), tolerance, f"{exchange.name} {name}")
    assert run._cache_size() == 1, "compiled anew for another routing"
    return exchange.capacity


def check_each_axis_alone():
    for axes in ({"gpu": 2}, {"gpu": 4}, {"node": 2}, {"node": 4}, {"tensor": 4}):
        check_routings(axes, 0.6)
    for axes in ({"gpu": 2}, {"node": 2}):
        only_rows = check_routings(axes, 1.25)
        assert only_rows.goes_to_every_node and only_rows.goes_to_every_device and not only_rows.is_always_enough


def check_axes_together():
    for axes in ({"node": 2, "gpu": 2, "tensor": 2}, {"node": 4, "gpu": 2}, {"replica": 2, "node": 2, "gpu": 4}):
        check_routings(axes, 0.6)
    everything = check_routings({"node": 2, "gpu": 2}, 100.0)
    assert everything.is_always_enough
    only_nodes = check_routings({"node": 2, "gpu": 4}, 0.99)
    assert only_nodes.goes_to_every_node and not only_nodes.goes_to_every_device


def check_sixteen_devices():
    check_routings({"gpu": 16}, 0.6)  # more devices than experts per token
    check_routings({"node": 4, "gpu": 2, "tensor": 2}, 0.2)


def check_bfloat16():
    check_routings({"node": 2, "gpu": 2}, 0.6, jnp.bfloat16)
    check_routings({"node": 2, "gpu": 2}, 1.25, jnp.bfloat16)


def check_sums():
    """Results add up in float32; in the node they are rounded to bfloat16 once. Exact, bit for bit."""
    exchange = Exchange({"node": 2, "gpu": 4}, 100.0)
    rng = np.random.default_rng(4)
    experts_TK = routings(exchange.num_tokens, 8, 2)["uniform"].astype(np.int32)
    x_TD = jnp.asarray(rng.normal(size=(exchange.num_tokens, HIDDEN)), jnp.bfloat16)
    scale_R = jnp.asarray(rng.normal(size=8), jnp.bfloat16)  # what a device multiplies its rows with

    def run(x_TD, experts_TK, scale_1):
        tokens = Tokens(experts_TK, jnp.zeros(experts_TK.shape), x_TD)
        waiting_TN = copies_to_send(experts_TK, exchange.capacity)
        received, hops, _ = dispatch(tokens, waiting_TN, exchange.capacity)
        is_here_R = jnp.any(received.experts_RK < exchange.capacity.experts_per_device, axis=1)
        return combine(jnp.where(is_here_R[:, None], received.payload * scale_1, 0), hops)

    tokens = P(TOKEN_AXES)
    mapped = jax.shard_map(run, mesh=exchange.mesh, in_specs=(tokens,) * 3, out_specs=tokens, check_vma=False)
    actual_TD = jax.jit(mapped, compiler_options=QUICK_COMPILE)(x_TD, experts_TK, scale_R)
    reached_TR = np.any(experts_TK[:, :, None] // 4 == np.arange(8), axis=1)
    y_TRD = np.asarray(x_TD[:, None] * scale_R[:, None]) * reached_TR[..., None].astype(x_TD.dtype)
    y_TND = y_TRD.astype(np.float32).reshape(-1, 2, 4, HIDDEN).sum(axis=2).astype(x_TD.dtype)
    np.testing.assert_array_equal(actual_TD, y_TND.astype(np.float32).sum(axis=1))


def check_hundred_routings():
    """Loads that change from call to call, from even to nearly one expert, neither compile anew nor lose anything."""
    exchange = Exchange({"node": 2, "gpu": 2}, 0.6)
    x_TD, weights_TK, params, cotangent_TD = draw_problem(exchange.num_tokens)
    run = exchange.map(exchange.run)
    rng = np.random.default_rng(2)
    for number in range(100):
        favour_E = 0.1 * number * rng.normal(size=NUM_EXPERTS)
        scores_TE = favour_E + rng.gumbel(size=(len(x_TD), NUM_EXPERTS))
        experts_TK = np.argsort(-scores_TE, axis=1)[:, :TOP_K].astype(np.int32)
        operands = (x_TD, experts_TK, weights_TK, params, cotangent_TD)
        assert_all_close(run(*operands), run_dense(*operands), FLOAT32, f"routing {number}")
    assert run._cache_size() == 1


def rounds_of_the_slowest(experts_TK: np.ndarray, capacity: Capacity) -> int:
    """Plays the rounds of devices that own consecutive tokens, by hand; returns how many the slowest takes."""
    experts_per_node, num_rounds = capacity.num_experts // capacity.num_nodes, 0
    for own_TK in experts_TK.reshape(-1, capacity.num_tokens, capacity.top_k).tolist():
        waiting = {
            node: [[e for e in chosen if e // experts_per_node == node] for chosen in own_TK]
            for node in range(capacity.num_nodes)
        }
        waiting = {node: [chosen for chosen in copies if chosen] for node, copies in waiting.items()}
        own_rounds = 0
        while any(waiting.values()):
            own_rounds += 1
            for node, copies in waiting.items():
                rows, choices, left = collections.Counter(), collections.Counter(), []
                for place, chosen in enumerate(copies):
                    choices.update(e // capacity.experts_per_device for e in chosen)
                    devices = {e // capacity.experts_per_device for e in chosen}
                    rows.update(devices)
                    fits = place < capacity.node_rows and all(
                        rows[d] <= capacity.device_rows and choices[d] <= capacity.device_choices for d in devices
                    )
                    if not fits:
                        left.append(chosen)
                waiting[node] = left
        num_rounds = max(num_rounds, own_rounds)
    return num_rounds


def check_further_rounds():
    """What is told of the rounds is what playing them by hand counts, by every group that exchanges for itself."""
    told = []
    for axes, factor in (
        ({"replica": 2, "node": 2, "gpu": 4}, 0.3), ({"node": 4, "gpu": 2}, 0.6), ({"gpu": 2}, 1.25), ({"gpu": 2}, 9.0),
    ):  # fmt: skip
        exchange = Exchange(axes, factor)
        x_TD, weights_TK, params, _ = draw_problem(exchange.num_tokens)

        def count(*operands, exchange=exchange):
            return exchange.count_rounds(*operands)[1][None]

        tokens, experts = P(TOKEN_AXES), P(EXPERT_AXES)
        in_specs = (tokens, tokens, tokens, experts)
        mapped = jax.shard_map(count, mesh=exchange.mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)
        run = jax.jit(mapped, compiler_options=QUICK_COMPILE)
        num_groups = exchange.sizes["replica"]
        for name, experts_TK in routings(len(x_TD), exchange.num_devices // num_groups, exchange.sizes["node"]).items():
            rounds = [rounds_of_the_slowest(part, exchange.capacity) for part in np.split(experts_TK, num_groups)]
            expected = np.repeat([max(0, count - 1) for count in rounds], exchange.num_devices // num_groups)
            actual = run(x_TD, experts_TK.astype(np.int32), weights_TK, params)
            np.testing.assert_array_equal(actual, expected, err_msg=f"{exchange.name} {name}")
            told.append(max(rounds) - 1)
    assert max(told) >= 3 and told.count(0) > 5, f"these routings tell little: {told}"


def check_rounds_of_a_step():
    """A step adds up the rounds of its layers and passes, once each, whatever the backward pass computes again."""
    chosen_K, num_passes, length = [0, 1, 8, 9], 2, 16
    model = ModelConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        first_k_dense_replace=1, num_nextn_predict_layers=1, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=NUM_EXPERTS, n_group=GROUPS,
        topk_group=TOPK_GROUP, num_experts_per_tok=TOP_K, precision="fp32", exchange_capacity=0.3, remat_policy="full",
    )  # fmt: skip
    config = RunConfig(
        model=model, mesh=MeshConfig(replica=2, node=2, gpu=2), data=DataConfig(sequence_length=length),
        train=TrainConfig(batch_size=8 * num_passes, microbatch_size=8, batch_ramp_tokens=0),
    )  # fmt: skip
    mesh = make_mesh(config.mesh, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        is_chosen_E = jnp.isin(jnp.arange(NUM_EXPERTS), jnp.array(chosen_K))
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + is_chosen_E if "e_score_correction_bias" in str(path) else leaf, state.params
        )
        tokens_ABT = split_batch(config, random_tokens(model, 0, config.train.batch_size, length + 1))
        step, settings = make_train_step(config, mesh), schedule.at(config.train, step=0, tokens=0)
        _, metrics = step(dataclasses.replace(state, params=params), tokens_ABT, settings)
    for load_LE in metrics["tokens_per_expert"].values():
        assert set(np.nonzero(np.asarray(load_LE))[1]) == set(chosen_K), "the routing is not what was asked for"
    capacity = exchange_capacity(model, length, functools.partial(num_devices, mesh))
    rounds = rounds_of_the_slowest(np.tile(chosen_K, (length, 1)), capacity)
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    assert rounds > 2
    assert int(metrics["exchange_further_rounds"]) == (rounds - 1) * moe_layers * num_passes, metrics


def check_rematerialised_layers():
    """Three layers in a scan, saved by name or computed again, have the gradients of three layers written out."""
    exchange = Exchange({"node": 2, "gpu": 2}, 0.6)
    x_TD, weights_TK, params, cotangent_TD = draw_problem(exchange.num_tokens)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1], -0.5 * leaf]), params)
    experts_TK = routings(len(x_TD), 4, 2)["zipf"].astype(np.int32)

    def differentiate(apply_layers, x_TD, experts_TK, weights_TK, params, cotangent_TD):
        def loss(x_TD, weights_TK, params):
            y_TD = apply_layers(x_TD, experts_TK, weights_TK, params)
            return jnp.sum(y_TD * cotangent_TD), y_TD

        (_, y_TD), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x_TD, weights_TK, params)
        return y_TD, gradients

    def written_out(x_TD, experts_TK, weights_TK, params):
        for layer in range(3):
            of_layer = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params)
            x_TD = x_TD + 0.1 * exchange.serve(x_TD, experts_TK, weights_TK, of_layer)
        return x_TD

    def scanned(policy, x_TD, experts_TK, weights_TK, params):
        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def layer(x_TD, of_layer):
            return x_TD + 0.1 * exchange.serve(x_TD, experts_TK, weights_TK, of_layer), None

        return jax.lax.scan(layer, x_TD, params)[0]

    operands = (x_TD, experts_TK, weights_TK, stacked, cotangent_TD)
    expected = exchange.map(functools.partial(differentiate, written_out), stacked_params=True)(*operands)
    num_sent = []
    for names in (("expert_routes", "expert_rows"), ()):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layers = functools.partial(differentiate, functools.partial(scanned, policy))
        run = exchange.map(layers, stacked_params=True)
        assert_all_close(run(*operands), expected, FLOAT32, f"scanned layers, {names} saved")
        num_sent.append(run.lower(*operands).as_text().count("stablehlo.all_to_all"))
    # A round takes two hops there and two back; in the backward pass the gradients of x and of the weights come back.
    assert num_sent == [2 * (2 + 2) + 2 * (2 + 4), 2 * (2 + 2) + 2 + 2 * (2 + 4)], "saved, sent again"


def check_experts_of_the_model():
    """The model's experts, float32 and FP8, on four devices with several rounds and on one give the same numbers.

    Tiles of 128 tokens hold other tokens on a mesh: their scales are powers of two, so only E4M3's subnormals move.
    """
    exchange = Exchange({"node": 2, "gpu": 2}, 0.6)
    rng = np.random.default_rng(3)
    experts_TK = routings(exchange.num_tokens, 4, 2)["zipf"].astype(np.int32)
    weights_TK = jnp.asarray(rng.random(experts_TK.shape), jnp.float32)
    x_TD, cotangent_TD = (jnp.asarray(rng.normal(size=(exchange.num_tokens, 128)), jnp.float32) for _ in range(2))
    gate_up_ED2F = jnp.asarray(rng.normal(size=(NUM_EXPERTS, 128, 2, 128)) / 8, jnp.float32)
    down_EFD = jnp.asarray(rng.normal(size=(NUM_EXPERTS, 128, 128)) / 8, jnp.float32)

    def run(is_fp8, capacity, x_TD, experts_TK, weights_TK, params, cotangent_TD):
        def loss(x_TD, weights_TK, params):
            functions, payload, weights = EXPERTS, x_TD, experts.ExpertWeights(*map(as_rounded, params))
            if is_fp8:
                payload = fp8_experts.pack(quantize_rows(pad_rows(jax.lax.stop_gradient(x_TD))), x_TD)
                functions, weights = FP8_EXPERTS, FeedForwardWeights(*map(quantize, params, (1, 1)))
            y_TD, _ = serve(functions, x_TD, payload, experts_TK, weights_TK, weights, capacity=capacity)
            return jnp.sum(y_TD * cotangent_TD), y_TD

        (_, y_TD), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x_TD, weights_TK, params)
        return y_TD, gradients

    def quantize(weight, contracted_dims):
        return quantize_weight(
            weight, contracted_dims=contracted_dims, batch_dims=1, input_cache="e4m3", with_gradient=True
        )

    operands = (x_TD, experts_TK, weights_TK, (gate_up_ED2F, down_EFD), cotangent_TD)
    for is_fp8, tolerance in ((False, FLOAT32), (True, 2e-5)):
        on_one = jax.jit(functools.partial(run, is_fp8, None), compiler_options=QUICK_COMPILE)(*operands)
        on_four = exchange.map(functools.partial(run, is_fp8, exchange.capacity))(*operands)
        assert_all_close(on_four, on_one, tolerance, f"fp8 {is_fp8}")


def check_bytes():
    """The compiled program sends the planned bytes and nothing else: a token's row crosses nodes once."""
    exchange = Exchange({"node": 4, "gpu": 2, "tensor": 2}, 0.6)
    capacity = exchange.capacity
    assert not capacity.goes_to_every_node and not capacity.goes_to_every_device
    x_TD, weights_TK, params, _ = draw_problem(exchange.num_tokens)
    tokens, experts = P(TOKEN_AXES), P(EXPERT_AXES)
    in_specs = (tokens, tokens, tokens, experts)
    mapped = jax.shard_map(exchange.serve, mesh=exchange.mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)
    experts_TK = jnp.zeros((len(x_TD), TOP_K), jnp.int32)
    program = jax.jit(mapped, compiler_options=QUICK_COMPILE).lower(x_TD, experts_TK, weights_TK, params).compile()
    like = {"experts": jnp.zeros((1, TOP_K), jnp.uint16), "weights": weights_TK[:1], "x": x_TD[:1]}
    dispatched = capacity.bytes_sent(row_packing.row_bytes(row_packing.row_specs(like)))
    returned = capacity.bytes_sent(x_TD[0].nbytes)
    node = dispatched["node"] + returned["node"]
    inner = dispatched["inner"] + returned["inner"]
    for further_rounds in (0, 3):
        sent = {
            (collective.kind, collective.axes): (collective.num_runs, collective.sent_bytes)
            for collective in traffic.collectives(
                hlo.parse(program.as_text()), exchange.sizes, devices_per_host=4,
                dynamic_trips=lambda loop, further_rounds=further_rounds: further_rounds,
            )
        }  # fmt: skip
        rounds = 1 + further_rounds
        is_enough_bytes = 2 * 4 * 15 // 16  # to learn by one int32 whether the devices need another round
        assert sent == {
            ("all-to-all", ("node",)): (2 * rounds, node * rounds),
            ("all-to-all", ("gpu", "tensor")): (2 * rounds, inner * rounds),
            ("all-reduce", ("node", "gpu", "tensor")): (rounds, is_enough_bytes * rounds),
        }, (sent, node, inner)


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()
