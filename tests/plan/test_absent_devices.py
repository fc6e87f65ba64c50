"""Devices that are not here: what is refused before compiling, and what XLA's GPU compiler makes for them."""

import json
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.plan import absent_devices

ROOT = pathlib.Path(__file__).parents[2]
MISSING = absent_devices.missing_packages()
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=f"the plan extra is not installed: no {', '.join(MISSING)}")
# A network that Hopper kernels take, small enough to compile in seconds.
SMALL = (
    "vocab_size=512", "hidden_size=256", "intermediate_size=256", "num_hidden_layers=1", "first_k_dense_replace=1",
    "num_nextn_predict_layers=0", "num_attention_heads=2", "q_lora_rank=128", "kv_lora_rank=128",
    "qk_nope_head_dim=128", "qk_rope_head_dim=64", "v_head_dim=128", "precision=bf16",
)  # fmt: skip


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", "--config=configs/tiny.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_axis_left_open_is_refused_for_there_are_no_devices_to_fill_it():
    with pytest.raises(ValueError, match=r"gpu=-1.*say how many"):
        absent_devices.absent_mesh(MeshConfig())


def test_hosts_that_are_not_full_are_refused_with_numbers_of_devices_that_fill_them():
    with pytest.raises(ValueError, match=r"'gpu': 4, 'tensor': 3.*12 devices.*hosts of 8.*multiply to 8 or 16"):
        absent_devices.absent_mesh(MeshConfig(gpu=4, tensor=3))


@pytest.mark.skipif(not MISSING, reason="XLA's GPU compiler is installed")
def test_missing_compiler_is_named_with_what_installs_it():
    with pytest.raises(ValueError, match=r"pip install 'dsv3_jax\[plan\]'"):
        absent_devices.absent_mesh(MeshConfig(gpu=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mesh.gpu=8", "--num_devices=12"], "must be a multiple of 8"),
        (["--config.mesh.gpu=8", "--num_devices=many"], "must be a number of devices"),
        (["--config.mesh.gpu=8", "--output=nowhere/plan"], "there is no directory nowhere; make it"),
        (["--num_devices=8"], "name every axis but replica"),
        (["--hardware_number=speed=3"], "no such number; there are memory_gb"),
        (["--hardware_number=fp8_tflops=fast"], "must be NAME=NUMBER"),
    ],
)
def test_mistake_on_the_command_line_is_named_before_anything_is_compiled(arguments, message):
    done = launch(*arguments)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr


@needs_compiler
def test_devices_are_as_many_as_the_mesh_and_eight_to_a_host():
    mesh = absent_devices.absent_mesh(MeshConfig(replica=2, node=2, gpu=8))
    assert mesh.size == 32 and mesh.devices.flat[0].platform != "cpu"


@needs_compiler
def test_step_is_planned_for_gpus_that_are_not_here(tmp_path):
    done = launch(
        "--config.mesh.gpu=8", f"--output={tmp_path}/plan", *(f"--config.model.{setting}" for setting in SMALL)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (plan,) = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["num_devices"] == 8 and plan["flops"]["bf16"] > 0
    assert {"all-gather", "reduce-scatter"} <= {found["kind"] for found in plan["collectives"]}
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@needs_compiler
def test_mesh_that_does_not_divide_is_refused_with_one_that_would():
    done = launch("--config.mesh.gpu=2", "--config.mesh.tensor=3")
    assert done.returncode == 1 and "mesh.tensor=3" in done.stderr and "devices use" in done.stderr, done.stderr
