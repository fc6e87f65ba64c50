"""Causal attention for Hopper GPUs: persistent Pallas Mosaic GPU kernels for the output and its gradients.

Layout. Operands lie as the model makes them, [B, T, N, width] in a 16-bit float type, T a multiple of 128, widths
multiples of 64; log-sum-exp and the row sums of out · dout are float32 [B, N, T], in base-2 logarithms.

A thread block has two multiplying warpgroups of 64 rows each (one wgmma) and one that copies blocks through a ring of
shared-memory slots and runs ahead across tiles. Tiles are taken longest first, a few heads at a time: the causal
triangle stays balanced over the SMs and the heads' blocks stay in L2. The backward pass recomputes the scores twice, in
two kernels, instead of adding query gradients atomically in one: gradients repeat bit for bit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 128  # rows of a thread block's tile
ROWS = 64  # rows of one warpgroup
WARPGROUPS = 2
KEY_BLOCK = 128  # keys per step of the forward pass
GRADIENT_BLOCK = 64  # rows per step of the backward pass: accumulators and two 64 x 64 products fill the registers
STAGES = 2
NUM_SMS = 132  # H100 SXM and H200; one persistent thread block each
HEADS_TOGETHER = 8  # heads swept together, so that their keys and values stay in L2
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
LOG2_E = math.log2(math.e)

ROW_VECTOR = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a wgmma tile
COLUMN_VECTOR = plgpu.Layout.WGMMA.reduce(0)  # one value per column


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, scale: float) -> jax.Array:
    """Computes softmax(scale · q kᵀ + causal mask) v per head; [B, T, N, U] in q's dtype."""
    return attend(q_BTNX, k_BTNX, v_BTNU, scale)[0]


