"""A plan as a table on the screen, as JSON, and as a plot."""

import dataclasses
import json
import math
import pathlib

import jax
import matplotlib
import rich.console
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.plan import memory
from dsv3_jax.plan.planning import Plan

LISTED_BUFFERS = 12
_WIDTH = 120  # columns; narrower, figures would be cut off


def show(plan: Plan) -> None:
    """Prints what a program needs of every device."""
    console = rich.console.Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    hardware = plan.hardware
    axes = " x ".join(f"{size} {axis}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    console.print(f"[bold]{plan.program}[/] on {plan.num_devices:,} x {hardware.name} ({axes}); {plan.work}")
    for table in (_memory_table(plan), _time_table(plan), _collective_table(plan)):
        console.print(table)
    for line in verdict(plan):
        console.print(line)
    if not plan.fits:
        console.print(_buffer_table(plan))
    console.print(f"{hardware.name}: {hardware.source}")
    console.print(f"compiled in {plan.compile_seconds:.0f} s with jax {jax.__version__}")


def verdict(plan: Plan) -> list[str]:
    """Says in words whether a plan fits, what is largest, and what takes longest."""
    peak, usable, over = (
        _bytes(size) for size in (plan.peak_memory, plan.usable_memory, plan.peak_memory - plan.usable_memory)
    )
    lines = []
    if plan.fits:
        lines.append(f"fits: {peak} of {usable}")
    else:
        by_size = sorted(plan.memory.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{kind} {_bytes(size)}" for kind, size in by_size)
        lines.append(f"does not fit: {peak}, {over} more than {usable}; largest: {parts}")
        if plan.stages_to_fit is not None:
            lines.append(
                f"pipeline parallelism would have to save {over}: weights and gradients divided "
                f"among {plan.stages_to_fit} or more stages"
            )
    slowest = sum(plan.busy_seconds.values())
    rate = plan.tokens / plan.num_devices / plan.least_seconds
    lines.append(
        f"at least {_seconds(plan.least_seconds)}, dominated by {plan.dominated_by}; {_seconds(slowest)} if nothing "
        f"overlaps; at most {rate:,.0f} tokens/s per device"
    )
    if plan.needed_flops:
        share = plan.needed_flops / plan.least_seconds / 1e12 / plan.hardware.bf16_tflops
        lines.append(
            f"{_scaled(plan.needed_flops, 'FLOP')} needed by the usual count, "
            f"{_scaled(sum(plan.flops.values()), 'FLOP')} executed; at most {share:.0%} of the BF16 peak"
        )
    return lines


def as_json(plan: Plan) -> dict:
    """Returns a plan as what JSON can hold; buffers but the largest are left out."""
    values = dataclasses.asdict(dataclasses.replace(plan, largest_buffers=plan.largest_buffers[:LISTED_BUFFERS]))
    return values | {
        "jax": jax.__version__,
        "num_devices": plan.num_devices,
        "peak_memory": plan.peak_memory,
        "fits": plan.fits,
        "stages_to_fit": plan.stages_to_fit,
        "least_seconds": plan.least_seconds,
        "dominated_by": plan.dominated_by,
        "verdict": verdict(plan),
    }


def write_json(plans: list[Plan], path: str) -> None:
    """Writes plans as a list of JSON objects; bytes, FLOPs and seconds are those of one device."""
    pathlib.Path(path).write_text(json.dumps([as_json(plan) for plan in plans], indent=1) + "\n")


def write_plot(plans: list[Plan], path: str) -> None:
    """Draws memory by kind and time by resource, one column and one group of bars per plan."""
    figure = Figure(figsize=(5 + 1.5 * len(plans), 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_memory(left, plans)
    draw_time(right, plans)
    figure.savefig(path, dpi=120)


def draw_memory(axes: Axes, plans: list[Plan]) -> None:
    """Draws a stack of the kinds of memory for every plan, and what each may use."""
    colors = matplotlib.colormaps["tab10"]
    names = [_label(plan) for plan in plans]
    bottoms = [0.0] * len(plans)
    for index, kind in enumerate(memory.KINDS):
        sizes = [plan.memory.get(kind, 0) / 1e9 for plan in plans]
        if any(sizes):
            axes.bar(names, sizes, bottom=bottoms, label=kind, color=colors(index))
            bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for usable in {plan.usable_memory for plan in plans}:
        axes.axhline(usable / 1e9, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("memory at the peak, GB per device (dashed: usable)")
    axes.legend(fontsize="small")


def draw_time(axes: Axes, plans: list[Plan]) -> None:
    """Draws how long each resource is busy, in one group of bars per plan."""
    resources = list(dict.fromkeys(name for plan in plans for name in plan.busy_seconds))
    width = 0.8 / len(resources)
    for index, name in enumerate(resources):
        places = [number + (index - (len(resources) - 1) / 2) * width for number in range(len(plans))]
        axes.bar(places, [plan.busy_seconds.get(name, 0) for plan in plans], width, label=name)
    axes.set_xticks(range(len(plans)), [_label(plan) for plan in plans])
    axes.set_ylabel("seconds at peak rate")
    axes.legend(fontsize="small")


def _label(plan: Plan) -> str:
    return f"{plan.program}\n{plan.num_devices:,} x {plan.hardware.name}"


def _memory_table(plan: Plan) -> rich.table.Table:
    table = _table("memory of one device at the peak", "kind", "bytes", "share")
    for kind, size in plan.memory.items():
        table.add_row(kind, _bytes(size), f"{size / plan.peak_memory:.0%}")
    table.add_row("all", _bytes(plan.peak_memory), "")
    return table


def _time_table(plan: Plan) -> rich.table.Table:
    table = _table("work of one device", "resource", "work", "peak rate", "time")
    hardware = plan.hardware
    for precision, work in plan.flops.items():
        busy = plan.busy_seconds[f"{precision} products"]
        rate = f"{hardware.tflops(precision):,.0f} TFLOP/s"
        table.add_row(f"{precision} products", _scaled(work, "FLOP"), rate, _seconds(busy))
    rates = {
        "memory": hardware.memory_gb_per_s,
        "nvlink": hardware.nvlink_gb_per_s,
        "network": hardware.network_gb_per_s,
    }
    for name, rate in rates.items():
        busy = plan.busy_seconds[name]
        table.add_row(name, _bytes(busy * rate * 1e9), f"{rate:,.0f} GB/s", _seconds(busy))
    return table


def _collective_table(plan: Plan) -> rich.table.Table:
    table = _table("sent by one device", "collective", "axes", "devices", "hosts", "runs", "bytes")
    for found in plan.collectives:
        if found.sent_bytes:
            table.add_row(found.kind, ", ".join(found.axes), str(found.group_size), str(found.group_hosts),
                          f"{found.num_runs:,}", _bytes(found.sent_bytes))  # fmt: skip
    return table


def _buffer_table(plan: Plan) -> rich.table.Table:
    table = _table("largest buffers at the peak", "kind", "bytes", "array", "from")
    for buffer in plan.largest_buffers[:LISTED_BUFFERS]:
        table.add_row(buffer.kind, _bytes(buffer.num_bytes), buffer.type, buffer.origin[-60:])
    return table


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("kind", "resource", "collective", "axes", "array", "from")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table


def _bytes(size: float) -> str:
    return _scaled(size, "B")


def _seconds(seconds: float) -> str:
    return _scaled(seconds, "s")


def _scaled(value: float, unit: str) -> str:
    """Returns a quantity with three digits and the prefix that keeps it between 1 and 1000."""
    if value == 0:
        return "0"
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n"}
    factor = next((factor for factor in prefixes if abs(value) >= factor), 1e-9)
    if unit == "s" and factor > 1:
        factor = 1
    digits = max(0, 2 - math.floor(math.log10(abs(value) / factor)))
    return f"{value / factor:,.{digits}f} {prefixes[factor]}{unit}"
