"""Times implementations against each other, call by call, so that clocks and heat are the same for all.

Three ways, which are 10-20% apart on a GPU; numbers of one must not be compared with numbers of another. A single call
finds a rested card with an empty cache, which runs at its highest clock; only its kernels count, as a trace shows them.
In bursts of some milliseconds the card slows down a little. Steadily it is hot and at its power limit, as in training.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks import traces

FLUSHED_BYTES = 2**28  # written before a single call: several times the card's cache


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation: a call that starts the work, and one that waits for what it returned."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    operations: int = 1  # how often one start does what is measured


def single_medians(
    calls: dict[str, Callable[[], Any]], *, rest_s: float = 1.5e-3, repeats: int = 15
) -> dict[str, float]:
    """Returns the median seconds that a GPU computes for one call of each, alone after a rest, the cache flushed.

    Args:
      calls: name -> function that starts one operation and waits for it; each is compiled and warmed first.
      rest_s: rest before a call, seconds.
      repeats: calls of each, in turn.
    """
    flush = jax.jit(jnp.sin, donate_argnums=0)
    flushed = flush(jnp.zeros(FLUSHED_BYTES // 4))
    for call in calls.values():
        call()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, create_perfetto_trace=True):
            for _ in range(repeats):
                for call in calls.values():
                    flushed = jax.block_until_ready(flush(flushed))
                    time.sleep(rest_s)
                    call()
        kernels = traces.read_kernels(directory)
    seconds = seconds_after(kernels, "sine")
    if len(seconds) != repeats * len(calls):
        raise ValueError(
            f"the trace shows {len(seconds)} of {repeats * len(calls)} calls: {sorted({k.name for k in kernels})}"
        )
    return {name: statistics.median(seconds[i :: len(calls)]) for i, name in enumerate(calls)}


def seconds_after(kernels: Sequence[traces.Kernel], mark: str) -> list[float]:
    """Returns for every kernel with the mark in its name how long those until the next one compute, in seconds."""
    seconds = []
    for kernel in kernels:
        if mark in kernel.name:
            seconds.append(0.0)
        elif seconds:
            seconds[-1] += kernel.end_s - kernel.start_s
    return seconds


def burst_medians(
    contenders: dict[str, Contender], *, burst_s: float = 4e-3, idle_s: float = 0.03, repeats: int = 7
) -> dict[str, float]:
    """Returns the median seconds per operation of each contender in short bursts.

    Every repeat gives each contender, in turn, a single start and a burst of several, each after a rest, so a drift
    hits all alike. Starts of a burst do not wait for one another, and the difference of the two medians counts: what
    the host needs to begin and to notice the end (0.1 to 0.3 ms) is in both.

    Args:
      contenders: name -> implementation; each is compiled and warmed first.
      burst_s: about how long the starts of a burst take together, seconds.
      idle_s: rest before a burst, seconds.
      repeats: bursts per contender.
    """
    starts = {name: 1 + _starts_lasting(contender, burst_s) for name, contender in contenders.items()}
    singles, bursts = ({name: [] for name in contenders} for _ in range(2))
    for _ in range(repeats):
        for name, contender in contenders.items():
            time.sleep(idle_s)
            singles[name].append(seconds_of(contender, starts=1))
            time.sleep(idle_s)
            bursts[name].append(seconds_of(contender, starts=starts[name]))
    seconds = {}
    for name, contender in contenders.items():
        difference = statistics.median(bursts[name]) - statistics.median(singles[name])
        seconds[name] = difference / (starts[name] - 1) / contender.operations
    return seconds


def steady_medians(
    contenders: dict[str, Contender], *, heat_s: float = 0.15, measure_s: float = 0.05, repeats: int = 3
) -> dict[str, float]:
    """Returns the median seconds per operation of each contender in uninterrupted work.

    Every repeat gives each contender, in turn, heat_s of its own work and then, without a pause, measure_s that are
    timed. The operands of one start should not fit into the device's cache.

    Args:
      contenders: name -> implementation; each is compiled and warmed first.
      heat_s: work before the clock starts, seconds.
      measure_s: work that is timed, seconds.
      repeats: measurements per contender.
    """
    heating = {name: _starts_lasting(contender, heat_s) for name, contender in contenders.items()}
    starts = {name: _starts_lasting(contender, measure_s) for name, contender in contenders.items()}
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            seconds_of(contender, starts=heating[name])
            seconds[name].append(seconds_of(contender, starts=starts[name]) / starts[name] / contender.operations)
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(contender: Contender, *, starts: int) -> float:
    """Returns the seconds that some starts take together, the last one waited for."""
    begin = time.perf_counter()
    for _ in range(starts):
        out = contender.start()
    contender.wait(out)
    return time.perf_counter() - begin


def _starts_lasting(contender: Contender, seconds: float) -> int:
    """Returns how many starts last about so long, at least one."""
    seconds_of(contender, starts=2)  # compiles, and finds memory for two results
    return max(1, round(seconds / (seconds_of(contender, starts=3) / 3)))
