"""Says what fills a device's memory when a compiled program needs most of it, by kind.

The compiler writes down which buffers are alive at its peak; their instructions tell where they come from.
"""

import dataclasses
import itertools
import math
import re

import jax

from dsv3_jax.plan.hlo import Instruction, Program, arrays

MASTERS = "master weights"
MOMENTS = "optimizer moments"
WEIGHTS = "weights as computed with"
CACHE = "key-value cache"
GRADIENTS = "gradients"
KEPT = "kept activations"
EXCHANGE = "exchange buffers"
INPUTS = "other inputs"
RESULTS = "new results"
TEMPORARIES = "temporaries"
KINDS = (MASTERS, MOMENTS, WEIGHTS, CACHE, GRADIENTS, KEPT, EXCHANGE, INPUTS, RESULTS, TEMPORARIES)

_PACKAGE = "dsv3_jax/"
_ARGUMENTS = {"state.params": MASTERS, "state.optimizer": MOMENTS, "params": WEIGHTS, "cache": CACHE}
_WEIGHT_SOURCES = ("model/params.py", "model/weights.py", "sharding/zero.py")
_EXCHANGE_SOURCES = ("sharding/expert_exchange.py", "sharding/row_packing.py", "sharding/exchange_plan.py")
_EXPERT_ROOMS = ("dsv3_jax/model/", "dsv3_jax/fp8/")
# Those of the compiler's own fusions that have one operand are transposes and copies as well.
_MOVES = ("copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done", "optimization-barrier")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One buffer that is alive at the peak."""

    name: str
    kind: str
    num_bytes: int
    type: str  # element type and dimensions
    origin: str  # of the instruction that fills it: argument, or path of JAX transformations
    file: str  # of this package, innermost in the call that made the instruction; empty where none is known


@dataclasses.dataclass(frozen=True)
class Peak:
    """A device's memory at the peak of a program."""

    num_bytes: int  # arguments, results that replace none, and the arena of everything else
    by_kind: dict[str, int]  # adds up to num_bytes
    largest: tuple[Buffer, ...]


def peak(
    compiled: jax.stages.Compiled, program: Program, assignment: str, live_ranges: str, *, weight_sizes: frozenset[int]
) -> Peak:
    """Returns what fills the memory of one device at the moment when most of it is in use.

    Gaps that the compiler left between buffers count as temporaries, for nothing else can use them.

    Args:
      program: the text of `compiled`, read.
      assignment: the compiler's text on the place of every buffer.
      live_ranges: its text on the life of every buffer.
      weight_sizes: elements of one device's part of every parameter, as stored and as computed with.
    """
    allocations, lives = _allocations(assignment), _lives(live_ranges)
    values = _fullest_moment(allocations, lives)
    forward_end = _forward_end(program, live_ranges)
    buffers = []
    for value in values:
        origin = _origin(program, *_split_name(value.name))
        outlives_forward = lives.get(value.name, (0, 0))[1] > forward_end
        kind = _kind(program, origin, value.type, weight_sizes, outlives_forward)
        buffers.append(_buffer(program, value, origin, kind))
    for allocation in allocations:
        if not allocation.is_arena and allocation.values:
            buffers.append(_buffer_outside(program, allocation))
    by_kind = dict.fromkeys(KINDS, 0)
    for buffer in buffers:
        by_kind[buffer.kind] += buffer.num_bytes
    total = allocated_bytes(compiled)
    by_kind[TEMPORARIES] += total - sum(by_kind.values())
    largest = tuple(sorted(buffers, key=lambda buffer: -buffer.num_bytes))
    return Peak(total, {kind: size for kind, size in by_kind.items() if size}, largest)


def allocated_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a device must have for a program: arguments, results that replace none, temporaries."""
    statistics = compiled.memory_analysis()
    new_results = statistics.output_size_in_bytes - statistics.alias_size_in_bytes
    return statistics.argument_size_in_bytes + new_results + statistics.temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class _Value:
    """One buffer's place: the instruction that fills it, with the element of its result in braces."""

    name: str
    size: int
    offset: int
    type: str


@dataclasses.dataclass(frozen=True)
class _Allocation:
    """A stretch of memory; in the arena buffers follow each other in time."""

    size: int
    is_arena: bool
    values: list[_Value]


