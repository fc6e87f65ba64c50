"""Results as a table on the screen and as a JSON file that says where they were measured."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import rich.console
import rich.table

PACKAGES = ("dsv3-jax", "jax", "jaxlib", "flax", "torch", "transformers", "triton")

Row = dict[str, str | float | int | None]
TABLE_WIDTH = 160  # columns; narrower, figures would be cut off


def show(title: str, rows: list[Row]) -> None:
    """Prints rows as a table; a row lacks what does not apply to it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = rich.table.Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "implementation") else "right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in columns))
    console = rich.console.Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


def save(path: str, suites: dict[str, list[Row]]) -> None:
    """Writes the rows of each suite with the hardware and the versions they were measured with."""
    record = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
              "environment": environment(), "suites": suites}  # fmt: skip
    pathlib.Path(path).write_text(json.dumps(record, indent=1) + "\n")


def environment() -> dict:
    """Describes the machine, the devices and the installed versions."""
    import jax

    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device.device_kind, "platform": device.platform, "num_devices": jax.device_count(),
        "processor": _processor(), "num_cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "versions": versions,
    }  # fmt: skip


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _text(value: str | float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
