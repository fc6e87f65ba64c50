"""Gradients of causal attention for Hopper GPUs; `pallas_gpu` describes layout and order of work."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.attention import blocks, segments
from dsv3_jax.kernels.attention.blocks import (
    COLUMN_VECTOR,
    CONSUMER_REGISTERS,
    GRADIENT_BLOCK,
    LOG2_E,
    PRODUCER_REGISTERS,
    ROW_VECTOR,
    ROWS,
    TILE,
    WARPGROUPS,
)
from dsv3_jax.kernels.attention.shared_keys import widths
from dsv3_jax.kernels.hopper import segmented


def query_gradient(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, dout_BTNU, lse_BNT, delta_BNT, scale: float) -> jax.Array:
    """Returns the gradient of the queries, [B, T, N, X] in q's dtype."""
    batch, length, num_heads, width = q_BTNX.shape
    parts, dtype, stages = widths(q_BTNX, kv_BTNY, k_rope_BTR), q_BTNX.dtype, 3
    tiles = blocks.Tiles(batch, num_heads, length // TILE, longest_is_last=True)
    blocks_per_tile = TILE // GRADIENT_BLOCK
    has_segments = first_key_BT is not None
    ranges = segments.key_blocks(first_key_BT, tile=TILE, block=GRADIENT_BLOCK) if has_segments else ()
    segment_operands = (first_key_BT, *ranges) if has_segments else ()
    # With segments the queries' loops take 2 registers more than 232; the copying warpgroup spares them.
    producer_registers, consumer_registers = (24, 240) if has_segments else (PRODUCER_REGISTERS, CONSUMER_REGISTERS)

    def attention_query_gradient(q, kv, k_rope, dout, lse, delta, *refs):
        if has_segments:
            first_key, whole_block, edge_block, *refs, first_key_smem = refs
        (
            dq,
            q_smem, dout_smem, lse_smem, delta_smem, k_smem, k_rope_smem, v_smem,
            rows_full, rows_free, k_full, k_free, v_full, v_free,
        ) = refs  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(producer_registers, action="decrease")

            def load_tile(tile, slot):
                b, h, block = tile

                def load_step(step, slot):
                    keys = pl.ds(step * GRADIENT_BLOCK, GRADIENT_BLOCK)
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.copy_gmem_to_smem(kv.at[b, keys, h, parts.own_columns], k_smem.at[slot], k_full.at[slot])
                    plgpu.copy_gmem_to_smem(k_rope.at[b, keys], k_rope_smem.at[slot], k_full.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])
                    plgpu.copy_gmem_to_smem(kv.at[b, keys, h, parts.value_columns], v_smem.at[slot], v_full.at[slot])
                    return blocks.next_slot(slot, stages)

                first_block = edge_block[b, block] if has_segments else 0
                second_part = first_block + blocks_per_tile  # a tile has at least the blocks before
                slot = lax.fori_loop(first_block, second_part, load_step, slot)
                for i in range(WARPGROUPS):
                    rows, barrier = pl.ds(block * TILE + i * ROWS, ROWS), rows_full.at[i]
                    plgpu.barrier_wait(rows_free.at[i])
                    plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_smem.at[i], barrier)
                    plgpu.copy_gmem_to_smem(dout.at[b, rows, h], dout_smem.at[i], barrier)
                    plgpu.copy_gmem_to_smem(lse.at[b, h, rows], lse_smem.at[i], barrier)
                    plgpu.copy_gmem_to_smem(delta.at[b, h, rows], delta_smem.at[i], barrier)
                    if has_segments:
                        plgpu.copy_gmem_to_smem(first_key.at[b, rows], first_key_smem.at[i], barrier)
                return lax.fori_loop(second_part, (block + 1) * blocks_per_tile, load_step, slot)

            slot = tiles.for_each(load_tile, jnp.int32(0))
            blocks.drain(slot, k_free, v_free, stages=stages)
            for i in range(WARPGROUPS):
                plgpu.barrier_wait(rows_free.at[i])

        @pl.when(warpgroup < WARPGROUPS)
        def _consume():
            plgpu.set_max_registers(consumer_registers, action="increase")
            blocks.open_slots(k_free, v_free, stages=stages)
            plgpu.barrier_arrive(rows_free.at[warpgroup])
            own_q, own_dout = q_smem.at[warpgroup], dout_smem.at[warpgroup]

            def differentiate_tile(tile, slot):
                b, h, block = tile
                first_row = block * TILE + warpgroup * ROWS
                plgpu.barrier_wait(rows_full.at[warpgroup])
                row_lse = plgpu.layout_cast(lse_smem[warpgroup], ROW_VECTOR)
                row_delta = plgpu.layout_cast(delta_smem[warpgroup], ROW_VECTOR)

                def differentiate_block(step, carry, *, is_causal, is_cut):
                    slot, acc = carry
                    shape = (ROWS, GRADIENT_BLOCK)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_wait(v_full.at[slot])

                    def multiply(scores_ref):
                        def multiply_again(dweights_ref):
                            plgpu.wgmma(scores_ref, own_q.at[:, parts.own_columns], k_smem.at[slot].T)
                            plgpu.wgmma(scores_ref, own_q.at[:, parts.rope_columns], k_rope_smem.at[slot].T)
                            plgpu.wgmma(dweights_ref, own_dout, v_smem.at[slot].T)
                            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                            weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(row_lse, shape, [0]))
                            return weights, dweights_ref[...]

                        return pl.run_scoped(multiply_again, plgpu.ACC(shape, jnp.float32))

                    weights, dweights = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_arrive(v_free.at[slot])
                    dscores = weights * (dweights - lax.broadcast_in_dim(row_delta, shape, [0]))
                    keys = blocks.column_ids(shape, step * GRADIENT_BLOCK)
                    if is_causal:
                        dscores = jnp.where(blocks.row_ids(shape, first_row) >= keys, dscores, 0.0)
                    if is_cut:
                        row_first_key = plgpu.layout_cast(first_key_smem[warpgroup], ROW_VECTOR)
                        dscores = jnp.where(keys >= lax.broadcast_in_dim(row_first_key, shape, [0]), dscores, 0.0)
                    dscores = dscores.astype(dtype)

                    def multiply_scores(acc_ref):
                        plgpu.wgmma(acc_ref.at[:, parts.own_columns], dscores, k_smem.at[slot])
                        plgpu.wgmma(acc_ref.at[:, parts.rope_columns], dscores, k_rope_smem.at[slot])

                    acc = blocks.accumulate(acc, multiply_scores)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return blocks.next_slot(slot, stages), acc

                carry = (slot, blocks.zeros((ROWS, width)))
                first_whole, first_causal = 0, block * blocks_per_tile
                if has_segments:
                    first_whole = whole_block[b, block]
                    differentiate_cut_block = functools.partial(differentiate_block, is_causal=False, is_cut=True)
                    carry = lax.fori_loop(edge_block[b, block], first_whole, differentiate_cut_block, carry)
                differentiate_whole_block = functools.partial(differentiate_block, is_causal=False, is_cut=False)
                carry = lax.fori_loop(first_whole, first_causal, differentiate_whole_block, carry)
                slot, acc = lax.fori_loop(
                    first_causal,
                    first_causal + blocks_per_tile,
                    functools.partial(differentiate_block, is_causal=True, is_cut=has_segments),
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

    return blocks.kernel(
        attention_query_gradient,
        out_type=jax.ShapeDtypeStruct(q_BTNX.shape, dtype),
        scratch_types=(
            segmented((WARPGROUPS, ROWS, width), dtype),
            segmented((WARPGROUPS, ROWS, parts.value), dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            *(segmented((stages, GRADIENT_BLOCK, columns), dtype) for columns in parts),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=5 if has_segments else 4),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            *blocks.ring(stages, copies=2),
            *blocks.ring(stages),
            *((plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),) if has_segments else ()),
        ),
    )(q_BTNX, kv_BTNY, k_rope_BTR, dout_BTNU, lse_BNT, delta_BNT, *segment_operands)


