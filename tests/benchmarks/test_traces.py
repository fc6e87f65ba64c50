"""Reading a profiler's trace: which intervals count, and how they overlap."""

import gzip
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.benchmarks import traces
from dsv3_jax.benchmarks.traces import Kernel, is_collective, overlap

SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"


def is_send(kernel: Kernel) -> bool:
    return kernel.name == SEND


def metadata(pid: int, device: str, lines: dict[int, str]) -> list[dict]:
    names = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": device}}]
    return names + [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        for tid, name in lines.items()
    ]


def complete(pid: int, tid: int, name: str, start: float, length: float, **args) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": length, "args": args}


# Device 1, microseconds:   0        10        20        30        40
#   compute                 [gemm 0-10] [shared 15-25]       [gemm 35-40]
#   exchange                      [send 8 ----- 22]   [send 28-32]
HAND_MADE = [
    *metadata(1, "/device:GPU:0", {1: "Stream #1(Compute)", 2: "Stream #2(Compute)", 3: "XLA Ops"}),
    *metadata(2, "/device:GPU:1", {1: "Stream #1(Compute)"}),
    *metadata(3, "/host:CPU", {1: "Stream of consciousness"}),
    complete(1, 1, "gemm", 0, 10, hlo_op="custom-call.1"),
    complete(1, 2, SEND, 8, 14, hlo_op="all-to-all.2"),
    complete(1, 1, "shared", 15, 10),
    complete(1, 2, SEND, 28, 4),
    complete(1, 1, "gemm", 35, 5),
    complete(1, 3, "custom-call.1", 0, 40),
    complete(2, 1, "ncclDevKernel_AllGather_RING_LL", 100, 6),
    complete(3, 1, "python", 0, 1000),
    {"ph": "i", "pid": 1, "tid": 1, "name": "instant", "ts": 3},
]


def written(directory, content) -> None:
    folder = directory / "plugins" / "profile" / "2026"
    folder.mkdir(parents=True)
    with gzip.open(folder / traces.TRACE_FILE, "wt") as file:
        json.dump(content, file)


@pytest.mark.parametrize("content", [HAND_MADE, {"traceEvents": HAND_MADE}], ids=["list", "object"])
def test_kernels_of_streams_of_gpus_are_read_and_nothing_else(tmp_path, content):
    written(tmp_path, content)
    kernels = traces.read_kernels(tmp_path)
    assert [kernel.name for kernel in kernels] == ["gemm", SEND, "shared", SEND, "gemm", HAND_MADE[-3]["name"]]
    assert kernels[0].operation == "custom-call.1" and kernels[2].operation == ""
    np.testing.assert_allclose([kernels[1].start_s, kernels[1].end_s], [8e-6, 22e-6])


def test_exchange_compute_and_both_are_what_a_pencil_says():
    by_device = overlap(traces.kernels_of(HAND_MADE), is_send)
    own = by_device["/device:GPU:0"]
    np.testing.assert_allclose(own, [18e-6, 25e-6, (2 + 7) * 1e-6, (3 + 3) * 1e-6])
    assert own.hidden_share == pytest.approx(0.5)
    assert by_device["/device:GPU:1"] == pytest.approx((0.0, 0.0, 0.0, 0.0)), "a gather neither exchanges nor computes"
    assert overlap(traces.kernels_of(HAND_MADE), is_collective)["/device:GPU:1"].exchange_s == pytest.approx(6e-6)


