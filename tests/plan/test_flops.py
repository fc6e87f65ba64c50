"""FLOPs counted in traces, against closed formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig, override
from dsv3_jax.kernels import device
from dsv3_jax.kernels.attention import attend, attention_gradients
from dsv3_jax.kernels.block_quantize import quantize_rows
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.plan import flops
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train.flops import train_flops_per_token
from dsv3_jax.train.step import trace_train_step


def struct(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def count(function, *arguments, trips: int = 1, num_devices: int = 1, expert_rows: int | None = None) -> flops.Work:
    traced = jax.jit(function).trace(*arguments)
    return flops.count(traced, num_devices=num_devices, dynamic_trips=lambda _: trips, expert_rows=expert_rows)


def test_product_counts_two_per_multiplication_by_the_precision_of_its_operands():
    fp8 = struct(4, 5, dtype=jnp.float8_e4m3fn)
    assert count(jnp.matmul, struct(3, 4), struct(4, 5)) == {"bf16": 2 * 3 * 4 * 5}
    assert count(jnp.matmul, struct(3, 4, dtype=jnp.float32), struct(4, 5, dtype=jnp.float32)) == {"fp32": 120}
    assert count(lambda a, b: jax.lax.dot(a, b), struct(3, 4, dtype=jnp.float8_e4m3fn), fp8) == {"fp8": 120}


def test_batched_product_counts_every_matrix():
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), struct(7, 3, 4), struct(7, 4, 5)) == {"bf16": 7 * 120}


def test_scan_counts_at_its_length_through_its_gradient():
    def loss(x, weights):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    product = 2 * 3 * 8 * 8
    work = count(jax.grad(loss, argnums=(0, 1)), struct(3, 8), struct(5, 8, 8))
    assert work == {"bf16": 5 * 4 * product}, "forward, again for the backward pass, and two gradients"


def test_loop_of_unknown_length_counts_as_often_as_said():
    def function(n, x):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    assert count(function, struct(dtype=jnp.int32), struct(4, 4), trips=6) == {"bf16": 6 * 128}


def test_of_branches_the_costliest_counts():
    def function(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count(function, struct(dtype=jnp.bool_), struct(4, 4)) == {"bf16": 2 * 128}


def test_shards_count_as_one_device_sees_them_and_the_rest_is_shared_out():
    mesh = jax.sharding.AbstractMesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def function(a, b):
        local = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False)
        return local(a, b) @ b

    work = count(function, struct(8, 4), struct(4, 4), num_devices=4)
    assert work == {"bf16": 2 * 2 * 4 * 4 + 2 * 8 * 4 * 4 / 4}


def test_attention_kernels_count_the_lower_triangle_forward_and_backward():
    batch, length, heads, key_dim, value_dim, rope_dim = 2, 256, 4, 192, 128, 64
    q, v = struct(batch, length, heads, key_dim), struct(batch, length, heads, value_dim)
    keys = struct(batch, length, heads, key_dim - rope_dim + value_dim), struct(batch, length, rope_dim)
    lse = struct(batch, heads, length, dtype=jnp.float32)

    pairs = batch * heads * length * (length + 1) / 2
    with device.lowering_for_hopper():
        forward = count(functools.partial(attend, scale=1.0), q, *keys)
        backward = count(functools.partial(attention_gradients, scale=1.0), q, *keys, v, lse, v)
    assert forward["bf16"] == 2 * pairs * (key_dim + value_dim)
    output_times_its_gradient = 2 * batch * heads * length * value_dim
    assert 0 <= sum(backward.values()) - 2 * pairs * (4 * key_dim + 3 * value_dim) <= output_times_its_gradient


def test_fp8_product_counts_as_fp8():
    a, b = struct(256, 384), struct(128, 384)
    with device.lowering_for_hopper():
        work = count(lambda a, b: fp8_matmul(quantize_rows(a), quantize_rows(b)), a, b)
    assert work == {"fp8": 2 * 256 * 384 * 128}


def test_rows_of_experts_count_up_to_those_that_hold_tokens():
    rows, inputs, outputs, experts = 512, 128, 256, 4

    multiply = functools.partial(grouped_matmul, alignment=128)

    def loss(x, weights, sizes):
        return jnp.sum(multiply(x, weights, sizes).astype(jnp.float32))

    arguments = struct(rows, inputs), struct(experts, inputs, outputs), struct(experts, dtype=jnp.int32)
    product = 2 * rows * inputs * outputs
    with device.lowering_for_hopper():
        assert count(multiply, *arguments) == {"bf16": product}
        assert count(multiply, *arguments, expert_rows=rows // 2) == {"bf16": product / 2}
        assert count(jax.grad(loss, argnums=(0, 1)), *arguments) == {"bf16": 3 * product}


def test_a_weight_gradient_in_parts_counts_all_tokens_however_few_rows_the_experts_have():
    outputs, inputs, tokens = 128, 256, 8192
    dy, x = struct(outputs, tokens), struct(inputs, tokens)

    def gradient(dy, x):
        return fp8_matmul(quantize_rows(dy), quantize_rows(x), out_dtype=jnp.float32)

    with device.lowering_for_hopper():
        jaxpr = str(jax.make_jaxpr(gradient)(dy, x))
        work = count(gradient, dy, x, expert_rows=64)
    assert f"f32[8,{outputs},{inputs}]" in jaxpr, "the tokens are multiplied in parts"
    assert work == {"fp8": 2 * outputs * tokens * inputs}


def test_kernel_of_unknown_work_is_refused_rather_than_left_out(monkeypatch):
    monkeypatch.setattr(flops, "_ATTENTION", {})
    operands = struct(1, 128, 1, 192), struct(1, 128, 1, 256), struct(1, 128, 64)
    with device.lowering_for_hopper(), pytest.raises(ValueError, match=r"attention_forward multiplies"):
        count(functools.partial(attend, scale=1.0), *operands)


TINY = RunConfig(
    model=ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, first_k_dense_replace=2,
        num_nextn_predict_layers=0, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=128,
    ),
    mesh=MeshConfig(gpu=1),
    data=DataConfig(sequence_length=256),
    train=TrainConfig(batch_size=2, batch_ramp_tokens=0),
)  # fmt: skip


def test_another_layer_of_a_training_step_counts_as_the_usual_formula_says():
    """Attention apart, where kernels compute more than the formula credits."""

    def step_flops(config: RunConfig) -> float:
        mesh = make_mesh(config.mesh, devices=jax.devices()[:1])
        work = flops.count(trace_train_step(config, mesh), num_devices=1, dynamic_trips=lambda _: 1)
        return sum(work.values())

    tokens, length = 2 * 256, TINY.data.sequence_length
    larger = override(TINY, {"model.num_hidden_layers": 4, "model.first_k_dense_replace": 4})
    with device.lowering_for_hopper():
        counted = (step_flops(larger) - step_flops(TINY)) / 2
    model, without_heads = TINY.model, dataclasses.replace(TINY.model, num_hidden_layers=3, first_k_dense_replace=3)
    needed = tokens * (
        train_flops_per_token(without_heads, sequence_length=0) - train_flops_per_token(model, sequence_length=0)
    )
    pairs = 2 * model.num_attention_heads * length * (length + 1) / 2
    attention_flops = 2 * pairs * (5 * model.qk_head_dim + 4 * model.v_head_dim)
    small = 2 * tokens * model.num_attention_heads * model.v_head_dim  # output times its gradient
    assert 0 <= counted - needed - attention_flops <= 2 * small