def key_value_gradients(
    q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, dout_BTNU, lse_BNT, delta_BNT, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of keys beside values, [B, T, N, X - R + U], and of the keys' last columns, [B, T, N, R].

    Both gradients of a tile would not fit one warpgroup's registers. One warpgroup makes the softmax weights and the
    value gradient, the other takes the weights through shared memory and makes the key gradient: equal work at X = 192
    and U = 128.
    """
    batch, length, num_heads, width = q_BTNX.shape
    parts, dtype, stages = widths(q_BTNX, kv_BTNY, k_rope_BTR), q_BTNX.dtype, 3
    num_blocks = length // GRADIENT_BLOCK
    tiles = blocks.Tiles(batch, num_heads, num_blocks, longest_is_last=False)
    shape = (ROWS, GRADIENT_BLOCK)  # products are transposed: a row is a key, a column a query

    has_segments = first_key_BT is not None
    ranges = segments.query_blocks(first_key_BT, tile=ROWS, block=GRADIENT_BLOCK) if has_segments else ()
    segment_operands = (first_key_BT, *ranges) if has_segments else ()

    def attention_key_value_gradients(q, kv, k_rope, dout, lse, delta, *refs):
        if has_segments:
            first_key, whole_block, edge_block, *refs, first_key_smem = refs
        (
            dkv, dk_rope,
            k_smem, k_rope_smem, v_smem, dk_smem, dk_rope_smem, dv_smem, weights_smem,
            q_smem, dout_smem, lse_smem, delta_smem,
            k_full, k_free, v_full, v_free, weights_full, weights_free, q_full, q_free, dout_full, dout_free,
        ) = refs  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        def end_of_queries(b, block):
            return edge_block[b, block] if has_segments else num_blocks

        @pl.when(warpgroup == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(tile, slot):
                b, h, block = tile
                keys = pl.ds(block * ROWS, ROWS)
                plgpu.barrier_wait(k_free)
                plgpu.copy_gmem_to_smem(kv.at[b, keys, h, parts.own_columns], k_smem, k_full)
                plgpu.copy_gmem_to_smem(k_rope.at[b, keys], k_rope_smem, k_full)
                plgpu.barrier_wait(v_free)
                plgpu.copy_gmem_to_smem(kv.at[b, keys, h, parts.value_columns], v_smem, v_full)

                def load_step(step, slot):
                    queries = pl.ds(step * GRADIENT_BLOCK, GRADIENT_BLOCK)
                    plgpu.barrier_wait(q_free.at[slot])
                    plgpu.copy_gmem_to_smem(q.at[b, queries, h], q_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(lse.at[b, h, queries], lse_smem.at[slot], q_full.at[slot])
                    if has_segments:
                        plgpu.copy_gmem_to_smem(first_key.at[b, queries], first_key_smem.at[slot], q_full.at[slot])
                    plgpu.barrier_wait(dout_free.at[slot])
                    plgpu.copy_gmem_to_smem(dout.at[b, queries, h], dout_smem.at[slot], dout_full.at[slot])
                    plgpu.copy_gmem_to_smem(delta.at[b, h, queries], delta_smem.at[slot], dout_full.at[slot])
                    return blocks.next_slot(slot, stages)

                return lax.fori_loop(block, end_of_queries(b, block), load_step, slot)

            slot = tiles.for_each(load_tile, jnp.int32(0))
            blocks.drain(slot, q_free, dout_free, stages=stages)
            plgpu.barrier_wait(k_free)
            plgpu.barrier_wait(v_free)

        @pl.when(warpgroup == 0)
        def _make_value_gradient():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            blocks.open_slots(q_free, dout_free, stages=stages)
            plgpu.barrier_arrive(k_free)

            def differentiate_tile(tile, carry):
                b, h, block = tile
                plgpu.barrier_wait(k_full)

                def differentiate_block(_, carry, *, is_causal, is_cut):
                    slot, weights_slot, acc = carry
                    plgpu.barrier_wait(q_full.at[slot])

                    def multiply(acc_ref):
                        plgpu.wgmma(acc_ref, k_smem, q_smem.at[slot, :, parts.own_columns].T)
                        plgpu.wgmma(acc_ref, k_rope_smem, q_smem.at[slot, :, parts.rope_columns].T)
                        return acc_ref[...]

                    scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                    column_lse = plgpu.layout_cast(lse_smem[slot], COLUMN_VECTOR)
                    weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(column_lse, shape, [1]))
                    if is_causal:
                        weights = jnp.where(blocks.row_ids(shape, 0) <= blocks.column_ids(shape, 0), weights, 0.0)
                    if is_cut:
                        column_first_key = plgpu.layout_cast(first_key_smem[slot], COLUMN_VECTOR)
                        is_own = blocks.row_ids(shape, block * ROWS) >= lax.broadcast_in_dim(
                            column_first_key, shape, [1]
                        )
                        weights = jnp.where(is_own, weights, 0.0)
                    weights = weights.astype(dtype)
                    plgpu.barrier_wait(weights_free.at[weights_slot])
                    weights_smem[weights_slot] = weights
                    plgpu.commit_smem()  # also orders the read of lse before its refill
                    plgpu.barrier_arrive(weights_full.at[weights_slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    plgpu.barrier_wait(dout_full.at[slot])
                    acc = blocks.accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, weights, dout_smem.at[slot]))
                    plgpu.barrier_arrive(dout_free.at[slot])
                    return blocks.next_slot(slot, stages), 1 - weights_slot, acc

                carry = (*carry, blocks.zeros((ROWS, parts.value)))
                carry = differentiate_block(block, carry, is_causal=True, is_cut=has_segments)
                end_of_whole = whole_block[b, block] if has_segments else num_blocks
                differentiate_whole_block = functools.partial(differentiate_block, is_causal=False, is_cut=False)
                carry = lax.fori_loop(block + 1, end_of_whole, differentiate_whole_block, carry)
                if has_segments:
                    differentiate_cut_block = functools.partial(differentiate_block, is_causal=False, is_cut=True)
                    carry = lax.fori_loop(end_of_whole, edge_block[b, block], differentiate_cut_block, carry)
                plgpu.barrier_arrive(k_free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_smem[...] = carry[2].astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_smem, dkv.at[b, pl.ds(block * ROWS, ROWS), h, parts.value_columns])
                return carry[:2]

            _, weights_slot = tiles.for_each(differentiate_tile, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)
            for _ in range(2):
                plgpu.barrier_wait(weights_free.at[weights_slot])
                weights_slot = 1 - weights_slot

        @pl.when(warpgroup == 1)
        def _make_key_gradient():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            blocks.open_slots(q_free, dout_free, stages=stages)
            blocks.open_slots(weights_free, stages=2)
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
                    acc = blocks.accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, dscores, q_smem.at[slot]))
                    plgpu.barrier_arrive(q_free.at[slot])
                    return acc

                def differentiate_block(_, carry):
                    slot, weights_slot, dweights, acc = carry
                    differentiate = functools.partial(differentiate_scores, slot, weights_slot, dweights)
                    next_dweights, dscores = multiply_values(blocks.next_slot(slot, stages), differentiate)
                    return (
                        blocks.next_slot(slot, stages),
                        1 - weights_slot,
                        next_dweights,
                        multiply_queries(slot, dscores, acc),
                    )

                slot, weights_slot = carry
                dweights, _ = multiply_values(slot, lambda: None)
                carry = (slot, weights_slot, dweights, blocks.zeros((ROWS, width)))
                last_block = end_of_queries(b, block) - 1
                slot, weights_slot, dweights, acc = lax.fori_loop(block, last_block, differentiate_block, carry)
                acc = multiply_queries(slot, differentiate_scores(slot, weights_slot, dweights), acc)
                carry = (blocks.next_slot(slot, stages), 1 - weights_slot, acc)
                plgpu.barrier_arrive(v_free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dk = (carry[2] * scale).astype(dtype)
                dk_smem[...], dk_rope_smem[...] = dk[:, parts.own_columns], dk[:, parts.rope_columns]
                plgpu.commit_smem()
                rows = pl.ds(block * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(dk_smem, dkv.at[b, rows, h, parts.own_columns])
                plgpu.copy_smem_to_gmem(dk_rope_smem, dk_rope.at[b, rows, h])
                return carry[:2]

            tiles.for_each(differentiate_tile, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

    return blocks.kernel(
        attention_key_value_gradients,
        out_type=tuple(
            jax.ShapeDtypeStruct((batch, length, num_heads, columns), dtype)
            for columns in (kv_BTNY.shape[-1], parts.rope)
        ),
        scratch_types=(
            *(segmented((ROWS, columns), dtype) for columns in (*parts, *parts)),
            segmented((2, *shape), dtype),
            segmented((stages, GRADIENT_BLOCK, width), dtype),
            segmented((stages, GRADIENT_BLOCK, parts.value), dtype),
            plgpu.SMEM((stages, GRADIENT_BLOCK), jnp.float32),
            plgpu.SMEM((stages, GRADIENT_BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            *(plgpu.Barrier(),) * 3,
            *(plgpu.Barrier(num_barriers=2),) * 2,
            *blocks.ring(stages, copies=3 if has_segments else 2),
            *blocks.ring(stages, copies=2),
            *((plgpu.SMEM((stages, GRADIENT_BLOCK), jnp.int32),) if has_segments else ()),
        ),
    )(q_BTNX, kv_BTNY, k_rope_BTR, dout_BTNU, lse_BNT, delta_BNT, *segment_operands)
