"""Compiles the Hopper kernels for an H200 that is not there; the last line on stdout is ptxas's account as JSON.

{call: [{"kernel", "registers", "threads", "stack_bytes", "spill_stores", "spill_loads", "approximate_divisions",
"products_made_twice", "qgmma", "qgmma_from_zero", "addresses_after_waits", "local_memory"}]}; the last four count
machine instructions, and are null where ptxas or nvdisasm is neither on PATH nor in /usr/local/cuda/bin.
Needs jax-cuda13-plugin and jax-cuda13-pjrt.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 13 minor: 0 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""
ACCOUNT = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers"
)


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": directory, "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
        root = pathlib.Path(__file__).parents[2]
        sys.path[:0] = [str(root), str(pathlib.Path(__file__).parent)]
        from hopper_cases import other_calls, product_calls, ragged_calls

        calls = product_calls() | ragged_calls() | other_calls()
        accounts = {name: compile_call(call, pathlib.Path(directory)) for name, call in calls.items()}
    print(json.dumps(accounts))


def compile_call(call, directory: pathlib.Path) -> list[dict]:
    """Compiles a call; returns the account of each of its kernels and empties the directory."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", target_config=TARGET, topology="1x1x1"
    )
    everywhere = jax.sharding.NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), jax.sharding.PartitionSpec())
    operands = jax.tree.map(
        lambda type_: jax.ShapeDtypeStruct(type_.shape, type_.dtype, sharding=everywhere), call.operands
    )
    jax.jit(call.function).lower(*operands).compile()
    accounts = []
    for path in sorted(directory.glob("*.ptxas")):
        stack, stores, loads, registers = map(int, ACCOUNT.search(path.read_text()).groups())
        ptx = path.with_suffix(".ptx").read_text()
        kernel = re.search(r"\.entry (\w+)", ptx).group(1)
        listing = machine_code(path.with_suffix(".ptx"))
        accounts.append({
            "kernel": kernel, "registers": registers, "threads": int(re.search(r"\.maxntid (\d+)", ptx).group(1)),
            "stack_bytes": stack, "spill_stores": stores, "spill_loads": loads,
            "approximate_divisions": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
            "products_made_twice": products_made_twice(ptx),
            "qgmma": None if listing is None else len(re.findall(r"\bQGMMA\b", listing)),
            "qgmma_from_zero": None if listing is None else len(re.findall(r"\bQGMMA\b[^;]*\bRZ, !UPT", listing)),
            "addresses_after_waits": None if listing is None else addresses_after_waits(listing),
            "local_memory": None if listing is None else len(re.findall(r"\b(?:STL|LDL)\b", listing)),
        })  # fmt: skip
    for path in directory.iterdir():
        path.unlink()
    return accounts


def products_made_twice(ptx: str) -> int:
    """Counts the rounded float32 products that a fused multiply-add makes again, to add them unrounded."""
    rounded = re.findall(r"mul\.f32\s+\S+, (\S+), (\S+);", ptx)
    fused = re.findall(r"fma\.rn\.f32\s+\S+, (\S+), (\S+), \S+;", ptx)
    return len({frozenset(pair) for pair in rounded} & {frozenset(pair) for pair in fused})


def addresses_after_waits(listing: str) -> int:
    """Counts the shifts that addresses of products take between a jump, which ends every wait, and the product."""
    before = re.split(r"\bQGMMA\b[^;]*\bRZ, !UPT", listing)[:-1]
    return sum(len(re.findall(r"\bUSHF\b", part[part.rindex("BRA") :])) for part in before)


def machine_code(ptx: pathlib.Path) -> str | None:
    """Returns the machine code that ptxas makes, as text; None without the tools."""
    path = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    ptxas, nvdisasm = (shutil.which(name, path=path) for name in ("ptxas", "nvdisasm"))
    if ptxas is None or nvdisasm is None:
        return None
    cubin = ptx.with_suffix(".cubin")
    subprocess.run([ptxas, "-arch=sm_90a", "-O3", ptx, "-o", cubin], check=True)
    return subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
