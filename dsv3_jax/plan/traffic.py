"""Counts the bytes that one device moves in a compiled program: to other devices and from its own memory."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from dsv3_jax.plan.hlo import Instruction, Program, elements, type_bytes

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# Instructions that name, bundle or wait for what others made, and move nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "optimization-barrier",
    "partition-id", "replica-id", "add-dependency", "async-update", "async-done", "domain",
}  # fmt: skip
_NESTED = {"while", "conditional", "call", "async-start"}
_IN_PLACE = ("dynamic-update-slice", "scatter")

DynamicTrips = Callable[[Instruction], int]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of one kind of collective among the devices of the same mesh axes."""

    kind: str
    axes: tuple[str, ...]  # those along which the devices of a group differ
    num_runs: int
    sent_bytes: int  # by one device, all runs together, with the fewest bytes that the result allows
    group_size: int
    group_hosts: int  # hosts that the devices of a group are on


def collectives(
    program: Program, mesh_sizes: dict[str, int], *, devices_per_host: int, dynamic_trips: DynamicTrips
) -> list[Collective]:
    """Returns what each device sends, by kind and axes, most bytes first.

    Sent bytes, for a group of g devices: all-gather and all-to-all result · (g-1)/g, reduce-scatter result · (g-1),
    all-reduce 2 · result · (g-1)/g, collective-permute the result. Of a conditional the costliest branch counts.

    Args:
      mesh_sizes: devices along each axis, in the order of the program's devices.
      devices_per_host: that many successive devices share a host.
      dynamic_trips: how often a while loop runs whose trip count depends on the data.
    """
    total: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])

    def visit(instruction: Instruction, times: int) -> None:
        kind = collective_kind(instruction)
        if kind is not None:
            devices = _group(instruction, mesh_sizes)
            hosts = len({device // devices_per_host for device in devices})
            entry = total[kind, _axes(devices, mesh_sizes), len(devices), hosts]
            entry[0] += times
            entry[1] += times * _sent_bytes(kind, instruction, len(devices))

    def weight(instruction: Instruction) -> int:
        kind = collective_kind(instruction)
        return 0 if kind is None else _sent_bytes(kind, instruction, len(_group(instruction, mesh_sizes)))

    _walk(program, visit, weight, dynamic_trips)
    found = [Collective(kind, axes, runs, sent, *group) for (kind, axes, *group), (runs, sent) in total.items()]
    return sorted(found, key=lambda collective: -collective.sent_bytes)


def memory_bytes(program: Program, dynamic_trips: DynamicTrips) -> int:
    """Returns the bytes that one device reads and writes in its memory: operands and results of every kernel.

    What a kernel slices out of an operand or updates in place counts alone, not the whole array.
    """
    total = 0

    def visit(instruction: Instruction, times: int) -> None:
        nonlocal total
        total += times * _touched_bytes(program, instruction)

    _walk(program, visit, lambda instruction: _touched_bytes(program, instruction), dynamic_trips)
    return total


def collective_kind(instruction: Instruction) -> str | None:
    """Returns the kind of a collective, once for those in two halves; None for any other instruction."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def dynamic_loops(program: Program) -> list[Instruction]:
    """Returns the while loops whose trip count the compiler does not know."""
    return [
        instruction
        for instruction in program.instructions.values()
        if instruction.opcode == "while" and instruction.trip_count is None
    ]


def _walk(program: Program, visit: Callable[[Instruction, int], None], weight: Callable[[Instruction], int],
          dynamic_trips: DynamicTrips) -> None:  # fmt: skip
    """Visits what runs, with how often it runs; of a conditional the branch of the greatest weight."""

    def run(computation: str, times: int, visit: Callable[[Instruction, int], None]) -> None:
        for instruction in program.computations[computation].values():
            visit(instruction, times)
            if instruction.opcode == "while":
                trips = instruction.trip_count
                run(instruction.body, times * (dynamic_trips(instruction) if trips is None else trips), visit)
            elif instruction.opcode == "conditional":
                run(max(instruction.called, key=weigh), times, visit)
            elif instruction.opcode in _NESTED:
                for name in instruction.called:
                    run(name, times, visit)

    def weigh(computation: str) -> int:
        total = 0

        def add(instruction: Instruction, times: int) -> None:
            nonlocal total
            total += times * weight(instruction)

        run(computation, 1, add)
        return total

    run(program.entry, 1, visit)


def _sent_bytes(kind: str, instruction: Instruction, group_size: int) -> int:
    result = _result_bytes(kind, instruction)
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (group_size - 1)
    factor = 2 if kind == "all-reduce" else 1
    return factor * result * (group_size - 1) // group_size


def _result_bytes(kind: str, instruction: Instruction) -> int:
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        return instruction.num_bytes
    return type_bytes(elements(instruction.type)[1])  # (operands, results, context...)


def _axes(devices: list[int], mesh_sizes: dict[str, int]) -> tuple[str, ...]:
    """Returns the axes along which devices differ."""
    positions = np.array(np.unravel_index(devices, list(mesh_sizes.values())))  # [axis, device]
    return tuple(name for name, along in zip(mesh_sizes, positions, strict=True) if len(set(along)) > 1)


def _group(instruction: Instruction, mesh_sizes: dict[str, int]) -> list[int]:
    """Returns the devices of the first group that exchanges something; of a permutation the first pair."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", instruction.attributes)
    return [int(number) for number in pairs.groups()] if pairs else _first_group(instruction, mesh_sizes)


def _first_group(instruction: Instruction, mesh_sizes: dict[str, int]) -> list[int]:
    """Returns the devices of the first group, from any of the three notations."""
    text = instruction.attributes
    if listed := re.search(r"replica_groups=\{(?:\{([\d,]+)\}.*?)?\}", text):
        if listed.group(1) is None:
            return list(range(math.prod(mesh_sizes.values())))
        return [int(number) for number in listed.group(1).split(",")]
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(x) for x in part.split(",")] if part else None for part in tiled.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices if order is None else devices.transpose(order)
        return devices.reshape(shape[0], -1)[0].tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
        return _named_group(named, instruction)
    raise ValueError(f"HLO text: {instruction.name} has replica groups of unknown form: {text[:200]}")


