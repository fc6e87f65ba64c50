"""Times implementations against each other, call by call, so that clocks and heat are the same for all."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation: a call that starts the work, and one that waits for what it returned."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]


def interleaved_medians(
    contenders: dict[str, Contender], *, burst_s: float = 5e-3, idle_s: float = 0.03, repeats: int = 9
) -> dict[str, float]:
    """Returns the median seconds per call of each contender.

    Every repeat gives each contender, in turn, one burst of calls after a rest: a GPU runs near its highest clock, and
    a drift hits all alike. Calls of a burst are started without waiting, so that what the host needs to start and to
    notice the end of one (0.1 to 0.3 ms) is shared by several. Such numbers must not be compared with those of
    uninterrupted work, which are 10-20% lower.

    Args:
      contenders: name -> implementation; each is compiled and warmed first.
      burst_s: about how long the calls of a burst take together, seconds.
      idle_s: rest before a burst, seconds.
      repeats: bursts per contender.
    """
    calls_per_burst = {}
    for name, contender in contenders.items():
        _seconds_per_call(contender, calls=2)
        calls_per_burst[name] = max(1, round(burst_s / _seconds_per_call(contender, calls=2)))
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            time.sleep(idle_s)
            seconds[name].append(_seconds_per_call(contender, calls=calls_per_burst[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds_per_call(contender: Contender, *, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = contender.start()
    contender.wait(out)
    return (time.perf_counter() - start) / calls
