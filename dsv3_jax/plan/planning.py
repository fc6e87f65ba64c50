"""Puts together what a program needs of every device."""

import contextlib
import dataclasses
import math
import time

import jax

from dsv3_jax.config import RunConfig, require
from dsv3_jax.kernels import device
from dsv3_jax.plan import flops, memory, programs, roofline, serving, traffic
from dsv3_jax.plan.compilation import compile_program
from dsv3_jax.plan.hardware import Hardware

_IN_LAYERS = (memory.WEIGHTS, memory.GRADIENTS)  # what FSDP and pipeline stages divide
_STATE = (memory.MASTERS, memory.MOMENTS)  # what ZeRO divides


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run of a program needs of every device. Bytes, FLOPs and seconds are those of one device."""

    program: str
    work: str
    mesh: dict[str, int]  # devices along each axis
    is_fsdp: bool
    hardware: Hardware
    tokens: int  # all devices together
    memory: dict[str, int]  # bytes at the peak, by kind
    gradient_copies: int  # alive at a time: of several passes the sum and the next; 0 without gradients
    outside_layers: programs.OutsideLayers  # what FSDP leaves whole
    largest_buffers: tuple[memory.Buffer, ...]
    usable_memory: int
    flops: dict[str, float]  # executed, by precision
    needed_flops: float | None  # by the usual count, without what is computed again
    memory_traffic: int  # bytes read and written
    collectives: tuple[traffic.Collective, ...]
    busy_seconds: dict[str, float]  # by resource
    compile_seconds: float

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def peak_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.usable_memory

    @property
    def least_seconds(self) -> float:
        """What the busiest resource needs; the rest may hide behind it."""
        return roofline.least_seconds(self.busy_seconds)[0]

    @property
    def dominated_by(self) -> str:
        return roofline.least_seconds(self.busy_seconds)[1]

    @property
    def least_with_fsdp(self) -> int | None:
        """The bytes that FSDP would need at least: of weights and gradients in layers only this device's parts remain.

        Besides, it needs those of a layer or two at a time, and for what is computed then. None where it would change
        nothing: outside of training, and where it is on.
        """
        if self.program != "train" or self.is_fsdp:
            return None
        whole = self.outside_layers
        gradients = self.gradient_copies * whole.gradient_bytes + self._gradient_parts
        return self.peak_memory - self._sum(_IN_LAYERS) + whole.weight_bytes + gradients

    @property
    def devices_to_fit(self) -> int | None:
        """Devices, by further replicas, over which master weights and moments would be divided enough.

        With FSDP gradients are too; without, they are whole on every device. The rest is taken to stay as it is. None
        if they could not, or need not.
        """
        divided = self._sum(_STATE) + (self._gradient_parts if self.is_fsdp else 0)
        per_replica = self.num_devices // self.mesh["replica"]
        room = self.usable_memory - (self.peak_memory - divided)
        if self.fits or room <= 0:
            return None
        return per_replica * math.ceil(divided * self.mesh["replica"] / room)

    @property
    def stages_to_fit(self) -> int | None:
        """Pipeline stages that would divide weights and gradients enough; None if they could not, or need not.

        Kept activations stay: a stage has fewer layers and, to be busy, as many more passes under way.
        """
        in_layers = self._sum(_IN_LAYERS)
        room = self.usable_memory - (self.peak_memory - in_layers)
        return None if self.fits or room <= 0 else math.ceil(in_layers / room)

    @property
    def _gradient_parts(self) -> int:
        """The bytes of this device's parts of all gradients: float32, as master weights are."""
        return self.gradient_copies * self.memory.get(memory.MASTERS, 0)

    def _sum(self, kinds: tuple[str, ...]) -> int:
        return sum(self.memory.get(kind, 0) for kind in kinds)


PROGRAMS = {"train": programs.train, "prefill": serving.prefill, "decode": serving.decode}


def make_plan(
    config: RunConfig, mesh: jax.sharding.Mesh, hardware: Hardware, *, program: str = "train", rows: int | None = None
) -> Plan:
    """Compiles a program for the devices of a mesh, present or absent, and counts what it needs.

    Args:
      program: of PROGRAMS.
      rows: sequences that each batch shard (of replica, node, gpu) works on at a time; None: the program's default.

    Raises:
      ValueError: an unknown program, no rows, or a network or batch that does not split over the mesh.
    """
    require(program in PROGRAMS, "--program", program, f"choose one of {', '.join(PROGRAMS)}")
    require(rows is None or rows > 0, "--rows", rows, "must be positive")
    begin = time.monotonic()
    is_for_gpu = mesh.devices.flat[0].platform != "cpu"
    with device.lowering_for_hopper() if is_for_gpu else contextlib.nullcontext():
        traced_program = PROGRAMS[program](config, mesh, rows=rows)
        lowered = traced_program.traced.lower()
    compilation = compile_program(lowered)
    work = flops.count(
        traced_program.traced,
        num_devices=mesh.size,
        dynamic_trips=traced_program.trips_of_equation,
        expert_rows=traced_program.expert_rows,
    )
    trips = traced_program.trips_of_instruction(compilation.program)
    collectives = traffic.collectives(
        compilation.program, dict(mesh.shape), devices_per_host=hardware.devices_per_host, dynamic_trips=trips
    )
    memory_traffic = traffic.memory_bytes(compilation.program, trips)
    peak = memory.peak(
        compilation.compiled,
        compilation.program,
        compilation.assignment,
        compilation.live_ranges,
        weight_sizes=traced_program.weight_sizes,
    )
    needed = traced_program.needed_flops
    return Plan(
        program=program,
        work=traced_program.work,
        mesh=dict(mesh.shape),
        is_fsdp=config.mesh.fsdp,
        hardware=hardware,
        tokens=traced_program.tokens,
        memory=peak.by_kind,
        gradient_copies=traced_program.gradient_copies,
        outside_layers=traced_program.outside_layers,
        largest_buffers=peak.largest,
        usable_memory=round((hardware.memory_gb - hardware.reserved_gb) * 1e9),
        flops=work,
        needed_flops=None if needed is None else needed / mesh.size,
        memory_traffic=memory_traffic,
        collectives=tuple(collectives),
        busy_seconds=roofline.seconds(work, memory_traffic, collectives, hardware),
        compile_seconds=time.monotonic() - begin,
    )
