"""Causal attention for Hopper GPUs: persistent Pallas Mosaic GPU kernels for the output and its gradients.

Layout. Operands lie as the model makes them, [B, T, N, width] in a 16-bit float type, T a multiple of 128, widths
multiples of 64; log-sum-exp and the row sums of out · dout are float32 [B, N, T], in base-2 logarithms. A block of
keys lies in shared memory as it does outside: a head's own columns, and apart those of all heads, which a copy cannot
put beside them. So a product with keys is one over either part.

A thread block has two multiplying warpgroups of 64 rows each (one wgmma) and one that copies blocks through a ring of
shared-memory slots and runs ahead across tiles. Tiles are taken longest first, a few heads at a time: the causal
triangle stays balanced over the SMs and the heads' blocks stay in L2. The backward pass recomputes the scores twice, in
two kernels, instead of adding query gradients atomically in one: gradients repeat bit for bit.

Each kernel is one long function because its roles share barriers and buffers. Measured on an H200 at B 2, T 4096,
N 128, X 192, U 128: 647 to 685 TFLOP/s forward (cuDNN with padded values 460 to 515 in the same run), 500 forward and
backward (330).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.attention import blocks, segments
from dsv3_jax.kernels.attention.blocks import (
    CONSUMER_REGISTERS,
    KEY_BLOCK,
    LOG2_E,
    LOWEST,
    PRODUCER_REGISTERS,
    ROW_VECTOR,
    ROWS,
    STAGES,
    TILE,
    WARPGROUPS,
)
from dsv3_jax.kernels.attention.pallas_gpu_gradients import key_value_gradients, query_gradient
from dsv3_jax.kernels.attention.shared_keys import sum_over_heads, widths
from dsv3_jax.kernels.hopper import segmented

OUT_COLUMNS = 64  # of a store: widths of queries and values are multiples


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal_attention(
    q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, first_key_BT: jax.Array | None, scale: float
) -> jax.Array:
    """Computes softmax(scale · q kᵀ + mask) v per head; [B, T, N, U] in q's dtype."""
    return _forward(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, scale)[0]


