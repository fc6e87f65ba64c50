"""H200s that are not here, as devices that XLA's GPU compiler takes as real.

A description of the GPU in the text form of XLA's `GpuTargetConfigProto` replaces asking the driver. Its numbers are
those that the CUDA driver reports for an H200 SXM (132 multiprocessors, compute capability 9.0a, 227 KiB of opt-in
shared memory, 143,771 MiB) and NVIDIA's data sheets give (1.98 GHz, 4.8 TB/s, 18 NVLinks). Programs compiled for it are
planned, not run; H100 and H800 share its instruction set, and differ in what `plan.hardware` says.
"""

import importlib.util
import math

import jax

from dsv3_jax.config import MeshConfig, require
from dsv3_jax.sharding.mesh import AXES, make_mesh

PACKAGES = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")
DEVICES_PER_HOST = 8

_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200"  model_str: "sm_9.0a H200"  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 15075482009600 ecc_enabled: true
  device_address_bits: 64 pcie_bandwidth: 34359738368
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  device_interconnect_info { active_links: 18 }
}
"""


def missing_packages() -> list[str]:
    """Returns which of the packages with XLA's GPU compiler are not installed."""
    return [name for name in PACKAGES if not _is_installed(name)]


def absent_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """Returns a mesh of as many H200s as its axes multiply to, eight to a host, none of which need exist.

    Raises:
      ValueError: an axis is -1, or the packages with the GPU compiler are missing.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    require(not open_axes, "mesh", sizes, f"{', '.join(open_axes)}=-1 means what other axes leave of the devices, and "
            "a plan has none: say how many")  # fmt: skip
    return make_mesh(config, devices=absent_devices(config))


def absent_devices(config: MeshConfig) -> list[jax.Device]:
    """Returns the devices of `absent_mesh`."""
    from jax.experimental import topologies

    sizes = {axis: getattr(config, axis) for axis in AXES}
    number = math.prod(sizes.values())
    per_host = min(number, DEVICES_PER_HOST)
    fewer = number - number % per_host
    require(number % per_host == 0, "mesh", sizes, f"multiplies to {number} devices, which do not fill hosts of "
            f"{per_host}; choose axes that multiply to {fewer} or {fewer + per_host}")  # fmt: skip
    missing = missing_packages()
    require(not missing, "packages", missing, "XLA's GPU compiler is not installed; pip install 'dsv3_jax[plan]'")
    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", target_config=_H200, topology=f"1x{number // per_host}x{per_host}"
    )
    return list(topology.devices)


def _is_installed(name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    if parent and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(name) is not None
