"""Reads the text of a compiled program: computations, instructions, and where in the source each comes from."""

import dataclasses
import functools
import math
import re

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8,
    "f8e5m2fnuz": 8, "f8e8m0fnu": 8, "f4e2m1fn": 4, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, its types and attributes as the text gives them."""

    name: str
    opcode: str
    type: str  # of the result, e.g. "(f32[2,3]{1,0}, s32[])"
    operands: tuple[str, ...]  # names
    attributes: str  # the rest of the line
    arguments: str  # what stands between the opcode's parentheses
    is_root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX transformations and scopes that made it; empty if the compiler made it."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1).replace("\\'", "'") if match else ""

    @functools.cached_property
    def frame(self) -> int | None:
        """Index of the source position in the program's table of stack frames."""
        match = re.search(r"stack_frame_id=(\d+)", self.attributes)
        return int(match.group(1)) if match else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs; of a conditional all branches."""
        branches = _BRANCHES.search(self.attributes)
        names = re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else []
        return (*_CALLED.findall(self.attributes), *names)

    @property
    def body(self) -> str:
        """Name of the computation that a while loop repeats."""
        return re.search(r"\bbody=%?([\w.\-]+)", self.attributes).group(1)

    @property
    def trip_count(self) -> int | None:
        """How often a while loop runs, where the compiler knows it."""
        match = _TRIP_COUNT.search(self.attributes)
        return int(match.group(1)) if match else None

    @property
    def index(self) -> int:
        """Which element a get-tuple-element takes, or which argument a parameter is."""
        if self.opcode == "parameter":
            return int(self.arguments)
        return int(re.search(r"\bindex=(\d+)", self.attributes).group(1))

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays of the result."""
        return type_bytes(self.type)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module."""

    computations: dict[str, dict[str, Instruction]]  # by computation, then by instruction, in the order of the schedule
    entry: str
    stacks: dict[int, tuple[str, ...]]  # by frame: source files from the innermost call outwards

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All instructions by name, which is unique in a module."""
        return {name: found for computation in self.computations.values() for name, found in computation.items()}

    @functools.cached_property
    def computation_of(self) -> dict[str, str]:
        """The computation that holds each instruction."""
        return {name: computation for computation, found in self.computations.items() for name in found}

    @functools.cached_property
    def loop_of(self) -> dict[str, Instruction]:
        """The while loop that repeats each computation that is a loop's body."""
        return {found.body: found for found in self.instructions.values() if found.opcode == "while"}

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose result is the computation's."""
        return next(found for found in self.computations[computation].values() if found.is_root)

    def files(self, instruction: Instruction) -> tuple[str, ...]:
        """Returns the source files that led to an instruction, innermost first; empty where none is known."""
        return self.stacks.get(instruction.frame, ())


def parse(text: str) -> Program:
    """Reads what `jax.stages.Compiled.as_text()` returns.

    Raises:
      ValueError: it has no entry computation.
    """
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    computations: dict[str, dict[str, Instruction]] = {}
    entry, table, current = None, None, None
    for line in text.splitlines():
        if line in _TABLES:
            table = tables[line]
        elif table is not None and line[:1].isdigit():
            number, _, rest = line.partition(" ")
            table[int(number)] = rest
        elif match := _COMPUTATION.match(line):
            table, current = None, computations.setdefault(match.group(2), {})
            entry = match.group(2) if match.group(1) else entry
        elif current is not None and " = " in line:
            instruction = _parse_instruction(line.strip())
            for operand in instruction.operands:
                _add_element(current, operand)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("HLO text: no entry computation; it must be that of a compiled module")
    return Program(computations, entry, _stacks(tables))


def type_bytes(type_: str) -> int:
    """Returns the bytes of all arrays of a type, a tuple's included.

    Raises:
      ValueError: an element type of unknown size.
    """
    return sum(math.ceil(_bits(name) * math.prod(dims) / 8) for name, dims in arrays(type_))


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (element type, dimensions) of every array of a type."""
    return [
        (name, tuple(int(dim) for dim in dims.split(",") if dim))
        for name, dims in _ARRAY.findall(type_)
        if name != "token"
    ]


def elements(type_: str) -> list[str]:
    """Splits a tuple type into the types of its elements; any other type is its own only element."""
    type_ = re.sub(r"/\*.*?\*/", "", type_).strip()
    return _split(type_[1:-1]) if type_.startswith("(") else [type_]


def _bits(name: str) -> int:
    if name not in BITS:
        raise ValueError(f"HLO text: element type {name!r} has no known size")
    return BITS[name]


def _parse_instruction(line: str) -> Instruction:
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode_end = rest.index("(", type_end)
    arguments_end = _closing(rest, opcode_end)
    arguments = rest[opcode_end + 1 : arguments_end]
    opcode = rest[type_end:opcode_end].strip()
    operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", arguments))
    attributes = rest[arguments_end + 1 :]
    return Instruction(name.lstrip("%"), opcode, rest[:type_end], operands, attributes, arguments, is_root)


def _add_element(computation: dict[str, Instruction], operand: str) -> None:
    """Adds the instruction that `tuple#1`, short for an element of a tuple, stands for."""
    source, mark, index = operand.rpartition("#")
    if mark and operand not in computation:
        _add_element(computation, source)
        type_ = elements(computation[source].type)[int(index)]
        computation[operand] = Instruction(
            operand, "get-tuple-element", type_, (source,), f"index={index}", f"%{source}", is_root=False
        )


def _closing(text: str, start: int) -> int:
    """Returns the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"HLO text: no closing parenthesis in {text[:80]!r}")


def _split(text: str) -> list[str]:
    """Splits at the commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def _stacks(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, ...]]:
    names = {number: rest.strip('"') for number, rest in tables["FileNames"].items()}
    files = {number: names.get(_field(rest, "file_name_id"), "") for number, rest in tables["FileLocations"].items()}
    frames = {
        number: (_field(rest, "file_location_id"), _field(rest, "parent_frame_id"))
        for number, rest in tables["StackFrames"].items()
    }
    stacks = {}
    for number in frames:
        stack, frame = [], number
        while frame in frames:
            location, parent = frames[frame]
            stack.append(files.get(location, ""))
            frame = parent - 1  # the text counts parents from 1 and means none by it
        stacks[number] = tuple(stack)
    return stacks


def _field(text: str, name: str) -> int | None:
    match = re.search(rf"\b{name}=(\d+)", text)
    return int(match.group(1)) if match else None
