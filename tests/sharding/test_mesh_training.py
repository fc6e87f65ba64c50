"""Many devices compute what one does: losses, gradients, expert loads, bias updates, parameters after 20 steps."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("train_on_meshes.py")
AXES_ALONE = ("replica=2", "node=2", "gpu=2", "tensor=2")
AXES_TOGETHER = ("replica=2,gpu=4", "node=2,gpu=2", "gpu=2,tensor=2", "node=2,tensor=4", "replica=2,node=2,tensor=2")
SIXTEEN = ("replica=2,node=2,gpu=2,tensor=2", "node=4,gpu=2,tensor=2", "gpu=4,tensor=4")
SEVERAL_ROUNDS = ("node=2,gpu=4,room=30",)
FSDP = ("replica=2,gpu=2,fsdp=1", "replica=2,node=2,gpu=2,tensor=2,fsdp=1")


@pytest.mark.parametrize(
    ("precision", "meshes"),
    [
        ("fp32", AXES_ALONE + FSDP[:1]),
        ("fp32", AXES_TOGETHER),
        ("fp32", SIXTEEN + FSDP[1:]),
        ("fp32", SEVERAL_ROUNDS),
        ("bf16", SIXTEEN[:1]),
        ("fp8", AXES_TOGETHER[2:3]),
        pytest.param("bf16", (AXES_ALONE[0], AXES_TOGETHER[3]), marks=pytest.mark.slow),
        pytest.param("fp8", (AXES_ALONE[3], AXES_TOGETHER[1], SIXTEEN[0], FSDP[1]), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_trains_like_one_device(precision, meshes):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0",
    }
    process = subprocess.run(
        [sys.executable, SCRIPT, precision, *meshes], env=environment, capture_output=True, text=True, timeout=1200,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
