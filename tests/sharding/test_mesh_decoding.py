"""Decoding with one expert a device sends tokens where they go, not everywhere, and is exact for any routing."""

import os
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).with_name("decode_on_a_mesh.py")


def test_few_tokens_travel_in_few_bytes_and_exactly():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0",
    }
    process = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
