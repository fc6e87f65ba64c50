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

    def run(self) -> None:
        self.wait(self.start())


def interleaved_medians(
    contenders: dict[str, Contender], *, idle_s: float = 2e-3, repeats: int = 31
) -> dict[str, float]:
    """Returns the median seconds per call of each contender.

    Every repeat gives each contender, in turn, one call after a rest: a GPU runs near its highest clock, and a drift
    hits all alike. Such numbers must not be compared with those of uninterrupted work, which are 15-20% lower.

    Args:
      contenders: name -> implementation; each is compiled and warmed first. A call should take a millisecond or more,
        since the host's clock measures it.
      idle_s: rest before a call, seconds.
      repeats: calls per contender.
    """
    for contender in contenders.values():
        contender.run()
        contender.run()
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            time.sleep(idle_s)
            start = time.perf_counter()
            contender.run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