def test_overlap_of_many_random_kernels_is_what_a_clock_of_single_ticks_counts():
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 400, 60), rng.integers(1, 12, 60)
    names = [SEND if chosen else "gemm" for chosen in rng.random(60) < 0.4]
    kernels = sorted(
        (Kernel("GPU", "Stream", name, "", float(start), float(start + length))
         for name, start, length in zip(names, starts, lengths)), key=lambda kernel: kernel.start_s,
    )  # fmt: skip
    runs = {name: np.zeros(500, bool) for name in (SEND, "gemm")}
    for kernel in kernels:
        runs[kernel.name][int(kernel.start_s) : int(kernel.end_s)] = True
    busy = np.flatnonzero(runs[SEND] | runs["gemm"])
    expected = (runs[SEND].sum(), runs["gemm"].sum(), (runs[SEND] & runs["gemm"]).sum(),
                busy[-1] + 1 - busy[0] - len(busy))  # fmt: skip
    assert overlap(kernels, is_send)["GPU"] == pytest.approx(expected)


def test_what_ran_beside_the_exchange_and_what_ran_longest():
    kernels = traces.kernels_of(HAND_MADE)
    assert traces.beside(kernels, is_send, top=5) == [
        ("shared", pytest.approx(7e-6)), ("gemm", pytest.approx(2e-6))
    ]  # fmt: skip
    assert traces.longest(kernels, top=2) == [(SEND, pytest.approx(18e-6), 2), ("gemm", pytest.approx(15e-6), 2)]


def test_a_missing_or_empty_trace_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="create_perfetto_trace=True"):
        traces.read_kernels(tmp_path)
    written(tmp_path, [complete(3, 1, "python", 0, 1000)])
    with pytest.raises(ValueError, match="holds no kernel of a GPU"):
        traces.read_kernels(tmp_path)


def test_instructions_know_the_functions_they_were_traced_in():
    function = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) @ x, x))
    names = traces.operation_names(function.lower(jnp.ones((8, 8))).compile().as_text())
    of_product = [op_name for op_name in names.values() if op_name.endswith("dot_general")]
    assert of_product and all("while/body" in op_name for op_name in of_product)
    text = """
  %all-to-all-start.1 = ((u32[8]), u32[8]) all-to-all-start(%x), metadata={op_name="jit(f)/all_to_all" stack_frame_id=3}
  ROOT %y = f32[] negate(%z), metadata={source_line=1 op_name="jit(f)/neg"}
  %w = f32[] negate(%z)
"""
    assert traces.operation_names(text) == {"all-to-all-start.1": "jit(f)/all_to_all", "y": "jit(f)/neg"}


@pytest.mark.parametrize(
    ("path", "part", "is_backward"),
    [
        ("jit(step)/shard_map/while/body/jvp()/while/body/closed_call/expert_exchange/dispatch/all_to_all",
         "expert_exchange/dispatch", False),
        ("jit(step)/transpose(jvp(attention))/experts/dot_general", "experts", True),
        ("jit(step)/transpose(jvp())/shared_experts/mul", "shared_experts", True),
        ("jit(step)/(while/body/router/psum:while/body/optimizer/psum)", "optimizer", False),
        ("jit(step)/optimizer", "optimizer", False),
        ("jit(step)/my_optimizer/optimizers", "", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_the_innermost_part_is_read_from_a_path(path, part, is_backward):
    assert (traces.part(path), traces.is_backward(path)) == (part, is_backward)


def test_collectives_of_a_compiled_step_say_what_part_they_belong_to():
    """On eight devices along three axes, with rounds of the exchange in both passes and an MTP module."""
    script = pathlib.Path(__file__).with_name("collectives_of_a_step.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(kind, traces.part(path), traces.is_backward(path)) for kind, path in json.loads(done.stdout)}
    assert all(part for _, part, _ in found), found
    exchanging = {(part, is_backward) for part in traces.EXCHANGE for is_backward in (False, True)}
    assert {(part, is_backward) for kind, part, is_backward in found if kind == "all-to-all"} == exchanging
    parts = {(kind, part) for kind, part, _ in found}
    assert {("reduce-scatter", "sum_gradients"), ("all-gather", "gather_weights"), ("all-reduce", "optimizer"),
            ("all-gather", "attention"), ("collective-permute", "mtp")} <= parts  # fmt: skip
