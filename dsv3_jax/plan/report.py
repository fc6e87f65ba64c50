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
_ORIGIN_WIDTH = 36
_BAR = 0.7  # of the room between two plans in a plot
_SMALL = 0.005  # of the peak: too little to be seen in a plot
_CONTENTS = {
    memory.MASTERS: "float32, this device's part (ZeRO)",
    memory.MOMENTS: "of AdamW, this device's part (ZeRO)",
    memory.WEIGHTS: "whole, but for heads and experts of other devices",
    memory.CACHE: "of the rows that this device decodes",
    memory.GRADIENTS: "float32, summed over passes",
    memory.KEPT: "for the backward pass, by model.remat_policy",
    memory.EXCHANGE: "rows on their way to experts and back",
    memory.INPUTS: "tokens and settings",
    memory.RESULTS: "what replaces none of the inputs",
    memory.TEMPORARIES: "of single layers, and gaps",
}


def show(plan: Plan) -> None:
    """Prints what a program needs of every device."""
    console = _console()
    hardware = plan.hardware
    console.print(f"[bold]{plan.program}[/] on {plan.num_devices:,} x {hardware.name} ({_layout(plan)}); {plan.work}")
    for table in (_memory_table(plan), _time_table(plan), _collective_table(plan)):
        console.print(table)
    for line in verdict(plan):
        console.print(line)
    if not plan.fits:
        console.print(_buffer_table(plan))
    console.print(f"{hardware.name}: {hardware.source}")
    console.print(f"planned in {plan.compile_seconds:.0f} s with jax {jax.__version__}")


def show_all(plans: list[Plan]) -> None:
    """Prints a line for each of several plans."""
    table = _table("all plans", "devices", "layout", "memory", "usable", "fits", "at least", "tokens/s per device")
    for plan in plans:
        table.add_row(f"{plan.num_devices:,}", _layout(plan), _bytes(plan.peak_memory), _bytes(plan.usable_memory),
                      "yes" if plan.fits else "no", _seconds(plan.least_seconds),
                      f"{_tokens_per_second(plan):,.0f}")  # fmt: skip
    _console().print(table)


def verdict(plan: Plan) -> list[str]:
    """Says in words whether a plan fits or what would, what is largest, and what takes longest."""
    lines = (
        [f"fits: {_bytes(plan.peak_memory)} of {_bytes(plan.usable_memory)}"] if plan.fits else _what_would_fit(plan)
    )
    slowest = sum(plan.busy_seconds.values())
    lines.append(
        f"at least {_seconds(plan.least_seconds)}, dominated by {plan.dominated_by}; {_seconds(slowest)} if nothing "
        f"overlaps; at most {_tokens_per_second(plan):,.0f} tokens/s per device"
    )
    if plan.needed_flops:
        share = plan.needed_flops / plan.least_seconds / 1e12 / plan.hardware.bf16_tflops
        lines.append(
            f"{_scaled(plan.needed_flops, 'FLOP')} needed by the usual count, "
            f"{_scaled(sum(plan.flops.values()), 'FLOP')} executed; at most {share:.0%} of the BF16 peak"
        )
    return lines


