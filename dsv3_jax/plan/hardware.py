"""What a device can do at best: peaks of its arithmetic, memory and links, as published."""

import dataclasses
import math

from dsv3_jax.config import require


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its share of the links; rates are peaks in one direction."""

    name: str
    memory_gb: float  # of 10^9 bytes
    reserved_gb: float  # that the driver, NCCL and libraries take of it
    bf16_tflops: float  # dense, tensor cores
    fp8_tflops: float
    fp32_tflops: float  # outside the tensor cores
    memory_gb_per_s: float
    nvlink_gb_per_s: float  # to the devices of its host
    network_gb_per_s: float  # to other hosts
    devices_per_host: int
    source: str

    def tflops(self, precision: str) -> float:
        """Returns the peak for operands of a precision."""
        return {"fp8": self.fp8_tflops, "bf16": self.bf16_tflops}.get(precision, self.fp32_tflops)


_HOPPER = Hardware(
    name="H100", memory_gb=85.5, reserved_gb=4.0, bf16_tflops=989.4, fp8_tflops=1978.9, fp32_tflops=66.9,
    memory_gb_per_s=3350.0, nvlink_gb_per_s=450.0, network_gb_per_s=50.0, devices_per_host=8,
    source="NVIDIA H100 SXM data sheet (NVLink 900 GB/s both ways, 81,559 MiB); a 400 Gb/s NIC per GPU as in DGX H100",
)  # fmt: skip

HARDWARE = {
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER, name="H200", memory_gb=150.7, memory_gb_per_s=4800.0,
        source="NVIDIA H200 SXM data sheet (4.8 TB/s, 143,771 MiB); the rest as H100",
    ),
    "h800": dataclasses.replace(
        _HOPPER, name="H800", nvlink_gb_per_s=160.0,
        source="DeepSeek-V3 report, §3.2.2: NVLink 160 GB/s, InfiniBand 50 GB/s; the rest as H100",
    ),
}  # fmt: skip


def find(name: str, changes: dict[str, float]) -> Hardware:
    """Returns the named hardware with some of its numbers replaced.

    Raises:
      ValueError: an unknown name or number, or one that is not positive.
    """
    require(name in HARDWARE, "--hardware", name, f"choose one of {', '.join(HARDWARE)}")
    numbers = [field.name for field in dataclasses.fields(Hardware) if field.type in (float, int)]
    for field, value in changes.items():
        require(field in numbers, "--hardware_number", field, f"no such number; there are {', '.join(numbers)}")
        is_possible = value > 0 or (value == 0 and field == "reserved_gb")
        require(is_possible and math.isfinite(value), f"--hardware_number={field}", value, "must be positive")
        require(value == int(value) or field != "devices_per_host", f"--hardware_number={field}", value,
                "must be a whole number")  # fmt: skip
    changed = {field: int(value) if field == "devices_per_host" else value for field, value in changes.items()}
    note = "; overridden: " + ", ".join(f"{field}={value:g}" for field, value in changes.items()) if changes else ""
    hardware = HARDWARE[name]
    return dataclasses.replace(hardware, **changed, source=hardware.source + note)
