"""Many devices compute what one does."""

import os
import pathlib
import subprocess
import sys


def test_eight_devices_equal_one():
    """Logits, losses, gradients and global loads on meshes (replica 2, gpu 4) and (node 2, gpu 4)."""
    script = pathlib.Path(__file__).with_name("eight_devices.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    process = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