def _forward(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, scale):
    out_BTNU, lse_BNT = attend(q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, scale)
    out_BTNU = checkpoint_name(out_BTNU, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNU, (q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, out_BTNU, lse_BNT)


def _backward(scale, residuals, dout_BTNU):
    return *gradients(*residuals, dout_BTNU, scale=scale), None


causal_attention.defvjp(_forward, _backward)


def gradients(
    q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, out_BTNU, lse_BNT, dout_BTNU, *, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of queries, of keys' own columns beside values, and of the keys' shared columns.

    Args: what `attend` took and returned, and the output's gradient.
    """
    delta_BNT = jnp.einsum("BTNU,BTNU->BNT", out_BTNU, dout_BTNU, preferred_element_type=jnp.float32)
    operands = (q_BTNX, kv_BTNY, k_rope_BTR, first_key_BT, dout_BTNU, lse_BNT, delta_BNT)
    dkv_BTNY, dk_rope_BTNR = key_value_gradients(*operands, scale)
    return query_gradient(*operands, scale), dkv_BTNY, sum_over_heads(dk_rope_BTNR)


def attend(
    q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array, first_key_BT: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, U] and the base-2 log-sum-exp of the scaled scores, float32 [B, N, T]."""
    batch, length, num_heads, width = q_BTNX.shape
    parts, dtype = widths(q_BTNX, kv_BTNY, k_rope_BTR), q_BTNX.dtype
    tiles = blocks.Tiles(batch, num_heads, length // TILE, longest_is_last=True)
    has_segments = first_key_BT is not None
    ranges = segments.key_blocks(first_key_BT, tile=TILE, block=KEY_BLOCK) if has_segments else ()
    segment_operands = (first_key_BT, *ranges) if has_segments else ()

    def attention_forward(q, kv, k_rope, *refs):
        if has_segments:
            first_key, whole_block, edge_block, *refs, first_key_smem = refs
        (
            out, lse,
            q_or_out_smem, k_smem, k_rope_smem, v_smem, lse_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn,
        ) = refs  # fmt: skip
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
                    plgpu.copy_gmem_to_smem(kv.at[b, keys, h, parts.own_columns], k_smem.at[slot], k_full.at[slot])
                    plgpu.copy_gmem_to_smem(k_rope.at[b, keys], k_rope_smem.at[slot], k_full.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])
                    plgpu.copy_gmem_to_smem(kv.at[b, keys, h, parts.value_columns], v_smem.at[slot], v_full.at[slot])
                    return blocks.next_slot(slot)

                first_block = edge_block[b, block] if has_segments else 0
                slot = load_step(first_block, slot)  # before the queries, whose buffer the last output still leaves
                for i in range(WARPGROUPS):
                    rows = pl.ds(block * TILE + i * ROWS, ROWS)
                    plgpu.barrier_wait(q_free.at[i])
                    plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_smem.at[i], q_full.at[i])
                    if has_segments:
                        plgpu.copy_gmem_to_smem(first_key.at[b, rows], first_key_smem.at[i], q_full.at[i])
                return lax.fori_loop(first_block + 1, block + 1, load_step, slot)

            slot = tiles.for_each(load_tile, jnp.int32(0))
            blocks.drain(slot, k_free, v_free)
            for i in range(WARPGROUPS):
                plgpu.barrier_wait(q_free.at[i])

        @pl.when(warpgroup < WARPGROUPS)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            blocks.open_slots(k_free, v_free)
            plgpu.barrier_arrive(q_free.at[warpgroup])
            own_q = q_smem.at[warpgroup]

            def attend_tile(tile, slot):
                b, h, block = tile
                first_row = block * TILE + warpgroup * ROWS
                plgpu.barrier_wait(q_full.at[warpgroup])

                def is_visible(shape, step, *, is_causal, is_cut):
                    keys = blocks.column_ids(shape, step * KEY_BLOCK)
                    visible = blocks.row_ids(shape, first_row) >= keys if is_causal else None
                    if is_cut:
                        first_key = plgpu.layout_cast(first_key_smem[warpgroup], ROW_VECTOR)
                        is_own = keys >= lax.broadcast_in_dim(first_key, shape, [0])
                        visible = is_own if visible is None else visible & is_own
                    return visible

                def attend_block(step, carry, *, is_causal, is_cut):
                    slot, acc, maximum, total = carry
                    plgpu.barrier_wait(k_full.at[slot])

                    def multiply_keys(acc_ref):
                        plgpu.wgmma(acc_ref, own_q.at[:, parts.own_columns], k_smem.at[slot].T)
                        plgpu.wgmma(acc_ref, own_q.at[:, parts.rope_columns], k_rope_smem.at[slot].T)
                        take_turns()  # one warpgroup multiplies while the other computes its softmax
                        return acc_ref[...]

                    scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, KEY_BLOCK), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    if is_causal or is_cut:
                        visible = is_visible(scores.shape, step, is_causal=is_causal, is_cut=is_cut)
                        scores = jnp.where(visible, scores, -jnp.inf)
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
                    acc = blocks.accumulate(acc, lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_smem.at[slot]))
                    plgpu.barrier_arrive(v_free.at[slot])
                    return blocks.next_slot(slot), acc, new_maximum, total

                pl.when(warpgroup == 1)(take_turns)
                carry = (slot, blocks.zeros((ROWS, parts.value)), blocks.filled(LOWEST), blocks.filled(0.0))
                first_whole = 0
                if has_segments:
                    first_whole = whole_block[b, block]
                    attend_cut_block = functools.partial(attend_block, is_causal=False, is_cut=True)
                    carry = lax.fori_loop(edge_block[b, block], first_whole, attend_cut_block, carry)
                attend_whole_block = functools.partial(attend_block, is_causal=False, is_cut=False)
                carry = lax.fori_loop(first_whole, block, attend_whole_block, carry)
                slot, acc, maximum, total = attend_block(block, carry, is_causal=True, is_cut=has_segments)
                pl.when(warpgroup == 0)(take_turns)

                own_out = (acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])).astype(dtype)
                for i in range(parts.value // OUT_COLUMNS):
                    columns = slice(i * OUT_COLUMNS, (i + 1) * OUT_COLUMNS)
                    out_smem[warpgroup * (width // OUT_COLUMNS) + i] = own_out[:, columns]
                lse_smem[warpgroup] = maximum + jnp.log(total) * LOG2_E
                plgpu.commit_smem()
                rows = pl.ds(first_row, ROWS)
                for i in range(parts.value // OUT_COLUMNS):
                    columns = pl.ds(i * OUT_COLUMNS, OUT_COLUMNS)
                    block_smem = out_smem.at[warpgroup * (width // OUT_COLUMNS) + i]
                    plgpu.copy_smem_to_gmem(block_smem, out.at[b, rows, h, columns])
                plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[b, h, rows])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[warpgroup])
                return slot

            tiles.for_each(attend_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    results = blocks.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, num_heads, parts.value), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        ),
        scratch_types=(
            # A warpgroup's output takes the place of its own queries, and of no other's: the other may still need them.
            plgpu.RefUnion(
                segmented((WARPGROUPS, ROWS, width), dtype),
                segmented((WARPGROUPS * width // OUT_COLUMNS, ROWS, OUT_COLUMNS), dtype),
            ),
            *(segmented((STAGES, KEY_BLOCK, columns), dtype) for columns in parts),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2 if has_segments else 1),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            *blocks.ring(STAGES, copies=2),
            *blocks.ring(STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *((plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),) if has_segments else ()),
        ),
    )(q_BTNX, kv_BTNY, k_rope_BTR, *segment_operands)
    # Without the barrier XLA runs the kernel twice where a loop also stacks its results for the backward pass.
    return lax.optimization_barrier(results)