def _allocations(assignment: str) -> list[_Allocation]:
    """Reads the compiler's text on buffers; constants and what lives in registers are left out."""
    allocations: list[_Allocation] = []
    for line in assignment.splitlines():
        if match := re.match(r"allocation \d+: size (\d+),(.*)", line):
            is_skipped = "thread-local" in line or line.endswith("constant:")
            is_arena = "preallocated-temp" in line
            current = _Allocation(int(match.group(1)), is_arena, [])
            if not is_skipped:
                allocations.append(current)
        elif match := re.match(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)", line):
            name, size, offset, type_ = match.groups()
            current.values.append(_Value(name, int(size), int(offset), type_))
        elif not line.strip():
            break  # what follows is about single instructions
    return allocations


def _lives(live_ranges: str) -> dict[str, tuple[int, int]]:
    """Returns the first and last moment of every buffer, by instruction and element."""
    found = re.findall(r"^    (\S+)\{([\d,]*)\}:(\d+)-(\d+)$", live_ranges, re.MULTILINE)
    return {_join_name(name, index): (int(start), int(end)) for name, index, start, end in found}


def _forward_end(program: Program, live_ranges: str) -> float:
    """Returns the moment when the last loop of the forward pass is over; without loops, its last instruction."""
    moments = {name: int(moment) for moment, name in re.findall(r"^    (\d+):(\S+)$", live_ranges, re.MULTILINE)}
    forward = [name for name in moments if name in program.instructions and _is_forward(program.instructions[name])]
    loops = [name for name in forward if program.instructions[name].opcode == "while"]
    return max((moments[name] for name in loops or forward), default=math.inf)


def _fullest_moment(allocations: list[_Allocation], lives: dict[str, tuple[int, int]]) -> list[_Value]:
    """Returns the buffers that fill most of the arena at one moment; of those in the same place one."""
    known = [
        (*lives[value.name], value)
        for allocation in allocations
        if allocation.is_arena
        for value in allocation.values
        if value.name in lives
    ]
    fullest = []
    for now in sorted({start for start, _, _ in known}):
        alive = _without_overlap([value for start, end, value in known if start <= now <= end])
        if sum(value.size for value in alive) > sum(value.size for value in fullest):
            fullest = alive
    return fullest


def _without_overlap(values: list[_Value]) -> list[_Value]:
    """Returns buffers cut to what no other of them covers."""
    cut, end = [], 0
    for value in sorted(values, key=lambda value: (value.offset, -value.size)):
        covered = max(0, min(end - value.offset, value.size))
        if covered < value.size:
            cut.append(dataclasses.replace(value, size=value.size - covered))
        end = max(end, value.offset + value.size)
    return cut


def _split_name(name: str) -> tuple[str, tuple[int, ...]]:
    instruction, _, index = name.partition("{")
    return instruction, tuple(int(part) for part in index.rstrip("}").split(",") if part)


def _join_name(instruction: str, index: str) -> str:
    return f"{instruction}{{{index}}}" if index else instruction


def _kind(
    program: Program, origin: Instruction, type_: str, weight_sizes: frozenset[int], outlives_forward: bool
) -> str:
    """Returns the kind of a buffer in the arena, of the given type, that an instruction fills."""
    if _kind_of_argument(program, origin) is not None:
        return TEMPORARIES  # a copy
    files = program.files(origin)
    is_weight_size = _num_elements(type_) in weight_sizes
    differentiated = "jvp(" in origin.op_name
    is_gathered = origin.opcode.startswith("all-gather")
    if (is_gathered or not differentiated) and any(file.endswith(_WEIGHT_SOURCES) for file in files):
        return WEIGHTS
    if is_weight_size and (type_.startswith("f32") or _is_backward(origin)):
        return GRADIENTS
    if _is_forward(origin) and (outlives_forward or _updates_in_place(program, origin)):
        return KEPT
    return EXCHANGE if is_exchange(files) else TEMPORARIES


def is_exchange(files: tuple[str, ...]) -> bool:
    """Tells whether source files, innermost first, are those of a step of the expert exchange.

    The exchange calls the experts, whose own steps lie further inside.
    """
    inside = itertools.takewhile(lambda file: not file.endswith(_EXCHANGE_SOURCES), files)
    has_exchange = any(file.endswith(_EXCHANGE_SOURCES) for file in files)
    return has_exchange and not any(room in file for file in inside for room in _EXPERT_ROOMS)


