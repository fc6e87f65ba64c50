"""Teaches the Mosaic GPU interpreter of JAX 0.11 copies that reach all thread blocks of a cluster.

As they are there, such a copy is made by each block for itself, so nothing shows a block that overwrites what another
still reads. Here each block copies its share of the rows into every block's memory, as TMA does, and a block's barrier
hears of a copy when all shares of it are there.
"""

import dataclasses
import functools
import math
import threading
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import HostAllocationKey


class _Share(gpu_callbacks.AsyncCopyGmemToSmemTask):
    """One block's share of a copy, on its way to one block."""

    def __init__(self, arrivals, **arguments):
        super().__init__(**arguments)
        self.arrivals = arrivals

    def post_write(self, tma_thread_id, shared_memory):
        self.clock = self.arrivals.last(self.dst_allocation_key, self.barrier, self.clock)
        if self.clock is not None:
            super().post_write(tma_thread_id, shared_memory)


class _Arrivals:
    """Counts the shares that have reached each block."""

    def __init__(self, num_shares: int):
        self.num_shares, self.clocks, self.lock = num_shares, {}, threading.Lock()

    def last(self, buffer, barrier, clock):
        """Returns the time at which all shares are there, if this is the last of them."""
        with self.lock:
            clocks = self.clocks.setdefault((tuple(buffer), id(barrier)), [])
            clocks.append(clock)
            if len(clocks) < self.num_shares:
                return None
            for earlier in clocks[:-1]:
                clock.update(earlier)
            clocks.clear()
            return clock


def install(monkeypatch) -> None:
    """Replaces the interpreter's copies that have collective axes, for one test."""
    interpret = jaxpr_interpret.JaxprInterpreter._interpret_copy_gmem_to_smem_p
    arrivals = {}

    def interpret_copy(self, eqn, *args):
        if not eqn.params["collective_axes"]:
            return interpret(self, eqn, *args)
        num_blocks = math.prod(self.cluster_dims)
        copy = functools.partial(_copy_share, arrivals.setdefault(num_blocks, _Arrivals(num_blocks)))
        with mock.patch.object(gpu_callbacks, "copy_gmem_to_smem", copy):
            return interpret(self, eqn, *args)

    monkeypatch.setattr(jaxpr_interpret.JaxprInterpreter, "_interpret_copy_gmem_to_smem_p", interpret_copy)


@gpu_callbacks.fail_on_exception
def _copy_share(
    arrivals,
    *,
    token,
    mesh_location,
    thread,
    src_allocation_key_as_array,
    src_transforms,
    dst_allocation_key_as_array,
    dst_transforms,
    barrier_allocation_key_as_array,
    source_info,
):
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread)
    source = HostAllocationKey.from_array(src_allocation_key_as_array)
    target = HostAllocationKey.from_array(dst_allocation_key_as_array)
    barrier = HostAllocationKey.from_array(barrier_allocation_key_as_array)
    share = functools.partial(_share_of, memory, rank=thread.block_id, num_shares=arrivals.num_shares)
    for block in range(arrivals.num_shares):
        own_target = dataclasses.replace(target, block_id=block)
        task = _Share(
            arrivals,
            mesh_location=mesh_location,
            thread=thread,
            src_allocation_key=source,
            src_access=share(source, src_transforms),
            dst_allocation_key=own_target,
            dst_access=share(own_target, dst_transforms),
            barrier_allocation_key=dataclasses.replace(barrier, block_id=block),
            source_info=source_info,
            clock=clock.copy(),
        )
        memory.execute_async_task(task)
    return token


def _share_of(memory, key, transforms, *, rank, num_shares):
    """Returns the part of an access that a block copies: one of equal parts of its first dimension."""
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    access = memory.access(key, transforms)
    dim = next(dim for dim, part in enumerate(access.range) if isinstance(part, slice))
    whole = access.range[dim]
    size, remainder = divmod(whole.stop - whole.start, num_shares)
    assert not remainder and whole.step in (None, 1)
    start = whole.start + rank * size
    part = (*access.range[:dim], slice(start, start + size, whole.step), *access.range[dim + 1 :])
    return type(access)(part, access.permutation)
