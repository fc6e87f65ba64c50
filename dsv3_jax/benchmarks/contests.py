"""Contests: one operation at one size, done by several implementations in turn, as rows of a table."""

import dataclasses
import functools
import gc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.replays import Operation, Program, compile_all, copies, sets_and_rounds, torch_contender
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.benchmarks.timing import burst_medians, single_medians, steady_medians

FP8_PEAK, BF16_PEAK = 1979e12, 989e12  # dense FLOP/s of an H100 SXM or H200 (data sheet)
MEMORY_RATE = 4.8e12  # bytes/s of an H200 (data sheet)
SINGLE = "single"
MODES = {SINGLE: single_medians, "burst": burst_medians, "steady": steady_medians}
GEOMETRIC_MEAN = "geometric mean"


@dataclasses.dataclass(frozen=True)
class Entrant:
    """An implementation that takes part in a contest."""

    name: str
    operands: str  # which of the drawn operands it works on
    operation: Operation  # function of them: of JAX arrays, or, for torch, what returns a call without arguments
    is_torch: bool = False


@dataclasses.dataclass(frozen=True)
class Contest:
    """An operation at one size."""

    case: str
    flops: float
    draw: Callable[[], dict[str, tuple]]  # -> operands by name; traceable
    entrants: tuple[Entrant, ...]  # the first of JAX
    # (operands, result) -> the same part of the exact product and of the result, float32; None: errors are not shown
    exact_and_actual: Callable[[tuple, Any], tuple[jax.Array, jax.Array]] | None = None
    peak_flops: float = FP8_PEAK

    @functools.cached_property
    def types(self) -> dict[str, tuple]:
        """Gives shapes and dtypes of the operands by name."""
        return jax.eval_shape(self.draw)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Counts the bytes of the first entrant's operands and results, each read or written once."""
        first = self.entrants[0]
        operands = self.types[first.operands]
        arrays = jax.tree.leaves((operands, jax.eval_shape(first.operation, *operands)))
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    @property
    def floor_s(self) -> float:
        """Returns the seconds that no implementation can stay below."""
        return max(self.flops / self.peak_flops, self.num_bytes / MEMORY_RATE)

    @property
    def sets_and_rounds(self) -> tuple[int, int]:
        return sets_and_rounds(self.num_bytes, self.floor_s)


def hold(contests: list[Contest], *, against: str, with_torch: bool, modes: tuple[str, ...]) -> list[Row]:
    """Times every entrant of every contest, and returns a row for each and one per entrant for the geometric means.

    Args:
      contests: held one after the other; programs are compiled beforehand.
      against: entrant whose time is divided by the others'.
      with_torch: lets torch's entrants take part.
      modes: of "single", "burst" and "steady", see `timing`.
    """
    makers = {}
    for contest in contests:
        num_sets, rounds = contest.sets_and_rounds
        for entrant in contest.entrants:
            if not entrant.is_torch:
                operand_types = contest.types[entrant.operands]
                makers[contest.case, entrant.name] = functools.partial(
                    Program, entrant.operation, operand_types, num_sets=num_sets, rounds=rounds
                )
    programs = compile_all(makers)
    rows = []
    for contest in contests:
        own = {name: program for (case, name), program in programs.items() if case == contest.case}
        rows += _hold(contest, own, against=against, with_torch=with_torch, modes=modes)
        gc.collect()  # the operands, before the next ones are drawn
    return rows + geometric_means(rows)


def geometric_means(rows: list[Row]) -> list[Row]:
    """Returns a row per implementation with the geometric mean of every column of ratios ("... of ...")."""
    ratios = {}
    for row in rows:
        for column, value in row.items():
            if " of " in column and value is not None:
                ratios.setdefault(row["implementation"], {}).setdefault(column, []).append(value)
    return [
        {"case": GEOMETRIC_MEAN, "implementation": name}
        | {column: math.exp(sum(map(math.log, values)) / len(values)) for column, values in columns.items()}
        for name, columns in ratios.items()
    ]


def _hold(contest: Contest, programs: dict[str, Program], *, against: str, with_torch: bool, modes) -> list[Row]:
    drawn = jax.jit(contest.draw)()
    num_sets, rounds = contest.sets_and_rounds
    sets = {name: copies(operands, count=num_sets) for name, operands in drawn.items()}
    contenders, calls, errors = {}, {}, {}
    for entrant in contest.entrants:
        if entrant.is_torch and not with_torch:
            continue
        own_sets = sets[entrant.operands]
        if entrant.is_torch:
            operations = [entrant.operation(*operands) for operands in own_sets]
            contender, call = torch_contender(operations, rounds=rounds), operations[0]
        else:
            contender = programs[entrant.name].contender(own_sets)
            call = functools.partial(jax.jit(entrant.operation), *own_sets[0])
        contenders[entrant.name] = contender
        calls[entrant.name] = lambda call=call, wait=contender.wait: wait(call())
        results = contender.start()
        contender.wait(results)
        if contest.exact_and_actual is not None:
            result = jax.dlpack.from_dlpack(results[0]) if entrant.is_torch else results[0]
            errors[entrant.name] = float(_relative_error(*contest.exact_and_actual(drawn[entrant.operands], result)))
    seconds = {mode: MODES[mode](calls if mode == SINGLE else contenders) for mode in modes}
    rows = []
    for name in contenders:
        row = {"case": contest.case, "implementation": name}
        row |= {f"{mode} µs": seconds[mode][name] * 1e6 for mode in modes}
        row["floor µs"] = contest.floor_s * 1e6
        if contest.flops:
            row |= {f"{mode} TFLOP/s": contest.flops / seconds[mode][name] / 1e12 for mode in modes}
        row |= {f"{mode} TB/s": contest.num_bytes / seconds[mode][name] / 1e12 for mode in modes if not contest.flops}
        if against in contenders:
            row |= {f"{mode} of {against}": seconds[mode][against] / seconds[mode][name] for mode in modes}
        if errors:
            row["error"] = errors[name]
        rows.append(row)
    return rows


@jax.jit
def _relative_error(exact: jax.Array, actual: jax.Array) -> jax.Array:
    """Returns the norm of the difference over the norm of the exact values."""
    return jnp.linalg.norm(actual - exact) / jnp.linalg.norm(exact)