def _buffer_outside(program: Program, allocation: _Allocation) -> Buffer:
    """Returns an argument, which a result may replace, or a result with a place of its own."""
    for value in allocation.values:
        instruction = program.instructions[_split_name(value.name)[0]]
        kind = _kind_of_argument(program, instruction)
        if kind is not None:
            return _buffer(program, value, instruction, kind)
    value = dataclasses.replace(allocation.values[0], size=allocation.size)
    return _buffer(program, value, _origin(program, *_split_name(value.name)), RESULTS)


def _kind_of_argument(program: Program, origin: Instruction) -> str | None:
    """Returns the kind of one of the program's arguments, by its name there; None for anything else."""
    if origin.opcode != "parameter" or program.computation_of[origin.name] != program.entry:
        return None
    return next((kind for prefix, kind in _ARGUMENTS.items() if origin.op_name.startswith(prefix)), INPUTS)


def _buffer(program: Program, value: _Value, origin: Instruction, kind: str) -> Buffer:
    path = origin.op_name if origin.op_name else origin.name
    own_files = (file.rpartition(_PACKAGE)[2] for file in program.files(origin) if _PACKAGE in file)
    return Buffer(value.name, kind, value.size, _plain(value.type), path, next(own_files, ""))


def _is_forward(instruction: Instruction) -> bool:
    return "jvp(" in instruction.op_name and not _is_backward(instruction)


def _is_backward(instruction: Instruction) -> bool:
    return "transpose(" in instruction.op_name


def _updates_in_place(program: Program, instruction: Instruction) -> bool:
    """Tells whether an instruction writes a slice of an array that a loop carries: a scan's results."""
    if instruction.opcode == "fusion":
        return any(inner.opcode == "dynamic-update-slice" for inner in _inner(program, instruction))
    return instruction.opcode == "dynamic-update-slice"


def _inner(program: Program, fusion: Instruction) -> list[Instruction]:
    return list(program.computations[fusion.called[0]].values())


def _origin(program: Program, name: str, index: tuple[int, ...]) -> Instruction:
    """Follows tuples, loops and copies back to the instruction that fills a buffer."""
    seen = set()
    while (name, index) not in seen:
        seen.add((name, index))
        instruction = program.instructions[name]
        source = _source(program, instruction, index)
        if source is None:
            return instruction
        name, index = source
    return program.instructions[name]


def _source(program: Program, instruction: Instruction, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
    """Returns where the value of an instruction's element comes from; None if the instruction makes it."""
    opcode = instruction.opcode
    if opcode == "get-tuple-element":
        return instruction.operands[0], (instruction.index, *index)
    if opcode == "tuple" and index:
        return instruction.operands[index[0]], index[1:]
    if opcode == "while":
        return _of_loop(program, instruction, index)
    if opcode == "parameter":
        caller = program.loop_of.get(program.computation_of[instruction.name])
        return None if caller is None else _of_loop(program, caller, index)
    if opcode in ("call", "conditional"):
        return program.root(instruction.called[0]).name, index
    is_unnamed_move = opcode == "fusion" and not instruction.op_name and len(instruction.operands) == 1
    return (instruction.operands[0], index) if opcode in _MOVES or is_unnamed_move else None


def _of_loop(program: Program, loop: Instruction, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
    """Returns what a loop leaves in an element of its state: its body's result, or if unchanged what it began with."""
    if not index:
        return None
    body = program.root(loop.body)
    if body.opcode != "tuple":
        return body.name, index
    last = program.instructions[body.operands[index[0]]]
    parameter = last.opcode == "get-tuple-element" and program.instructions[last.operands[0]].opcode == "parameter"
    if parameter and last.index == index[0]:
        return loop.operands[0], index
    return last.name, index[1:]


def _num_elements(type_: str) -> int:
    return sum(math.prod(dims) for _, dims in arrays(type_))


def _plain(type_: str) -> str:
    """Returns a type without its layout."""
    return re.sub(r"\{[^}]*\}", "", type_)
