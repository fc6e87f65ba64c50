"""What travels of weights: codes or BF16 of every device's part, the numbers of the whole, gradients in float32."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("weights_on_devices.py")


@pytest.mark.parametrize(
    "check",
    [
        "codes",
        "gradients",
        "bytes bf16",
        "bytes fp8 fsdp",
        pytest.param("bytes bf16 fsdp", marks=pytest.mark.slow),
        pytest.param("bytes fp8", marks=pytest.mark.slow),
    ],
)
def test_weights_on_devices(check):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    process = subprocess.run(
        [sys.executable, SCRIPT, *check.split()], env=environment, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
