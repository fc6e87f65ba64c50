"""What the Hopper attention kernels share: order of tiles, shared-memory rings, register accumulators."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.device import NUM_SMS

TILE = 128  # rows of a thread block's tile
ROWS = hopper.WARPGROUP_ROWS
WARPGROUPS = 2
KEY_BLOCK = 128  # keys per step of the forward pass
GRADIENT_BLOCK = 64  # rows per step of the backward pass: accumulators and two 64 x 64 products fill the registers
STAGES = 2
HEADS_TOGETHER = 8  # heads swept together, so that their keys and values stay in L2
PRODUCER_REGISTERS, CONSUMER_REGISTERS = hopper.PRODUCER_REGISTERS, hopper.consumer_registers(WARPGROUPS)
LOG2_E = math.log2(math.e)
# Where the running maximum of the scores starts. Finite: while a query has met hidden keys only, whose scores are -inf,
# their weights are exp2(-inf - LOWEST) = 0.
LOWEST = -1e30

ROW_VECTOR = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a wgmma tile
COLUMN_VECTOR = plgpu.Layout.WGMMA.reduce(0)  # one value per column


class Tiles:
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


def kernel(body: Callable, *, out_type: Any, scratch_types: tuple) -> Callable:
    """Builds a persistent kernel of two multiplying warpgroups and a copying one on every SM."""
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


def ring(stages: int, *, copies: int = 1) -> tuple[Any, Any]:
    """Declares the barriers of a ring of slots: filled by so many copies, freed by every multiplying warpgroup."""
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
    return full, plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)


def next_slot(slot, stages: int = STAGES):
    return jnp.where(slot == stages - 1, 0, slot + 1)


def open_slots(*rings, stages: int = STAGES) -> None:
    """Marks every slot of the rings as free."""

    @pl.loop(0, stages)
    def _(slot):
        for free in rings:
            plgpu.barrier_arrive(free.at[slot])


def drain(slot, *rings, stages: int = STAGES) -> None:
    """Waits until every slot of the rings is free again."""

    def wait(_, slot):
        for free in rings:
            plgpu.barrier_wait(free.at[slot])
        return next_slot(slot, stages)

    lax.fori_loop(0, stages, wait, slot)


def accumulate(acc: jax.Array, multiply: Callable) -> jax.Array:
    """Returns the accumulator after the products that `multiply` issues into it."""
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def filled(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW_VECTOR)


def row_ids(shape: tuple[int, int], first) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + first


def column_ids(shape: tuple[int, int], first) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first
