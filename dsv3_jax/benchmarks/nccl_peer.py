"""Measures torch.distributed's all_to_all_single, one process per device: NCCL on GPUs, Gloo on CPUs.

`python -m dsv3_jax.benchmarks.nccl_peer RANK NUM_DEVICES PORT BYTES ...`; rank 0 prints the seconds per call as JSON.
"""

import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

HEAT_S, MEASURE_S, REPEATS = 0.1, 0.05, 3  # as `timing.steady_medians`
TIMEOUT_S = 300


def all_to_all_seconds(sizes: Sequence[int], *, num_devices: int) -> list[float]:
    """Returns how long an all_to_all takes in which every device sends this many bytes to every other, and to itself.

    Args:
      sizes: bytes from one device to another.
      num_devices: processes, each with a device of its own.

    Raises:
      ValueError: a process failed; the message ends with what it said.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dsv3_jax.benchmarks.nccl_peer"]
    processes = [
        subprocess.Popen([*command, *map(str, (rank, num_devices, port, *sizes))], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
        for rank in range(num_devices)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs):
        if process.returncode:
            raise ValueError(f"{' '.join(process.args)} failed:\n{errors[-4000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def main(rank: int, num_devices: int, port: int, *sizes: int) -> None:
    """Joins the other processes, measures every size with them, and prints on rank 0."""
    import torch
    import torch.distributed as distributed

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", rank=rank, world_size=num_devices, device_id=device if on_gpu else None
    )
    seconds = []
    for size in sizes:
        sent = torch.randint(0, 256, (num_devices * size,), dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        exchange = functools.partial(distributed.all_to_all_single, received, sent)
        measure = _gpu_seconds if on_gpu else _cpu_seconds
        exchange()
        one_s = torch.tensor([measure(exchange, 3)], dtype=torch.float64, device=device)
        distributed.all_reduce(one_s, distributed.ReduceOp.MAX)  # all must call equally often
        heating, timed = (max(1, round(duration_s / one_s.item())) for duration_s in (HEAT_S, MEASURE_S))
        times = []
        for _ in range(REPEATS):
            measure(exchange, heating)
            times.append(measure(exchange, timed))
        seconds.append(statistics.median(times))
    if rank == 0:
        print(json.dumps(seconds))
    distributed.destroy_process_group()


def _gpu_seconds(operation: Callable[[], object], calls: int) -> float:
    """Returns the seconds per call between two events on the GPU."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        operation()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


def _cpu_seconds(operation: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        operation()
    return (time.perf_counter() - begin) / calls


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
