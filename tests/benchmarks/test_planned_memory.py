"""Planned beside measured memory: what is compared, and that both speak of the same program."""

import json
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.benchmarks import planned_memory

SCALARS = 64  # bytes: counts of steps, mean loss, settings


def test_a_step_on_host_devices_takes_what_was_planned():
    """A device that counts nothing: the compiler's bytes of the program that ran, the arguments' by their parts."""
    script = pathlib.Path(__file__).with_name("compare_on_host_devices.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["measured_by"] == planned_memory.BY_COMPILER
    assert sum(result["planned"].values()) == pytest.approx(result["peak_bytes"], rel=1e-3)
    assert 0 <= result["argument_bytes"] - result["by_hand"] <= SCALARS
    assert abs(result["planned_arguments"] - result["by_hand"]) <= SCALARS
    assert result["peak_bytes"] > result["argument_bytes"]


def test_rows_show_the_ratio_and_every_kind():
    result = {"planned": {"master weights": 30e9, "temporaries": 15e9}, "planned_arguments": 30e9, "peak_bytes": 50e9,
              "argument_bytes": 40e9, "measured_by": planned_memory.BY_ALLOCATOR}  # fmt: skip
    peak, arguments, *kinds = planned_memory.result_rows("slice bf16, gpu=2", result)
    assert (peak["planned GB"], peak["measured GB"], peak["planned / measured"]) == pytest.approx((45, 50, 0.9))
    assert (arguments["planned GB"], arguments["measured GB"]) == pytest.approx((30, 40))
    assert [(row["implementation"], row["planned GB"]) for row in kinds] == [
        ("of it master weights", 30), ("of it temporaries", 15)
    ]  # fmt: skip


def test_every_precision_is_compared_on_one_device_and_on_all(monkeypatch):
    calls = []

    def run(module, *arguments):
        calls.append(arguments)
        return {"planned": {}, "planned_arguments": 1, "peak_bytes": 1, "argument_bytes": 1, "measured_by": "nobody"}

    monkeypatch.setattr(planned_memory.own_process, "run", run)
    monkeypatch.setattr(planned_memory.jax, "device_count", lambda: 2)
    planned_memory.memory_rows("slice", precisions=None)
    assert calls == [("slice", precision, number) for precision in ("fp8", "bf16") for number in ("1", "2")]
