"""Which source every training window comes from: a pure function of (seed, weights, position).

A mixture is a list of phases; each gives the sources' weights from a number of trained tokens on. Within a phase, every
source takes its rounded share of what the sources before it left. Such counts only grow with the windows and always add
up, so they can be asked for at any position without counting from the beginning, and stay within the number of
sources of the exact share. Inside blocks of 1024 windows the sources follow one another in random order.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data.orders import random_order

BLOCK_WINDOWS = 1024


@dataclasses.dataclass(frozen=True)
class Phase:
    """The weights that hold from a number of trained tokens on."""

    first_token: int
    weights: dict[str, Fraction]  # source -> weight; a source that is not named has weight 0


def parse_mixture(text: str) -> tuple[Phase, ...]:
    """Reads the setting `data.mixture`: "code=0.6,english=0.4", or phases as "0:code=1;2000000:code=0.6,english=0.4".

    Raises:
      ValueError: not of that form, a weight that is negative or no number, weights that sum to 0, a source named twice,
        or phases that do not begin at 0 and ascend.
    """
    phases = []
    for part in text.split(";"):
        start, weights = re.fullmatch(r"\s*(?:(\d+)\s*:)?(.*)", part, re.DOTALL).groups()
        require(start is not None or ";" not in text, "data.mixture", text,
                f"the phase {part.strip()!r} lacks its first token; write TOKENS:SOURCE=WEIGHT,...")  # fmt: skip
        phases.append(Phase(int(start or 0), _parse_weights(weights, text)))
    starts = [phase.first_token for phase in phases]
    require(starts[0] == 0, "data.mixture", text, f"begins at token {starts[0]}; the first phase must begin at 0")
    require(all(a < b for a, b in itertools.pairwise(starts)), "data.mixture", text,
            f"phases begin at tokens {starts}; they must ascend")  # fmt: skip
    return tuple(phases)


def recipe_mixture(weights: Mapping[str, float]) -> tuple[Phase, ...]:
    """Gives the one phase of a corpus's own weights.

    Raises:
      ValueError: as `parse_mixture`.
    """
    own = ",".join(f"{name}={weight!r}" for name, weight in weights.items())
    return parse_mixture(own)


def _parse_weights(text: str, mixture: str) -> dict[str, Fraction]:
    weights = {}
    for entry in text.split(","):
        name, equals, number = (piece.strip() for piece in entry.rpartition("="))
        require(bool(name and equals), "data.mixture", mixture, f"{entry.strip()!r} is not of the form SOURCE=WEIGHT")
        try:
            weight = Fraction(number)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"data.mixture={mixture!r}: the weight {number!r} of {name} is no finite number") from None
        require(weight >= 0, "data.mixture", mixture, f"the weight {number} of {name} is negative; use 0 or more")
        require(name not in weights, "data.mixture", mixture, f"names {name} twice in one phase")
        weights[name] = weight
    require(sum(weights.values()) > 0, "data.mixture", mixture, "the weights sum to 0; give a source more than 0")
    return weights


class Mixture:
    """Places every window of an endless stream: from which source it is, and the how-manieth of that source.

    Attributes:
      sources: names of the sources; elsewhere they are numbered in this order.
    """

    def __init__(self, phases: Sequence[Phase], *, sources: Sequence[str], sequence_length: int, seed: int):
        """Builds the stream.

        Args:
          phases: what `parse_mixture` or `recipe_mixture` gave.
          sources: names of all sources.
          sequence_length: tokens that each window trains.
          seed: determines the order inside the blocks.

        Raises:
          ValueError: a phase names a source that is not among the sources.
        """
        self.sources = tuple(sources)
        for phase in phases:
            unknown = sorted(phase.weights.keys() - set(sources))
            require(not unknown, "data.mixture", ",".join(unknown),
                    f"no source of the corpus is called so; it has {', '.join(sources)}")  # fmt: skip
        self._seed = seed
        self._weights = [_whole_numbers([phase.weights.get(name, Fraction(0)) for name in sources]) for phase in phases]
        self._starts = [-(-phase.first_token // sequence_length) for phase in phases]  # in windows
        self._counts_at_start = [np.zeros(len(sources), np.int64)]
        for i in range(len(phases) - 1):
            length = self._starts[i + 1] - self._starts[i]
            self._counts_at_start.append(self._counts_at_start[i] + _quota(self._weights[i], length))
        self._block = functools.lru_cache(maxsize=64)(self._build_block)

    def shares(self, position: int) -> np.ndarray:
        """Gives the weights that hold at a position, adding up to 1: float64 [sources]."""
        weights = self._weights[self._phase_of(position)]
        return np.array([weight / sum(weights) for weight in weights])

    def is_used(self) -> np.ndarray:
        """Says of each source whether it has a weight in any phase: bool [sources]."""
        return np.any(np.array(self._weights, object) > 0, axis=0)

    def place(self, position: int) -> tuple[int, int]:
        """Gives the source of the window at a position, and how many windows of that source come before it."""
        (sources, numbers), slot = self._block_of(position)
        return int(sources[slot]), int(numbers[slot])

    def windows_before(self, position: int) -> np.ndarray:
        """Counts the windows of each source before a position: int64 [sources]."""
        phase, block, slot = self._locate(position)
        sources, _ = self._block(phase, block)
        before_block = self._windows_before_block(phase, block)
        return before_block + np.bincount(sources[:slot], minlength=len(self.sources))

    def _block_of(self, position: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        phase, block, slot = self._locate(position)
        return self._block(phase, block), slot

    def _locate(self, position: int) -> tuple[int, int, int]:
        phase = self._phase_of(position)
        return phase, *divmod(position - self._starts[phase], BLOCK_WINDOWS)

    def _phase_of(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    def _windows_before_block(self, phase: int, block: int) -> np.ndarray:
        return self._counts_at_start[phase] + _quota(self._weights[phase], block * BLOCK_WINDOWS)

    def _build_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives source and number of each window of a block; a phase's last block is cut off at its end."""
        first = block * BLOCK_WINDOWS
        is_last = phase + 1 == len(self._starts)
        length = BLOCK_WINDOWS
        if not is_last:
            length = min(length, self._starts[phase + 1] - self._starts[phase] - first)
        counts_before = _quota(self._weights[phase], first)
        counts = _quota(self._weights[phase], first + length) - counts_before
        in_order = np.repeat(np.arange(len(counts)), counts)
        sources = in_order[random_order(length, f"block {block} of phase {phase} {self._seed}")]
        numbers = np.empty(length, np.int64)
        for source, before in enumerate(self._counts_at_start[phase] + counts_before):
            numbers[sources == source] = before + np.arange(counts[source])
        return sources, numbers


def _quota(weights: tuple[int, ...], num_windows: int) -> np.ndarray:
    """Divides windows among sources by weight: int64 [sources] that add up and none of which falls as windows grow."""
    counts, windows_left, weight_left = [], num_windows, sum(weights)
    for weight in weights:
        counts.append((2 * windows_left * weight + weight_left) // (2 * weight_left) if weight else 0)
        windows_left -= counts[-1]
        weight_left -= weight
    return np.array(counts, np.int64)


def _whole_numbers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    denominator = math.lcm(*(weight.denominator for weight in weights))
    return tuple(int(weight * denominator) for weight in weights)
