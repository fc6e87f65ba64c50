"""Tokens reach experts on other devices and their results come back, whatever the routing and the mesh."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("exchange_devices.py")
CHECKS = (
    "each_axis_alone", "axes_together", "sixteen_devices", "bfloat16", "hundred_routings", "rematerialised_layers",
    "experts_of_the_model", "sums", "bytes",
    "further_rounds", "rounds_of_a_step",
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_sixteen_devices_serve_tokens_as_dense_experts_do(check):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=16"}
    process = subprocess.run(
        [sys.executable, SCRIPT, check], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