def _what_would_fit(plan: Plan) -> list[str]:
    over = _bytes(plan.peak_memory - plan.usable_memory)
    by_size = sorted(plan.memory.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{kind} {_bytes(size)}" for kind, size in by_size)
    usable = _bytes(plan.usable_memory)
    lines = [f"does not fit: {_bytes(plan.peak_memory)}, {over} more than {usable}; largest: {parts}"]
    if plan.least_with_fsdp is not None:
        least, fits = _bytes(plan.least_with_fsdp), plan.least_with_fsdp <= plan.usable_memory
        lines.append(f"mesh.fsdp=true, weights gathered layer by layer, would need at least {least} "
                     "and room for a layer's weights: "
                     + ("plan it" if fits else "it would not fit either"))  # fmt: skip
    if plan.devices_to_fit is not None:
        divided = "master weights, moments and gradients" if plan.is_fsdp else "master weights and moments"
        lines.append(f"{plan.devices_to_fit:,} devices, by a larger mesh.replica, would divide {divided} enough if "
                     "the rest stays as it is: plan it")  # fmt: skip
    if plan.stages_to_fit is not None:
        lines.append(
            f"pipeline parallelism would have to save {over}: weights and gradients divided "
            f"among {plan.stages_to_fit} or more stages"
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
        "least_with_fsdp": plan.least_with_fsdp,
        "devices_to_fit": plan.devices_to_fit,
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
    figure = Figure(figsize=(10 + 1.2 * len(plans), 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_memory(left, plans)
    draw_time(right, plans)
    figure.savefig(path, dpi=120)


def draw_memory(axes: Axes, plans: list[Plan]) -> None:
    """Draws a stack of the kinds of memory for every plan, and what each may use."""
    colors = matplotlib.colormaps["tab10"]
    bottoms = [0.0] * len(plans)
    for index, kind in enumerate(memory.KINDS):
        if any(plan.memory.get(kind, 0) > _SMALL * plan.peak_memory for plan in plans):
            sizes = [plan.memory.get(kind, 0) / 1e9 for plan in plans]
            axes.bar(range(len(plans)), sizes, _BAR, bottom=bottoms, label=kind, color=colors(index))
            bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for index, plan in enumerate(plans):
        axes.text(index, bottoms[index], f"{plan.peak_memory / 1e9:,.0f}", ha="center", va="bottom")
    for usable in {plan.usable_memory for plan in plans}:
        axes.axhline(usable / 1e9, color="black", linestyle="--", linewidth=1, label=f"usable: {usable / 1e9:,.0f}")
    axes.set_xlim(-0.5, len(plans) - 0.5)
    axes.set_xticks(range(len(plans)), [_label(plan) for plan in plans])
    axes.set_ylabel("memory at the peak, GB per device")
    axes.margins(y=0.1)
    axes.legend(fontsize="small", reverse=True, loc="upper left", bbox_to_anchor=(1, 1))


def draw_time(axes: Axes, plans: list[Plan]) -> None:
    """Draws how long each resource is busy, in one group of bars per plan."""
    resources = list(dict.fromkeys(name for plan in plans for name in plan.busy_seconds))
    width = _BAR / len(resources)
    for index, name in enumerate(resources):
        places = [number + (index - (len(resources) - 1) / 2) * width for number in range(len(plans))]
        axes.bar(places, [plan.busy_seconds.get(name, 0) for plan in plans], width, label=name)
    axes.set_xticks(range(len(plans)), [_label(plan) for plan in plans])
    axes.set_ylabel("seconds that each resource is busy, at its peak rate")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _label(plan: Plan) -> str:
    return f"{plan.program}{', FSDP' if plan.is_fsdp else ''}\n{plan.num_devices:,} x {plan.hardware.name}"


def _layout(plan: Plan) -> str:
    axes = " x ".join(f"{size} {axis}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    return axes + ", FSDP" if plan.is_fsdp else axes


def _tokens_per_second(plan: Plan) -> float:
    return plan.tokens / plan.num_devices / plan.least_seconds


def _console() -> rich.console.Console:
    console = rich.console.Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    return console


def _memory_table(plan: Plan) -> rich.table.Table:
    table = _table("memory of one device at the peak", "kind", "bytes", "share", "what")
    for kind, size in plan.memory.items():
        table.add_row(kind, _bytes(size), f"{size / plan.peak_memory:.0%}", _CONTENTS[kind])
    table.add_row("all", _bytes(plan.peak_memory), "", f"of {_bytes(plan.usable_memory)}")
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
    table = _table("largest buffers at the peak", "kind", "bytes", "array", "from", "file")
    for buffer in plan.largest_buffers[:LISTED_BUFFERS]:
        table.add_row(buffer.kind, _bytes(buffer.num_bytes), buffer.type, _shortened(buffer.origin), buffer.file)
    return table


def _shortened(origin: str) -> str:
    """Returns the last parts of a path of transformations that fit into a column."""
    parts = origin.split("/")
    while len(parts) > 1 and len("/".join(parts)) > _ORIGIN_WIDTH:
        parts = parts[1:]
    return "/".join(parts)


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("kind", "resource", "collective", "axes", "array", "from", "file", "what", "layout")
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
