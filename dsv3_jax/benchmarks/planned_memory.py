"""The memory that a training step was planned to take beside what it takes on the devices that are here.

`python -m dsv3_jax.benchmarks.planned_memory WORKLOAD PRECISION NUM_DEVICES` measures in a process of its own; the last
line on stdout is the result as JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

from dsv3_jax.benchmarks import own_process
from dsv3_jax.benchmarks.networks import WORKLOADS
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.config import RunConfig, override
from dsv3_jax.plan import memory
from dsv3_jax.plan.hardware import HARDWARE
from dsv3_jax.plan.planning import make_plan
from dsv3_jax.sharding.mesh import make_mesh, num_batch_shards
from dsv3_jax.train import schedule
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import as_scalars, lower_train_step, split_batch

STEPS = 2
ARGUMENTS = (memory.MASTERS, memory.MOMENTS, memory.INPUTS)
BY_ALLOCATOR, BY_COMPILER = "the device's allocator", "XLA's buffer assignment: this device counts nothing"


def memory_rows(workload_name: str, *, precisions: Sequence[str] | None) -> list[Row]:
    """Compares the plan with the peak on one device and, where there are several, with experts spread over all.

    Args:
      workload_name: of `networks.WORKLOADS`; every device has as many sequences.
      precisions: None for the workload's own.
    """
    precisions = WORKLOADS[workload_name].precisions if precisions is None else precisions
    rows = []
    for precision in precisions:
        for number in sorted({1, jax.device_count()}):
            result = own_process.run("dsv3_jax.benchmarks.planned_memory", workload_name, precision, str(number))
            rows += result_rows(f"{workload_name} {precision}, gpu={number}", result)
    return rows


def result_rows(case: str, result: dict) -> list[Row]:
    """Returns a row for the peak, one for the arguments, and one for every kind of memory in the plan."""
    compared = {
        f"peak, by {result['measured_by']}": (sum(result["planned"].values()), result["peak_bytes"]),
        "arguments, before the first step": (result["planned_arguments"], result["argument_bytes"]),
    }
    rows = [
        {"case": case, "implementation": name, "planned GB": planned / 1e9, "measured GB": measured / 1e9,
         "planned / measured": planned / measured}
        for name, (planned, measured) in compared.items()
    ]  # fmt: skip
    kinds = [{"case": case, "implementation": f"of it {kind}", "planned GB": size / 1e9}
             for kind, size in result["planned"].items()]  # fmt: skip
    return [*rows, *kinds]


def compare(config: RunConfig, mesh: jax.sharding.Mesh) -> dict:
    """Runs a few steps on the devices of a mesh, then plans the same step for them.

    Returns:
      planned: bytes of one device by kind, adding up to the peak. planned_arguments: those of the arguments among them.
      peak_bytes and argument_bytes: of the fullest device, once the steps have run and before they do. measured_by:
      what counted them; where the device counts nothing, the compiler did, of the program that ran.
    """
    device, rows = mesh.devices.flat[0], config.train.rows_per_pass // num_batch_shards(mesh)
    scalars = as_scalars(config, schedule.at(config.train, step=0, tokens=0))
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.data.sequence_length + 1)
    with jax.set_mesh(mesh):
        program, state = lower_train_step(config, mesh).compile(), init_state(config, mesh)
        tokens = split_batch(config, rng.integers(0, config.model.vocab_size, shape).astype(np.int32))
        tokens_ABT = jax.device_put(tokens, program.input_shardings[0][1])
        jax.block_until_ready((state, tokens_ABT))
        argument_bytes = max(_argument_bytes(device, state, tokens_ABT) for device in mesh.devices.flat)
        for _ in range(STEPS):
            state, _ = jax.block_until_ready(program(state, tokens_ABT, scalars))
    if device.memory_stats() is None:
        peak_bytes, measured_by = memory.allocated_bytes(program), BY_COMPILER
    else:
        peak_bytes = max(device.memory_stats()["peak_bytes_in_use"] for device in mesh.devices.flat)
        measured_by = BY_ALLOCATOR
    planned = make_plan(config, mesh, HARDWARE["h200"], rows=rows).memory
    return {
        "planned": planned, "planned_arguments": sum(planned.get(kind, 0) for kind in ARGUMENTS),
        "peak_bytes": peak_bytes, "argument_bytes": argument_bytes, "measured_by": measured_by,
    }  # fmt: skip


def _argument_bytes(device: jax.Device, *trees) -> int:
    """Returns what arrays take on a device: as it counts, or where it does not, the bytes of their parts."""
    if device.memory_stats() is not None:
        return device.memory_stats()["bytes_in_use"]
    shards = [shard for array in jax.tree.leaves(trees) for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def main(workload_name: str, precision: str, num_devices: str) -> None:
    number, workload = int(num_devices), WORKLOADS[workload_name]
    workload = dataclasses.replace(workload, batch_size=workload.batch_size * number)
    config = override(workload.run_config, {"model.precision": precision, "mesh.gpu": number})
    print(json.dumps(compare(config, make_mesh(config.mesh, devices=jax.devices()[:number]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
