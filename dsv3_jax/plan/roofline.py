"""The least time that a program's work takes on given hardware."""

from dsv3_jax.plan.hardware import Hardware
from dsv3_jax.plan.traffic import Collective

MEMORY, NVLINK, NETWORK = "memory", "nvlink", "network"


def seconds(
    flops: dict[str, float], memory_bytes: int, collectives: list[Collective], hardware: Hardware
) -> dict[str, float]:
    """Returns the seconds that each resource of one device is busy at its peak rate.

    Keys: "fp8", "bf16", "fp32" products; "memory"; "nvlink"; "network". The largest is the least time that a step can
    take, if everything else hides behind it; the sum is what it takes if nothing does.
    """
    busy = {f"{precision} products": work / (hardware.tflops(precision) * 1e12) for precision, work in flops.items()}
    busy[MEMORY] = memory_bytes / (hardware.memory_gb_per_s * 1e9)
    sent = [link_bytes(collective) for collective in collectives]
    busy[NVLINK] = sum(near for near, _ in sent) / (hardware.nvlink_gb_per_s * 1e9)
    busy[NETWORK] = sum(far for _, far in sent) / (hardware.network_gb_per_s * 1e9)
    return busy


def least_seconds(busy: dict[str, float]) -> tuple[float, str]:
    """Returns the time of the busiest resource, all products being one, and which it is."""
    products = sum(time for name, time in busy.items() if name.endswith("products"))
    resources = {"products": products} | {name: busy[name] for name in (MEMORY, NVLINK, NETWORK)}
    busiest = max(resources, key=resources.get)
    return resources[busiest], busiest


def link_bytes(collective: Collective) -> tuple[float, float]:
    """Splits what a device sends into what stays on its host and what leaves it.

    In an all-to-all every peer gets an equal share. Everything else passes through rings or trees in which data enters
    a host once for all of its devices, which share the work of their network cards.
    """
    sent, size, hosts = collective.sent_bytes, collective.group_size, collective.group_hosts
    if hosts == 1 or size == 1:
        return sent, 0.0
    per_host = size // hosts
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        far = sent * (size - per_host) / (size - 1)
        return sent - far, far
    far = sent / per_host
    return (sent if per_host > 1 else 0.0), far
