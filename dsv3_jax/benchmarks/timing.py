"""Times implementations against each other, call by call, so that clocks and heat are the same for all.

Two ways, which are 10-20% apart on a GPU; numbers of one must not be compared with numbers of the other. In bursts the
card is rested and runs near its highest clock. Steadily it is hot and at its power limit, as in training.
"""

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
    operations: int = 1  # how often one start does what is measured


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
