"""Contenders that do an operation many times per start, so that the host's work is no part of what is timed.

Ours is one compiled program, a loop over several sets of operands; torch's is a CUDA graph of the same calls on the
same memory. All sets with their results are larger than the card's 60 MB of L2 cache, so that every call reads from
device memory, as between the other operations of a network. Calls follow one another: XLA may not run them side by
side.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.timing import Contender

START_S = 2e-3  # a start lasts at least this long on the fastest conceivable device
ROTATING_BYTES = 256e6  # read and written before the same memory is read again, at least
ROUND_S = 1.5e-4  # a round lasts at least this long there: XLA's loop adds about 2 µs to each
SERIALLY = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}

Operation = Callable[..., Any]


def sets_and_rounds(num_bytes: int, floor_s: float) -> tuple[int, int]:
    """Returns over how many sets of operands to rotate, and how often in a start.

    Args:
      num_bytes: read and written by one call.
      floor_s: seconds that one call takes at the very least.
    """
    num_sets = math.ceil(max(ROTATING_BYTES / num_bytes, ROUND_S / floor_s))
    return num_sets, math.ceil(START_S / floor_s / num_sets)


class Program:
    """An operation of ours, compiled for several sets of operands and a number of rounds over them."""

    def __init__(self, operation: Operation, operand_types: tuple, *, num_sets: int, rounds: int):
        """Compiles.

        Args:
          operation: function of arrays.
          operand_types: what it is called with, as arrays or `jax.ShapeDtypeStruct`s in pytrees.
          num_sets: sets of operands.
          rounds: calls per set and start.
        """
        operation = jax.jit(operation)  # traced once for all calls

        @functools.partial(jax.jit, donate_argnums=0, compiler_options=SERIALLY)
        def replay(results, operand_sets):
            def call_each(_, results):
                # Without the barrier a round that repeats another would be left out.
                own_sets, _ = jax.lax.optimization_barrier((operand_sets, results))
                return [operation(*operands) for operands in own_sets]

            return jax.lax.fori_loop(0, rounds, call_each, results)

        operand_types = jax.eval_shape(lambda *operands: operands, *operand_types)
        self._result_types = [jax.eval_shape(operation, *operand_types)] * num_sets
        self._replay = replay.lower(self._result_types, [operand_types] * num_sets).compile()
        self._calls = num_sets * rounds

    def contender(self, operand_sets: Sequence[tuple]) -> Contender:
        """Returns what starts the rounds over the operand sets; a start yields the results of the last round.

        Results are written to the memory of the previous start's, so that nothing has to be found or freed.
        """
        results = jax.tree.map(lambda type_: jnp.zeros(type_.shape, type_.dtype), self._result_types)

        def start():
            nonlocal results
            results = self._replay(results, operand_sets)
            return results

        return Contender(start, jax.block_until_ready, self._calls)


def compile_all(makers: dict[Any, Callable[[], Program]]) -> dict[Any, Program]:
    """Runs functions that each compile a program, several at a time, and returns what they return."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(makers, pool.map(lambda make: make(), makers.values())))


def copies(operands: tuple, *, count: int) -> list[tuple]:
    """Returns operands in several places of memory."""
    return jax.block_until_ready([operands] + [jax.tree.map(jnp.copy, operands) for _ in range(count - 1)])


def torch_contender(calls: Sequence[Callable[[], Any]], *, rounds: int) -> Contender:
    """Returns what starts rounds of torch calls, recorded as one CUDA graph; a start yields the last round's results.

    Args:
      calls: functions without arguments that start one operation each and return its result.
      rounds: how often each is called.
    """
    import torch

    results = [call() for call in calls]  # workspaces and the choice of kernels are no part of the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for i, call in enumerate(calls):
                results[i] = call()

    def start():
        graph.replay()
        return results

    return Contender(start, lambda _: torch.cuda.synchronize(), len(calls) * rounds)


def to_torch(array: jax.Array) -> Any:
    """Returns a torch tensor on the same memory."""
    import torch

    if array.dtype == jnp.float8_e4m3fn:  # as bytes: not every torch takes FP8 from other libraries
        return torch.from_dlpack(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(array)
