"""The bench's own arithmetic: what it times, what it credits, what it writes."""

import json
import time

import pytest

from dsv3_jax.benchmarks import report, whole_steps
from dsv3_jax.benchmarks.networks import SLICE, SMALL, WORKLOADS
from dsv3_jax.benchmarks.timing import Contender, interleaved_medians
from dsv3_jax.model import count_params


def test_a_burst_counts_every_call_and_waits_once():
    contenders = {
        "slow": Contender(lambda: time.sleep(4e-3), lambda _: None),
        "slow to finish": Contender(lambda: None, lambda _: time.sleep(20e-3)),
    }
    seconds = interleaved_medians(contenders, burst_s=8e-3, idle_s=0.0, repeats=3)
    assert 4e-3 <= seconds["slow"] < 8e-3
    assert seconds["slow to finish"] >= 20e-3  # one call fills its burst


def test_workloads_are_the_published_width_and_a_small_network():
    assert count_params(SMALL.model, with_mtp=False) == 108_130_016
    assert (SLICE.model.hidden_size, SLICE.model.num_attention_heads, SLICE.tokens) == (7168, 128, 8192)
    for workload in WORKLOADS.values():
        train = workload.run_config.train
        assert train.rows_per_pass == train.batch_size == workload.batch_size, "one pass, no accumulation"


def test_both_sides_are_credited_with_the_same_operations(monkeypatch):
    results = {"dsv3_jax": 2.0, "transformers": 3.0}
    monkeypatch.setattr(
        whole_steps, "_measure", lambda name, *_: [{"step_s": results[name], "loss": 1.0, "peak_gb": 1.0}]
    )
    ours, peer = whole_steps.train_step_rows("small", peer="transformers")
    assert ours["speed-up"] == pytest.approx(1.5) and peer["speed-up"] == 1.0
    assert ours["TFLOP/s"] * 2 == pytest.approx(peer["TFLOP/s"] * 3)
    assert ours["tokens/s"] == SMALL.batch_size * SMALL.sequence_length / 2


def test_a_failed_measurement_says_why(monkeypatch):
    monkeypatch.setitem(whole_steps.MODULES, "dsv3_jax", "dsv3_jax.benchmarks.nothing")
    with pytest.raises(ValueError, match="No module named dsv3_jax"):
        whole_steps.train_step_rows("small", peer=None)


def test_results_say_where_they_were_measured(tmp_path):
    rows = [{"case": "a", "TFLOP/s": 1.5, "of torch": None}]
    report.save(str(tmp_path / "rows.json"), "attention", rows)
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["rows"] == rows and record["suite"] == "attention"
    assert record["environment"]["versions"]["jax"] and record["environment"]["num_cores"] > 0
