"""The bench's own arithmetic: what it times, what it credits, what it writes."""

import json
import time

import pytest

from dsv3_jax.benchmarks import report, whole_steps
from dsv3_jax.benchmarks.networks import SLICE, SMALL, WORKLOADS
from dsv3_jax.benchmarks.timing import Contender, burst_medians, seconds_after, steady_medians
from dsv3_jax.benchmarks.traces import Kernel
from dsv3_jax.model import count_params


def sleeping(work_s: float, wait_s: float = 0.0, operations: int = 1) -> Contender:
    """Returns a contender whose starts take work_s each, and whose waiting takes wait_s."""
    return Contender(lambda: time.sleep(work_s), lambda _: time.sleep(wait_s), operations)


def test_a_burst_leaves_out_what_waiting_costs():
    contenders = {"slow": sleeping(8e-3), "slow to finish": sleeping(8e-3, 30e-3), "two": sleeping(8e-3, 0.0, 2)}
    seconds = burst_medians(contenders, burst_s=30e-3, idle_s=0.0, repeats=3)
    assert 7e-3 < seconds["slow"] < 14e-3
    assert 7e-3 < seconds["slow to finish"] < 14e-3
    assert 3.5e-3 < seconds["two"] < 7e-3


def test_a_single_call_takes_what_its_kernels_compute():
    spans = [("earlier", 0, 9), ("flush_sine", 9, 10), ("first", 20, 23), ("second", 30, 34), ("flush_sine", 35, 36),
             ("flush_sine", 40, 41), ("first", 50, 55)]  # fmt: skip
    kernels = [Kernel("GPU", "Stream", name, "", float(start), float(end)) for name, start, end in spans]
    assert seconds_after(kernels, "sine") == [7.0, 0.0, 5.0]


def test_steady_times_start_after_heating():
    starts = []
    contender = Contender(lambda: (starts.append(time.perf_counter()), time.sleep(2e-3)), lambda _: None)
    seconds = steady_medians({"a": contender}, heat_s=40e-3, measure_s=10e-3, repeats=1)
    assert 2e-3 <= seconds["a"] < 8e-3
    assert len(starts) > 20, "heat and the timed part"


def test_workloads_are_the_published_width_and_a_small_network():
    assert count_params(SMALL.model, with_mtp=False) == 108_130_016
    assert (SLICE.model.hidden_size, SLICE.model.num_attention_heads, SLICE.tokens) == (7168, 128, 8192)
    for workload in WORKLOADS.values():
        train = workload.run_config.train
        assert train.rows_per_pass == train.batch_size == workload.batch_size, "one pass, no accumulation"


def test_all_sides_are_credited_with_the_same_operations(monkeypatch):
    results = {("dsv3_jax", "fp8"): 1.0, ("dsv3_jax", "bf16"): 2.0, ("transformers",): 3.0}
    monkeypatch.setattr(
        whole_steps, "_measure",
        lambda name, suite, workload, *precision: [
            {"step_s": results[name, *precision], "loss": 1.0, "peak_gb": 1.0, "activations_gb": 2.0}
        ],
    )  # fmt: skip
    fp8, bf16, peer = whole_steps.train_step_rows("small", peer="transformers", precisions=["fp8", "bf16"])
    assert fp8["speed of dsv3_jax bf16"] == pytest.approx(2.0) and fp8["speed of transformers"] == pytest.approx(3.0)
    assert bf16["speed of transformers"] == pytest.approx(1.5) and peer["speed of transformers"] == 1.0
    assert bf16["TFLOP/s"] * 2 == pytest.approx(peer["TFLOP/s"] * 3)
    assert bf16["tokens/s"] == SMALL.batch_size * SMALL.sequence_length / 2


def test_a_failed_measurement_says_why(monkeypatch):
    monkeypatch.setitem(whole_steps.MODULES, "dsv3_jax", "dsv3_jax.benchmarks.nothing")
    with pytest.raises(ValueError, match="No module named dsv3_jax"):
        whole_steps.train_step_rows("small", peer=None, precisions=None)


def test_results_say_where_they_were_measured(tmp_path):
    rows = [{"case": "a", "TFLOP/s": 1.5, "of torch": None}]
    report.save(str(tmp_path / "rows.json"), {"attention": rows})
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["suites"] == {"attention": rows}
    assert record["environment"]["versions"]["jax"] and record["environment"]["num_cores"] > 0