def _named_group(match: re.Match, instruction: Instruction) -> list[int]:
    """Returns the devices of the first group of `mesh['x'=2,'y'=4] {'y'}`; sub-axes are written 'y':(1)2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?\)", match.group(2))
    ids = np.arange(math.prod(sizes.values()))
    if order is not None and order.group(2) is not None:
        dims = [int(x) for x in order.group(2).split(",")]
        ids = ids.reshape(dims)
        ids = ids.transpose([int(x) for x in order.group(3).split(",")]) if order.group(3) else ids
    ids = ids.reshape(list(sizes.values()))
    axes = re.findall(r"'([^']+)'(:\(\d+\)\d+)?", match.group(3))
    if any(part for _, part in axes):
        raise ValueError(f"HLO text: {instruction.name} groups devices by part of an axis: {match.group(3)}")
    chosen = tuple(slice(None) if name in {axis for axis, _ in axes} else 0 for name in sizes)
    return ids[chosen].reshape(-1).tolist()


def _touched_bytes(program: Program, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode in _NESTED or opcode.endswith("-done"):
        return 0
    if opcode == "fusion":
        return _fusion_bytes(program, instruction)
    own = program.instructions
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.num_bytes
    if opcode == "dynamic-update-slice":
        return 2 * own[instruction.operands[1]].num_bytes
    if opcode == "scatter":
        indices, *updates = instruction.operands[_num_scattered(instruction) :]
        return own[indices].num_bytes + 2 * sum(own[name].num_bytes for name in updates)
    if opcode.endswith("-start"):  # (operands, results, context...): both halves together
        return instruction.num_bytes
    operands = sum(own[name].num_bytes for name in dict.fromkeys(instruction.operands))
    return operands + instruction.num_bytes


def _fusion_bytes(program: Program, fusion: Instruction) -> int:
    """Returns what a fused kernel reads and writes, slices and in-place updates at their own size."""
    inner = program.computations[fusion.called[0]]
    users = collections.defaultdict(list)
    for instruction in inner.values():
        for operand in dict.fromkeys(instruction.operands):
            users[operand].append(instruction)
    total = 0
    for instruction in inner.values():
        if instruction.opcode == "parameter":
            total += _read_bytes(instruction, inner, users)
    return total + sum(_written_bytes(inner, part) for part in _results(inner, program.root(fusion.called[0])))


def _read_bytes(parameter: Instruction, inner: dict[str, Instruction], users: dict[str, list[Instruction]]) -> int:
    """Returns the bytes of a parameter that its users read: slices alone where all of them slice."""
    size, pending, seen = 0, [parameter], set()
    while pending:
        source = pending.pop()
        for user in users[source.name]:
            if user.name in seen:
                continue
            seen.add(user.name)
            if user.opcode in ("bitcast", "reshape", "transpose", "convert", "copy") and user.num_bytes:
                pending.append(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == source.name:
                size += user.num_bytes
            elif not (user.opcode in _IN_PLACE and source.name in user.operands[: _num_scattered(user)]):
                return parameter.num_bytes
    return min(size, parameter.num_bytes)


def _results(inner: dict[str, Instruction], root: Instruction) -> list[Instruction]:
    return [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written_bytes(inner: dict[str, Instruction], result: Instruction) -> int:
    origin = result
    while origin.opcode in ("bitcast", "reshape", "copy", "convert", "transpose") and origin.operands:
        origin = inner[origin.operands[0]]
    if origin.opcode == "dynamic-update-slice":
        return inner[origin.operands[1]].num_bytes
    if origin.opcode == "scatter":
        return sum(inner[name].num_bytes for name in origin.operands[_num_scattered(origin) + 1 :])
    return result.num_bytes


def _num_scattered(update: Instruction) -> int:
    """Returns how many operands, the first ones, are written in place; a scatter has as many updates."""
    return (len(update.operands) - 1) // 2 if update.opcode == "scatter" else 1
