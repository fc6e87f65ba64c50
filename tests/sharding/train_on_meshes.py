"""Run by test_mesh_training.py: trains on one of 16 CPU devices and on meshes of them. Exits nonzero on a difference.

    python train_on_meshes.py PRECISION MESH...      where MESH is, for example, node=2,gpu=2,tensor=2,fsdp=1,room=30

room: percent of what the exchange of tokens needs at uniform routing, so that it takes several rounds.
"""

import dataclasses
import functools
import sys

import jax
import numpy as np

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig, override
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import random_tokens, telling_params
from dsv3_jax.train import schedule
from dsv3_jax.train.state import fresh_state, state_shardings
from dsv3_jax.train.step import make_train_step, split_batch

NUM_STEPS = 20
LENGTH = 16
BIAS_SPEED = 0.02

# Relative differences that a run may show beside one device: losses of the first step, losses of all, norm of every
# parameter's total movement, and the share of choices of experts. float32 differs by the order of sums alone, until a
# token finds two experts equally good and takes the other one. In bfloat16 partial sums of heads and experts are
# rounded to 8 bits before they meet, in FP8 tiles of 128 tokens besides hold other tokens; 20 steps of Adam, which
# divides by the gradient's size, let either grow.
TOLERANCES = {"fp32": (1e-6, 1e-4, 1e-2, 2e-3), "bf16": (2e-3, 1e-2, 0.3, 0.2), "fp8": (5e-3, 2e-2, 0.6, 0.3)}
EXACT_STEPS = 3  # in float32 choices and biases are the same so long


def run_config(precision: str, mesh: MeshConfig) -> RunConfig:
    """Returns a network in which every axis splits something, two passes a step, and a fast-moving correction bias."""
    widths = dict(hidden_size=48, intermediate_size=64, moe_intermediate_size=16, kv_lora_rank=32, q_lora_rank=48,
                  qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12)  # fmt: skip
    if precision == "fp8":  # parts of weights are whole blocks, so that one device and many round alike
        widths |= dict(hidden_size=64, intermediate_size=256, moe_intermediate_size=32, qk_rope_head_dim=64,
                       qk_nope_head_dim=64, v_head_dim=64)  # fmt: skip
    model = ModelConfig(
        vocab_size=61, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1, num_attention_heads=4,
        n_shared_experts=1, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, precision=precision,
        max_position_embeddings=64, remat_policy="report", **widths,
    )  # fmt: skip
    train = TrainConfig(
        num_steps=NUM_STEPS, batch_size=16, microbatch_size=8, batch_ramp_tokens=0, warmup_steps=1, learning_rate=1e-4,
        loss_chunk_tokens=24, bias_update_speed=BIAS_SPEED, balance_loss_alpha=0.01,
    )  # fmt: skip
    return RunConfig(model=model, mesh=mesh, data=DataConfig(sequence_length=LENGTH), train=train)


def train(config: RunConfig, num_devices: int) -> tuple[list[dict], dict, dict]:
    """Returns the metrics of every step, and the parameters before and after all."""
    mesh = make_mesh(config.mesh, devices=jax.devices()[:num_devices])
    before = telling_params(config.model, 0, init_std=0.1)
    metrics = []
    with jax.set_mesh(mesh):
        step = make_train_step(config, mesh)
        begin = jax.jit(functools.partial(fresh_state, config), out_shardings=state_shardings(config, mesh))
        state = begin(before)
        for index in range(NUM_STEPS):
            tokens_BT = random_tokens(config.model, index, config.train.batch_size, LENGTH + 1)
            tokens_ABT = split_batch(config, tokens_BT)
            state, step_metrics = step(state, tokens_ABT, schedule.at(config.train, step=index, tokens=10**9))
            metrics.append(jax.device_get(step_metrics))
    return metrics, before, jax.device_get(state.params)


def check(precision: str, name: str, actual: tuple, expected: tuple) -> None:
    """Raises AssertionError unless a run on a mesh agrees with one device."""
    first, later, movement, choices = TOLERANCES[precision]
    for index, (mine, wanted) in enumerate(zip(actual[0], expected[0], strict=True)):
        for loss in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            tolerance = later if index else first
            if index and loss in ("balance_loss", "grad_norm"):  # a token's other choice shows here most
                tolerance = 10 * tolerance
            np.testing.assert_allclose(mine[loss], wanted[loss], rtol=tolerance, err_msg=f"{name}: {loss}, {index}")
        for stack, tokens_LE in wanted["tokens_per_expert"].items():
            load_LE = mine["tokens_per_expert"][stack]
            assert (load_LE.sum(axis=-1) == tokens_LE.sum(axis=-1)).all(), f"{name}: tokens were lost in {stack}"
            is_exact = precision == "fp32" and index < EXACT_STEPS
            other = np.abs(load_LE - tokens_LE).sum(axis=-1) / tokens_LE.sum(axis=-1)
            assert (other <= (0 if is_exact else choices)).all(), f"{name}: {stack}, step {index}: loads off by {other}"
    for (path, after), before, wanted in zip(
        jax.tree_util.tree_leaves_with_path(actual[2]), jax.tree.leaves(expected[1]), jax.tree.leaves(expected[2])
    ):
        label = f"{name}: {jax.tree_util.keystr(path)}"
        if "e_score_correction_bias" in label:
            moves = np.abs(after - wanted).mean() / BIAS_SPEED  # loads beside the mean turn one way or the other
            assert moves <= (0.5 if precision == "fp32" else NUM_STEPS / 4), f"{label}: {moves} moves apart"
            continue
        error, moved = np.linalg.norm(after - wanted), np.linalg.norm(wanted - before)
        assert error <= movement * moved, f"{label}: off by {error:.3g} after moving by {moved:.3g}"


def main(precision: str, *meshes: str) -> None:
    expected = train(run_config(precision, MeshConfig(gpu=1)), 1)
    assert expected[0][-1]["loss"] < expected[0][0]["loss"] + 1 and all(step["is_good"] for step in expected[0])
    for name in meshes:
        axes = {axis: int(size) for axis, size in (pair.split("=") for pair in name.split(","))}
        fsdp, room = bool(axes.pop("fsdp", 0)), axes.pop("room", None)
        config = run_config(precision, dataclasses.replace(MeshConfig(gpu=1), fsdp=fsdp, **axes))
        if room:
            config = override(config, {"model.exchange_capacity": room / 100})
        check(precision, name, train(config, int(np.prod(list(axes.values())))), expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
