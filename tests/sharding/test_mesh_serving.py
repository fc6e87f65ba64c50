"""Prefill and decoding over a mesh give the logits of one device."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("serve_on_meshes.py")


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_mesh_serves_like_one_device(precision):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    }
    process = subprocess.run(
        [sys.executable, SCRIPT, precision], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
