"""Training steps with experts spread over the GPUs of one host beside one GPU, and what a trace says of the exchange.

Every device trains as many tokens as one alone. `python -m dsv3_jax.benchmarks.expert_parallel WORKLOAD PRECISION
NUM_DEVICES` measures in a process of its own; the last line on stdout is the result as JSON.
"""

import collections
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dsv3_jax.benchmarks import own_process, traces
from dsv3_jax.benchmarks.networks import WORKLOADS, Workload
from dsv3_jax.benchmarks.replays import compile_all
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.config import override, require
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train import schedule
from dsv3_jax.train.flops import train_flops_per_token
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import as_scalars, lower_train_step, split_batch

WARMUP_STEPS, STEPS, TRACED_STEPS = 2, 5, 2
OPTIONS = {"": {}, ", synchronous": {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"}}  # of XLA
SHOWN_KERNELS = 12  # of those beside the exchange


def expert_parallel_rows(workload_name: str, *, precisions: Sequence[str] | None) -> list[Row]:
    """Measures the workload on one device and with its experts spread over all, also with nothing beside a collective.

    "ms exchange" is the time a device's kernels send tokens or wait for them, "hidden" the share of it during which the
    device computed. Further rows list the collectives, what every part of the network computes, and the kernels beside
    the exchange.

    Args:
      workload_name: of `networks.WORKLOADS`.
      precisions: None for the workload's own.

    Raises:
      ValueError: there is one device only.
    """
    num_devices = jax.device_count()
    require(num_devices > 1, "suite", "expert_parallel", "needs several devices of one host, and JAX found one")
    workload = WORKLOADS[workload_name]
    rows = []
    for precision in workload.precisions if precisions is None else precisions:
        results = {"1 device": _measure(workload_name, precision, 1)[""]}
        spread = _measure(workload_name, precision, num_devices)
        results |= {f"gpu={num_devices}{options}": result for options, result in spread.items()}
        rows += step_rows(workload, f"{workload_name} {precision}", results)
    return rows


def step_rows(workload: Workload, case: str, results: dict[str, dict]) -> list[Row]:
    """Returns a row per measured process, the first being one device, and one per kernel beside its exchange."""
    flops = workload.tokens * train_flops_per_token(workload.model, sequence_length=workload.sequence_length)
    alone_s = next(iter(results.values()))["step_s"]
    rows, kernels = [], []
    for name, result in results.items():
        row = {"case": case, "implementation": name, "ms a step": result["step_s"] * 1e3,
               "tokens/s a device": workload.tokens / result["step_s"],
               "TFLOP/s a device": flops / result["step_s"] / 1e12, "speed of 1 device": alone_s / result["step_s"],
               "peak GB": result["peak_gb"], "loss": result["loss"]}  # fmt: skip
        if "exchange" in result:
            exchange, all_collectives = (traces.Overlap(*result[name]) for name in ("exchange", "collectives"))
            row |= {"ms exchange": exchange.exchange_s * 1e3, "hidden": exchange.hidden_share,
                    "ms collectives": all_collectives.exchange_s * 1e3, "ms compute": all_collectives.compute_s * 1e3,
                    "ms idle": all_collectives.idle_s * 1e3}  # fmt: skip
            kernels += [{"case": f"{case}, {name}: collectives", "implementation": kernel, "times a step": count,
                         "ms a step": of_kernel.exchange_s * 1e3, "hidden": of_kernel.hidden_share}
                        for kernel, count, *overlap in result["by_collective"]
                        for of_kernel in [traces.Overlap(*overlap)]]  # fmt: skip
            kernels += [{"case": f"{case}, {name}: compute", "implementation": part, "ms a step": seconds * 1e3}
                        for part, seconds in result["by_part"]]  # fmt: skip
            kernels += [{"case": f"{case}, {name}: beside the exchange", "implementation": kernel[:80],
                         "ms a step": seconds * 1e3} for kernel, seconds in result["beside"]]  # fmt: skip
        rows.append(row)
    return rows + kernels


def _measure(workload_name: str, precision: str, num_devices: int) -> dict[str, dict]:
    return own_process.run("dsv3_jax.benchmarks.expert_parallel", workload_name, precision, str(num_devices))


def time_steps(workload: Workload, precision: str, *, num_devices: int) -> dict[str, dict]:
    """Times optimizer steps on random tokens, data on the devices waited for; traces more where they are GPUs.

    Returns:
      By compiler options, on one device without any: step_s, loss, peak_gb, and what `summarize` gives of the trace.
    """
    workload = dataclasses.replace(workload, batch_size=workload.batch_size * num_devices)
    config = override(workload.run_config, {"model.precision": precision, "mesh.gpu": num_devices})
    mesh = make_mesh(config.mesh, devices=jax.devices()[:num_devices])
    on_gpu = jax.default_backend() == "gpu"
    scalars = as_scalars(config, schedule.at(config.train, step=0, tokens=0))
    rng = np.random.default_rng(0)
    lowered = lower_train_step(config, mesh)
    chosen = OPTIONS if on_gpu and num_devices > 1 else {"": {}}
    programs = compile_all({name: functools.partial(lowered.compile, options) for name, options in chosen.items()})
    results = {}
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        for name, program in programs.items():

            def step(program=program) -> tuple[float, float]:
                nonlocal state
                shape = (workload.batch_size, workload.sequence_length + 1)
                tokens_ABT = split_batch(config, rng.integers(0, config.model.vocab_size, shape).astype(np.int32))
                start = time.perf_counter()
                state, metrics = program(state, tokens_ABT, scalars)
                jax.block_until_ready((state, metrics))
                return time.perf_counter() - start, float(metrics["loss"])

            timed = [step() for _ in range(WARMUP_STEPS + STEPS)][WARMUP_STEPS:]
            results[name] = {
                "step_s": statistics.median(seconds for seconds, _ in timed),
                "loss": timed[-1][1],
                "peak_gb": mesh.devices.flat[0].memory_stats()["peak_bytes_in_use"] / 1e9 if on_gpu else None,
            }
            if on_gpu:
                results[name] |= trace_steps(step, program.as_text())
    return results


def trace_steps(step: Callable[[], object], hlo_text: str) -> dict:
    """Traces some steps of a compiled program; see `summarize`."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, create_perfetto_trace=True):
            for _ in range(TRACED_STEPS):
                step()
        kernels = traces.read_kernels(directory)
    return summarize(kernels, traces.operation_names(hlo_text), num_steps=TRACED_STEPS)


def summarize(kernels: list[traces.Kernel], names: dict[str, str], *, num_steps: int) -> dict:
    """Says what a trace of some steps holds, per step, devices averaged.

    Args:
      kernels: of all devices.
      names: see `traces.operation_names`.
      num_steps: how many were traced.

    Returns:
      exchange and collectives: `traces.Overlap` of the experts' exchange and of all collectives. by_collective: a list
      of [kernel with the part and the operation it comes from, times, *`traces.Overlap`]. by_part: a list of [part of
      the network, seconds of its kernels that are no collectives]. beside: a list of [kernel, seconds] of what ran
      longest during the exchange.
    """

    def is_exchange(kernel: traces.Kernel) -> bool:
        return traces.is_collective(kernel) and traces.part(names.get(kernel.operation, "")) in traces.EXCHANGE

    def part(kernel: traces.Kernel) -> str:
        path = names.get(kernel.operation, "")
        return (traces.part(path) or "other") + (", backward" if traces.is_backward(path) else "")

    def label(kernel: traces.Kernel) -> str:
        path = names.get(kernel.operation, kernel.operation)
        return f"{kernel.name.split('(')[0]} ({part(kernel)}: {path.rsplit('/', 1)[-1].rstrip(')')})"

    num_devices = len({kernel.device for kernel in kernels})

    def average(is_chosen: Callable[[traces.Kernel], bool]) -> list[float]:
        by_device = traces.overlap(kernels, is_chosen).values()
        return [sum(values) / num_devices / num_steps for values in zip(*by_device)]

    labels = collections.Counter(label(kernel) for kernel in kernels if traces.is_collective(kernel))
    by_collective = [
        [name, count / num_devices / num_steps, *average(lambda kernel, name=name: label(kernel) == name)]
        for name, count in labels.items()
    ]
    seconds = collections.Counter()
    for kernel in kernels:
        if not traces.is_collective(kernel):
            seconds[part(kernel)] += (kernel.end_s - kernel.start_s) / num_devices / num_steps
    beside = traces.beside(kernels, is_exchange, top=SHOWN_KERNELS)
    return {
        "exchange": average(is_exchange),
        "collectives": average(traces.is_collective),
        "by_collective": sorted(by_collective, key=lambda row: -row[2]),
        "by_part": [list(item) for item in seconds.most_common()],
        "beside": [[name, seconds / num_devices / num_steps] for name, seconds in beside],
    }


if __name__ == "__main__":
    own_workload, own_precision, own_devices = sys.argv[1:]
    print(json.dumps(time_steps(WORKLOADS[own_workload], own_precision, num_devices=int(own_devices))))
