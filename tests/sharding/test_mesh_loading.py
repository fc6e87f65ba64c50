"""Serving reads every device's own parts from disk: the bits of parameters that are placed as a whole, in less room."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.model import param_specs
from dsv3_jax.serve import placed_loading
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import small_config

SCRIPT = pathlib.Path(__file__).with_name("load_on_meshes.py")


def start(num_devices: int, *arguments: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def test_what_is_read_layer_by_layer_is_what_is_placed_as_a_whole():
    process = start(8, "all")
    stderr = process.communicate(timeout=600)[1]
    assert process.returncode == 0, stderr[-3000:]


def test_a_process_reads_the_experts_of_its_own_slots():
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [start(4, "process", str(index), str(port)) for index in range(2)]
    for process in processes:
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 0, stderr[-3000:]


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (("lm_head",), lambda parent: parent.pop("lm_head"), "lm_head=None: this parameter of the configuration"),
        (("moe_layers", "mlp", "gate"), lambda parent: parent.update(gate=np.zeros((1, 24, 8), np.float32)),
         "moe_layers/mlp/gate=(1, 24, 8): the configuration needs (2, 24, 8)"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_configuration_is_refused_before_anything_is_read(path, change, message):
    config = small_config(num_nextn_predict_layers=0)
    stored = parent = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.float32), param_specs(config))
    for name in path[:-1]:
        parent = parent[name]
    change(parent)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=re.escape(message)):
        placed_loading.load_placed(config, mesh, stored, for_decoding=False)
