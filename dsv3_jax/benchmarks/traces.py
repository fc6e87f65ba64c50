"""What ran on the GPUs and when, read from a trace of `jax.profiler`.

`jax.profiler.trace(directory, create_perfetto_trace=True)` writes JSON in Chrome's format: an event per kernel in a
process per device and a thread per stream. A kernel of NCCL lasts from its start until the slowest partner is done, so
the time of an exchange holds what its devices wait for one another.
"""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

TRACE_FILE = "perfetto_trace.json.gz"
# The parts of a network and its training, as `jax.named_scope` names them in the metadata of compiled programs.
EXCHANGE = ("expert_exchange/dispatch", "expert_exchange/combine")
PARTS = (*EXCHANGE, "experts", "shared_experts", "router", "attention", "feed_forward", "mtp", "loss",
         "prepare_weights", "gather_weights", "sum_gradients", "optimizer", "metrics")  # fmt: skip
PART = re.compile(rf"(?:.*[/(:])?({'|'.join(PARTS)})(?=[/):]|$)")
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*\bmetadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)


class Kernel(NamedTuple):
    """One kernel or copy on one stream of one device."""

    device: str
    stream: str
    name: str
    operation: str  # the HLO instruction it belongs to; empty where the trace does not say
    start_s: float
    end_s: float


class Overlap(NamedTuple):
    """How long one device did what, in seconds; kernels side by side on several streams count once."""

    exchange_s: float  # some kernel of an exchange ran
    compute_s: float  # some kernel ran that is no collective
    both_s: float  # both at the same time
    idle_s: float  # between the first start and the last end, nothing ran

    @property
    def hidden_share(self) -> float:
        """Returns the share of the exchange during which the device computed; 1 where nothing was exchanged."""
        return self.both_s / self.exchange_s if self.exchange_s else 1.0


def read_kernels(directory: str | pathlib.Path) -> list[Kernel]:
    """Reads every kernel of the newest trace below a directory, by start.

    Raises:
      ValueError: there is no trace, or it holds no kernel of a GPU.
    """
    paths = sorted(pathlib.Path(directory).rglob(TRACE_FILE), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError(f"{directory}: holds no {TRACE_FILE}; trace with create_perfetto_trace=True")
    with gzip.open(paths[-1]) as file:
        content = json.load(file)
    kernels = kernels_of(content["traceEvents"] if isinstance(content, dict) else content)
    if not kernels:
        raise ValueError(f"{paths[-1]}: holds no kernel of a GPU; trace a program that runs on one")
    return kernels


def kernels_of(events: Sequence[dict]) -> list[Kernel]:
    """Returns the kernels among the events of a trace, by start; only streams count, other lines repeat them."""
    devices, streams = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            devices[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            streams[event["pid"], event["tid"]] = event["args"]["name"]
    kernels = []
    for event in events:
        device = devices.get(event.get("pid"), "")
        stream = streams.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and "GPU" in device and stream.startswith("Stream"):
            start_s, operation = event["ts"] * 1e-6, event.get("args", {}).get("hlo_op", "")
            kernels.append(Kernel(device, stream, event["name"], operation, start_s, start_s + event["dur"] * 1e-6))
    return sorted(kernels, key=lambda kernel: kernel.start_s)


def is_collective(kernel: Kernel) -> bool:
    """Tells whether a kernel moves data between devices."""
    return "nccl" in kernel.name.lower()


def operation_names(hlo_text: str) -> dict[str, str]:
    """Returns where each instruction of a compiled program comes from: its `op_name`, a path of traced functions."""
    return dict(INSTRUCTION.findall(hlo_text))


def part(path: str) -> str:
    """Returns which of PARTS an instruction's `op_name` names innermost; empty where it names none."""
    match = PART.match(path)
    return match.group(1) if match else ""


def is_backward(path: str) -> bool:
    """Tells by an instruction's `op_name` whether it belongs to the backward pass, what is computed again included."""
    return "transpose(" in path


def overlap(kernels: Sequence[Kernel], is_exchange: Callable[[Kernel], bool]) -> dict[str, Overlap]:
    """Returns for every device how long it exchanged, computed, and did both."""
    result = {}
    for device in sorted({kernel.device for kernel in kernels}):
        own = [kernel for kernel in kernels if kernel.device == device]
        exchange = _union([kernel for kernel in own if is_exchange(kernel)])
        compute = _union([kernel for kernel in own if not is_collective(kernel)])
        span_s = max(kernel.end_s for kernel in own) - own[0].start_s
        result[device] = Overlap(_length(exchange), _length(compute), _shared_length(exchange, compute),
                                 span_s - _length(_union(own)))  # fmt: skip
    return result


def beside(kernels: Sequence[Kernel], is_exchange: Callable[[Kernel], bool], *, top: int) -> list[tuple[str, float]]:
    """Returns which kernels computed longest during exchanges of their own device: (name, seconds on all devices)."""
    seconds = collections.Counter()
    for device in {kernel.device for kernel in kernels}:
        own = [kernel for kernel in kernels if kernel.device == device]
        exchange = _union([kernel for kernel in own if is_exchange(kernel)])
        for kernel in own:
            if not is_collective(kernel):
                seconds[kernel.name] += _shared_length(exchange, [(kernel.start_s, kernel.end_s)])
    return [(name, value) for name, value in seconds.most_common(top) if value > 0]


def longest(kernels: Sequence[Kernel], *, top: int) -> list[tuple[str, float, int]]:
    """Returns the kernels that took most time in all: (name, seconds, how often it ran), devices together."""
    seconds, counts = collections.Counter(), collections.Counter()
    for kernel in kernels:
        seconds[kernel.name] += kernel.end_s - kernel.start_s
        counts[kernel.name] += 1
    return [(name, value, counts[name]) for name, value in seconds.most_common(top)]


def _union(kernels: Sequence[Kernel]) -> list[tuple[float, float]]:
    """Returns the intervals, ascending and apart, in which at least one of the kernels ran."""
    intervals = []
    for start_s, end_s in sorted((kernel.start_s, kernel.end_s) for kernel in kernels):
        if intervals and start_s <= intervals[-1][1]:
            intervals[-1] = (intervals[-1][0], max(intervals[-1][1], end_s))
        else:
            intervals.append((start_s, end_s))
    return intervals


def _length(intervals: Sequence[tuple[float, float]]) -> float:
    return sum(end_s - start_s for start_s, end_s in intervals)


def _shared_length(ones: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Returns how long two lists of ascending, disjoint intervals overlap."""
    shared_s, one, other = 0.0, 0, 0
    while one < len(ones) and other < len(others):
        shared_s += max(0.0, min(ones[one][1], others[other][1]) - max(ones[one][0], others[other][0]))
        if ones[one][1] <= others[other][1]:
            one += 1
        else:
            other += 1
    return shared_s