def _forward(q_BTNX, k_BTNX, v_BTNU, scale):
    out_BTNU, lse_BNT = attend(q_BTNX, k_BTNX, v_BTNU, scale)
    out_BTNU = checkpoint_name(out_BTNU, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNU, (q_BTNX, k_BTNX, v_BTNU, out_BTNU, lse_BNT)


def _backward(scale, residuals, dout_BTNU):
    q_BTNX, k_BTNX, v_BTNU, out_BTNU, lse_BNT = residuals
    delta_BNT = jnp.einsum("BTNU,BTNU->BNT", out_BTNU, dout_BTNU, preferred_element_type=jnp.float32)
    operands = (q_BTNX, k_BTNX, v_BTNU, dout_BTNU, lse_BNT, delta_BNT)
    dk_BTNX, dv_BTNU = key_value_gradients(*operands, scale)
    return query_gradient(*operands, scale), dk_BTNX, dv_BTNU


causal_attention.defvjp(_forward, _backward)


def attend(q_BTNX: jax.Array, k_BTNX: jax.Array, v_BTNU: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, U] and the base-2 log-sum-exp of the scaled scores, float32 [B, N, T]."""
    batch, length, num_heads, width = q_BTNX.shape
    value_width, dtype = v_BTNU.shape[-1], q_BTNX.dtype
    tiles = _Tiles(batch, num_heads, length // TILE, longest_is_last=True)

    def attention_forward(
        q, k, v, out, lse,
        q_or_out_smem, k_smem, v_smem, lse_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        q_smem, out_smem = q_or_out_smem

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(warpgroup == WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(tile, slot):
                b, h, block = tile

                def load_step(step, slot):
                    keys = pl.ds(step * KEY_BLOCK, KEY_BLOCK)
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.copy_gmem_to_smem(k.at[b, keys, h], k_smem.at[slot], k_full.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])
                    plgpu.copy_gmem_to_smem(v.at[b, keys, h], v_smem.at[slot], v_full.at[slot])
                    return _next(slot)

                slot = load_step(0, slot)  # before the queries, whose buffer the last tile's output still leaves
                for i in range(WARPGROUPS):
                    rows = pl.ds(block * TILE + i * ROWS, ROWS)
                    plgpu.barrier_wait(q_free.at[i])
                    plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_smem.at[i], q_full.at[i])
                return lax.fori_loop(1, block + 1, load_step, slot)

            slot = tiles.for_each(load_tile, jnp.int32(0))
            _drain(slot, k_free, v_free)
            for i in range(WARPGROUPS):
                plgpu.barrier_wait(q_free.at[i])

        @pl.when(warpgroup < WARPGROUPS)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _open(k_free, v_free)
            plgpu.barrier_arrive(q_free.at[warpgroup])
            own_q = q_smem.at[warpgroup]

            def attend_tile(tile, slot):
                b, h, block = tile
                first_row = block * TILE + warpgroup * ROWS
                plgpu.barrier_wait(q_full.at[warpgroup])

                def attend_block(step, carry, *, is_masked):
                    slot, acc, maximum, total = carry
                    plgpu.barrier_wait(k_full.at[slot])

                    def multiply_keys(acc_ref):
                        plgpu.wgmma(acc_ref, own_q, k_smem.at[slot].T)
                        take_turns()  # one warpgroup multiplies while the other computes its softmax
                        return acc_ref[...]

                    scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, KEY_BLOCK), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    if is_masked:
                        is_visible = _row_ids(scores.shape, first_row) >= _column_ids(scores.shape, step * KEY_BLOCK)
                        scores = jnp.where(is_visible, scores, -jnp.inf)
                    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * (scale * LOG2_E))
                    correction = jnp.exp2(maximum - new_maximum)
                    weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
                    acc = acc * lax.broadcast_in_dim(correction, acc.shape, [0])
                    total = total * correction + weights.sum(axis=1)
                    weights = weights.astype(dtype)
                    acc, total, new_maximum, weights = lax.optimization_barrier((acc, total, new_maximum, weights))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn)
                    acc = _accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_smem.at[slot]))
                    plgpu.barrier_arrive(v_free.at[slot])
                    return _next(slot), acc, new_maximum, total

                pl.when(warpgroup == 1)(take_turns)
                carry = (slot, _zeros((ROWS, value_width)), _filled(-jnp.inf), _filled(0.0))
                carry = lax.fori_loop(0, block, functools.partial(attend_block, is_masked=False), carry)
                slot, acc, maximum, total = attend_block(block, carry, is_masked=True)
                pl.when(warpgroup == 0)(take_turns)

                own_out = out_smem.at[warpgroup]
                own_out[...] = (acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])).astype(dtype)
                lse_smem[warpgroup] = maximum + jnp.log(total) * LOG2_E
                plgpu.commit_smem()
                rows = pl.ds(first_row, ROWS)
                plgpu.copy_smem_to_gmem(own_out, out.at[b, rows, h])
                plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[b, h, rows])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[warpgroup])
                return slot

            tiles.for_each(attend_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    results = _kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct(v_BTNU.shape, dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        ),
        scratch_types=(
            plgpu.RefUnion(
                _block(WARPGROUPS, ROWS, width, dtype),
                _block(WARPGROUPS, ROWS, value_width, dtype),
            ),
            _block(STAGES, KEY_BLOCK, width, dtype),
            _block(STAGES, KEY_BLOCK, value_width, dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            *_ring(STAGES),
            *_ring(STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
    )(q_BTNX, k_BTNX, v_BTNU)
    # Without the barrier XLA runs the kernel twice where a loop also stacks its results for the backward pass.
    return lax.optimization_barrier(results)


def query_gradient(q_BTNX, k_BTNX, v_BTNU, dout_BTNU, lse_BNT, delta_BNT, scale: float) -> jax.Array:
    """Returns the gradient of the queries, [B, T, N, X] in q's dtype."""
    batch, length, num_heads, width = q_BTNX.shape
    value_width, dtype, stages = v_BTNU.shape[-1], q_BTNX.dtype, 3
    tiles = _Tiles(batch, num_heads, length // TILE, longest_is_last=True)
    blocks_per_tile = TILE // GRADIENT_BLOCK

    def attention_query_gradient(
        q, k, v, dout, lse, delta, dq,
        q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem, rows_full, rows_free, k_full, k_free, v_full, v_free,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(tile, slot):
                b, h, block = tile

                def load_step(step, slot):
                    keys = pl.ds(step * GRADIENT_BLOCK, GRADIENT_BLOCK)
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.copy_gmem_to_smem(k.at[b, keys, h], k_smem.at[slot], k_full.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])
                    plgpu.copy_gmem_to_smem(v.at[b, keys, h], v_smem.at[slot], v_full.at[slot])
                    return _next(slot, stages)

                slot = lax.fori_loop(0, blocks_per_tile, load_step, slot)  # a tile has at least these
                for i in range(WARPGROUPS):
                    rows, barrier = pl.ds(block * TILE + i * ROWS, ROWS), rows_full.at[i]
                    plgpu.barrier_wait(rows_free.at[i])
                    plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_smem.at[i], barrier)
                    plgpu.copy_gmem_to_smem(dout.at[b, rows, h], dout_smem.at[i], barrier)
                    plgpu.copy_gmem_to_smem(lse.at[b, h, rows], lse_smem.at[i], barrier)
                    plgpu.copy_gmem_to_smem(delta.at[b, h, rows], delta_smem.at[i], barrier)
                return lax.fori_loop(blocks_per_tile, (block + 1) * blocks_per_tile, load_step, slot)

            slot = tiles.for_each(load_tile, jnp.int32(0))
            _drain(slot, k_free, v_free, stages=stages)
            for i in range(WARPGROUPS):
                plgpu.barrier_wait(rows_free.at[i])

        @pl.when(warpgroup < WARPGROUPS)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _open(k_free, v_free, stages=stages)
            plgpu.barrier_arrive(rows_free.at[warpgroup])
            own_q, own_dout = q_smem.at[warpgroup], dout_smem.at[warpgroup]

            def differentiate_tile(tile, slot):
                b, h, block = tile
                first_row = block * TILE + warpgroup * ROWS
                plgpu.barrier_wait(rows_full.at[warpgroup])
                row_lse = plgpu.layout_cast(lse_smem[warpgroup], ROW_VECTOR)
                row_delta = plgpu.layout_cast(delta_smem[warpgroup], ROW_VECTOR)

                def differentiate_block(step, carry, *, is_masked):
                    slot, acc = carry
                    shape = (ROWS, GRADIENT_BLOCK)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_wait(v_full.at[slot])

                    def multiply(scores_ref):
                        def multiply_again(dweights_ref):
                            plgpu.wgmma(scores_ref, own_q, k_smem.at[slot].T)
                            plgpu.wgmma(dweights_ref, own_dout, v_smem.at[slot].T)
                            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                            weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(row_lse, shape, [0]))
                            return weights, dweights_ref[...]

                        return pl.run_scoped(multiply_again, plgpu.ACC(shape, jnp.float32))

                    weights, dweights = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_arrive(v_free.at[slot])
                    dscores = weights * (dweights - lax.broadcast_in_dim(row_delta, shape, [0]))
                    if is_masked:
                        is_visible = _row_ids(shape, first_row) >= _column_ids(shape, step * GRADIENT_BLOCK)
                        dscores = jnp.where(is_visible, dscores, 0.0)
                    dscores = dscores.astype(dtype)
                    acc = _accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, dscores, k_smem.at[slot]))
                    plgpu.barrier_arrive(k_free.at[slot])
                    return _next(slot, stages), acc

                carry = (slot, _zeros((ROWS, width)))
                first_masked = block * blocks_per_tile
                carry = lax.fori_loop(0, first_masked, functools.partial(differentiate_block, is_masked=False), carry)
                slot, acc = lax.fori_loop(
                    first_masked,
                    first_masked + blocks_per_tile,
                    functools.partial(differentiate_block, is_masked=True),
                    carry,
                )
                own_q[...] = (acc * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_q, dq.at[b, pl.ds(first_row, ROWS), h])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(rows_free.at[warpgroup])
                return slot

            tiles.for_each(differentiate_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return _kernel(
        attention_query_gradient,
        out_type=jax.ShapeDtypeStruct(q_BTNX.shape, dtype),
        scratch_types=(
            _block(WARPGROUPS, ROWS, width, dtype),
            _block(WARPGROUPS, ROWS, value_width, dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            _block(stages, GRADIENT_BLOCK, width, dtype),
            _block(stages, GRADIENT_BLOCK, value_width, dtype),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=4),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            *_ring(stages),
            *_ring(stages),
        ),
    )(q_BTNX, k_BTNX, v_BTNU, dout_BTNU, lse_BNT, delta_BNT)


def key_value_gradients(
    q_BTNX, k_BTNX, v_BTNU, dout_BTNU, lse_BNT, delta_BNT, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the keys, [B, T, N, X], and of the values, [B, T, N, U], in q's dtype.

    Both gradients of a tile would not fit one warpgroup's registers. One warpgroup makes the softmax weights and the
    value gradient, the other takes the weights through shared memory and makes the key gradient: equal work at X = 192
    and U = 128.
    """
    batch, length, num_heads, width = q_BTNX.shape
    value_width, dtype, stages = v_BTNU.shape[-1], q_BTNX.dtype, 3
    num_blocks = length // GRADIENT_BLOCK
    tiles = _Tiles(batch, num_heads, num_blocks, longest_is_last=False)
    shape = (ROWS, GRADIENT_BLOCK)  # products are transposed: a row is a key, a column a query

    def attention_key_value_gradients(
        q, k, v, dout, lse, delta, dk, dv,
        k_smem, v_smem, dk_smem, dv_smem, weights_smem, q_smem, dout_smem, lse_smem, delta_smem,
        k_full, k_free, v_full, v_free, weights_full, weights_free, q_full, q_free, dout_full, dout_free,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(tile, slot):
                b, h, block = tile
                keys = pl.ds(block * ROWS, ROWS)
                plgpu.barrier_wait(k_free)
                plgpu.copy_gmem_to_smem(k.at[b, keys, h], k_smem, k_full)
                plgpu.barrier_wait(v_free)
                plgpu.copy_gmem_to_smem(v.at[b, keys, h], v_smem, v_full)

                def load_step(step, slot):
                    queries = pl.ds(step * GRADIENT_BLOCK, GRADIENT_BLOCK)
                    plgpu.barrier_wait(q_free.at[slot])
                    plgpu.copy_gmem_to_smem(q.at[b, queries, h], q_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(lse.at[b, h, queries], lse_smem.at[slot], q_full.at[slot])
                    plgpu.barrier_wait(dout_free.at[slot])
                    plgpu.copy_gmem_to_smem(dout.at[b, queries, h], dout_smem.at[slot], dout_full.at[slot])
                    plgpu.copy_gmem_to_smem(delta.at[b, h, queries], delta_smem.at[slot], dout_full.at[slot])
                    return _next(slot, stages)

                return lax.fori_loop(block, num_blocks, load_step, slot)

            slot = tiles.for_each(load_tile, jnp.int32(0))
            _drain(slot, q_free, dout_free, stages=stages)
            plgpu.barrier_wait(k_free)
            plgpu.barrier_wait(v_free)

        @pl.when(warpgroup == 0)
        def _make_value_gradient():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _open(q_free, dout_free, stages=stages)
            plgpu.barrier_arrive(k_free)

            def differentiate_tile(tile, carry):
                b, h, block = tile
                plgpu.barrier_wait(k_full)

                def differentiate_block(step, carry, *, is_masked):
                    slot, weights_slot, acc = carry
                    plgpu.barrier_wait(q_full.at[slot])

                    def multiply(acc_ref):
                        plgpu.wgmma(acc_ref, k_smem, q_smem.at[slot].T)
                        return acc_ref[...]

                    scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                    column_lse = plgpu.layout_cast(lse_smem[slot], COLUMN_VECTOR)
                    weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(column_lse, shape, [1]))
                    if is_masked:
                        weights = jnp.where(_row_ids(shape, 0) <= _column_ids(shape, 0), weights, 0.0)
                    weights = weights.astype(dtype)
                    plgpu.barrier_wait(weights_free.at[weights_slot])
                    weights_smem[weights_slot] = weights
                    plgpu.commit_smem()  # also orders the read of lse before its refill
                    plgpu.barrier_arrive(weights_full.at[weights_slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    plgpu.barrier_wait(dout_full.at[slot])
                    acc = _accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, weights, dout_smem.at[slot]))
                    plgpu.barrier_arrive(dout_free.at[slot])
                    return _next(slot, stages), 1 - weights_slot, acc

                carry = differentiate_block(block, (*carry, _zeros((ROWS, value_width))), is_masked=True)
                carry = lax.fori_loop(
                    block + 1, num_blocks, functools.partial(differentiate_block, is_masked=False), carry
                )
                plgpu.barrier_arrive(k_free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_smem[...] = carry[2].astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_smem, dv.at[b, pl.ds(block * ROWS, ROWS), h])
                return carry[:2]

            _, weights_slot = tiles.for_each(differentiate_tile, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)
            for _ in range(2):
                plgpu.barrier_wait(weights_free.at[weights_slot])
                weights_slot = 1 - weights_slot

        @pl.when(warpgroup == 1)
        def _make_key_gradient():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _open(q_free, dout_free, stages=stages)
            _open(weights_free, stages=2)
            plgpu.barrier_arrive(v_free)

            def differentiate_tile(tile, carry):
                b, h, block = tile
                plgpu.barrier_wait(v_full)

                def multiply_values(slot, meanwhile):
                    plgpu.barrier_wait(dout_full.at[slot])

                    def multiply(acc_ref):
                        plgpu.wgmma(acc_ref, v_smem, dout_smem.at[slot].T)
                        done = meanwhile()
                        return acc_ref[...], done

                    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

                def differentiate_scores(slot, weights_slot, dweights):
                    column_delta = plgpu.layout_cast(delta_smem[slot], COLUMN_VECTOR)
                    dweights = dweights - lax.broadcast_in_dim(column_delta, shape, [1])
                    plgpu.barrier_wait(weights_full.at[weights_slot])
                    weights = plgpu.layout_cast(weights_smem[weights_slot], plgpu.Layout.WGMMA)
                    dscores = (weights.astype(jnp.float32) * dweights).astype(dtype)
                    plgpu.commit_smem()  # orders the read of delta before its refill
                    plgpu.barrier_arrive(weights_free.at[weights_slot])
                    plgpu.barrier_arrive(dout_free.at[slot])
                    return dscores

                def multiply_queries(slot, dscores, acc):
                    plgpu.barrier_wait(q_full.at[slot])
                    acc = _accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, dscores, q_smem.at[slot]))
                    plgpu.barrier_arrive(q_free.at[slot])
                    return acc

                def differentiate_block(_, carry):
                    slot, weights_slot, dweights, acc = carry
                    differentiate = functools.partial(differentiate_scores, slot, weights_slot, dweights)
                    next_dweights, dscores = multiply_values(_next(slot, stages), differentiate)
                    return _next(slot, stages), 1 - weights_slot, next_dweights, multiply_queries(slot, dscores, acc)

                slot, weights_slot = carry
                dweights, _ = multiply_values(slot, lambda: None)
                carry = (slot, weights_slot, dweights, _zeros((ROWS, width)))
                slot, weights_slot, dweights, acc = lax.fori_loop(block, num_blocks - 1, differentiate_block, carry)
                acc = multiply_queries(slot, differentiate_scores(slot, weights_slot, dweights), acc)
                carry = (_next(slot, stages), 1 - weights_slot, acc)
                plgpu.barrier_arrive(v_free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dk_smem[...] = (carry[2] * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dk_smem, dk.at[b, pl.ds(block * ROWS, ROWS), h])
                return carry[:2]

            tiles.for_each(differentiate_tile, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

    return _kernel(
        attention_key_value_gradients,
        out_type=(jax.ShapeDtypeStruct(k_BTNX.shape, dtype), jax.ShapeDtypeStruct(v_BTNU.shape, dtype)),
        scratch_types=(
            _block(ROWS, width, dtype),
            _block(ROWS, value_width, dtype),
            _block(ROWS, width, dtype),
            _block(ROWS, value_width, dtype),
            _block(2, *shape, dtype),
            _block(stages, GRADIENT_BLOCK, width, dtype),
            _block(stages, GRADIENT_BLOCK, value_width, dtype),
            plgpu.SMEM((stages, GRADIENT_BLOCK), jnp.float32),
            plgpu.SMEM((stages, GRADIENT_BLOCK), jnp.float32),
            *(plgpu.Barrier(),) * 4,
            *(plgpu.Barrier(num_barriers=2),) * 2,
            *_ring(stages, copies=2),
            *_ring(stages, copies=2),
        ),
    )(q_BTNX, k_BTNX, v_BTNU, dout_BTNU, lse_BNT, delta_BNT)


class _Tiles:
    """The order in which thread blocks take the (batch, head, block of rows) tiles."""

    def __init__(self, batch: int, num_heads: int, num_blocks: int, *, longest_is_last: bool):
        self.num_heads, self.num_blocks, self.longest_is_last = num_heads, num_blocks, longest_is_last
        self.heads_together = math.gcd(HEADS_TOGETHER, batch * num_heads)
        self.count = batch * num_heads * num_blocks

    def for_each(self, visit: Callable, carry: Any) -> Any:
        """Folds `visit((batch, head, block), carry)` over this thread block's tiles, the longest first."""
        first = lax.axis_index("block")
        num_own = lax.div(self.count - first + NUM_SMS - 1, NUM_SMS)
        return lax.fori_loop(0, num_own, lambda i, carry: visit(self._tile(first + i * NUM_SMS), carry), carry)

    def _tile(self, index):
        group_size = self.heads_together * self.num_blocks
        within = lax.rem(index, group_size)
        block = lax.div(within, self.heads_together)
        head = lax.div(index, group_size) * self.heads_together + lax.rem(within, self.heads_together)
        if self.longest_is_last:
            block = self.num_blocks - 1 - block
        return lax.div(head, self.num_heads), lax.rem(head, self.num_heads), block


def _kernel(body: Callable, *, out_type: Any, scratch_types: tuple) -> Callable:
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(NUM_SMS,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
        ),
    )


def _block(*shape_and_dtype: Any) -> Any:
    """Declares a shared-memory block, or several, in the 128-byte swizzle that TMA writes and wgmma reads."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape_and_dtype[:-1], shape_and_dtype[-1], transforms=transforms)


def _ring(stages: int, *, copies: int = 1) -> tuple[Any, Any]:
    """Declares the barriers of a ring of slots: filled by so many copies, freed by every multiplying warpgroup."""
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
    return full, plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)


def _next(slot, stages: int = STAGES):
    return jnp.where(slot == stages - 1, 0, slot + 1)


def _open(*rings, stages: int = STAGES) -> None:
    """Marks every slot of the rings as free."""

    @pl.loop(0, stages)
    def _(slot):
        for free in rings:
            plgpu.barrier_arrive(free.at[slot])


def _drain(slot, *rings, stages: int = STAGES) -> None:
    """Waits until every slot of the rings is free again."""

    def wait(_, slot):
        for free in rings:
            plgpu.barrier_wait(free.at[slot])
        return _next(slot, stages)

    lax.fori_loop(0, stages, wait, slot)


def _accumulate(acc: jax.Array, multiply: Callable) -> jax.Array:
    """Returns the accumulator after the products that `multiply` issues into it."""
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def _zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _filled(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW_VECTOR)


def _row_ids(shape: tuple[int, int], first) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + first


def _column_ids(shape: tuple[int, int], first) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first
