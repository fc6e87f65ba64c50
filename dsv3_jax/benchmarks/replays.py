"""Contenders that do an operation many times per start, so that the host's work is no part of what is timed.

Ours is one compiled program with a call per set of operands; torch's is a CUDA graph with the same calls on the same
memory. Every call has operands and results of its own, together larger than the card's 60 MB of L2 cache, as between
the other operations of a network. Calls follow one another: XLA is told not to run them side by side.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.timing import Contender

REPLAY_S = 1e-3  # a start lasts at least this long on the fastest conceivable device
SERIALLY = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}

Operation = Callable[..., Any]


def calls_per_replay(floor_s: float) -> int:
    """Returns how many calls of an operation, which takes floor_s at the very least, make a start."""
    return math.ceil(REPLAY_S / floor_s)


class Program:
    """An operation of ours, compiled for a number of calls on different operands."""

    def __init__(self, operation: Operation, operand_types: tuple, *, calls: int):
        """Compiles.

        Args:
          operation: function of arrays.
          operand_types: what it is called with, as arrays or `jax.ShapeDtypeStruct`s in pytrees.
          calls: calls per start.
        """
        operation = jax.jit(operation)  # traced once for all calls

        @functools.partial(jax.jit, donate_argnums=0, keep_unused=True, compiler_options=SERIALLY)
        def replay(results, operand_sets):
            return [operation(*operands) for operands in operand_sets]

        operand_types = jax.eval_shape(lambda *operands: operands, *operand_types)
        self._result_types = [jax.eval_shape(operation, *operand_types)] * calls
        self._replay = replay.lower(self._result_types, [operand_types] * calls).compile()
        self.calls = calls

    def contender(self, operand_sets: Sequence[tuple]) -> Contender:
        """Returns what starts all calls, each on one of the operand sets.

        Results are written to the memory of the previous start's, so that nothing has to be found or freed.
        """
        results = jax.tree.map(lambda type_: jnp.zeros(type_.shape, type_.dtype), self._result_types)

        def start():
            nonlocal results
            results = self._replay(results, operand_sets)
            return results

        return Contender(start, jax.block_until_ready, self.calls)


def compile_all(makers: dict[Any, Callable[[], Program]]) -> dict[Any, Program]:
    """Runs functions that each compile a program, several at a time, and returns what they return."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(makers, pool.map(lambda make: make(), makers.values())))


def copies(operands: tuple, *, count: int) -> list[tuple]:
    """Returns operands in several places of memory."""
    return jax.block_until_ready([operands] + [jax.tree.map(jnp.copy, operands) for _ in range(count - 1)])


def torch_contender(calls: Sequence[Callable[[], Any]]) -> Contender:
    """Returns what starts calls of torch, recorded as a CUDA graph.

    Args:
      calls: functions that start one operation each and return its result.
    """
    import torch

    for call in calls[:2]:  # workspaces and the choice of kernels are no part of the graph
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [call() for call in calls]

    def start():
        graph.replay()
        return results

    return Contender(start, lambda _: torch.cuda.synchronize(), len(calls))


def to_torch(array: jax.Array) -> Any:
    """Returns a torch tensor on the same memory."""
    import torch

    if array.dtype == jnp.float8_e4m3fn:  # as bytes: not every torch takes FP8 from other libraries
        return torch.from_dlpack(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(array)
