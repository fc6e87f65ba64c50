"""The bench of the expert exchange on two CPU devices: its code runs, its credits and ratios are right."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.benchmarks import expert_exchange, nccl_peer


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    script = pathlib.Path(__file__).parent / "exchange_on_two_devices.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_part_is_measured_in_both_payloads(rows):
    uniform = {row["implementation"] for row in rows if row["case"] == "32 tokens of 4 experts, node=1 gpu=2, uniform"}
    both = ("dispatch", "dispatch of the gradient", "exchange", "exchange, forward and backward", "all_to_all",
            "all_to_all of uint32", "ppermute")  # fmt: skip
    assert uniform == {f"{name} {payload}" for name in both for payload in ("BF16", "FP8")} | {"combine BF16"}
    assert len({row["case"] for row in rows}) == 2
    assert all(row["µs"] > 0 for row in rows)


def test_rates_and_ratios_are_those_of_the_times(rows):
    times = {(row["case"], row["implementation"]): row["µs"] for row in rows}
    for row in rows:
        name, peer = row["implementation"], f"all_to_all {row['implementation'].split()[-1]}"
        if name.startswith("exchange"):
            assert "GB/s" not in row and "speed of NCCL" not in row, "several crossings, and work besides"
        else:
            assert row["GB/s"] == pytest.approx(row["MB sent"] / row["µs"] * 1e3)
            assert row["speed of NCCL"] == pytest.approx(times[row["case"], peer] / row["µs"])
        if name.endswith("FP8"):
            assert row["speed of BF16"] == pytest.approx(times[row["case"], name.replace("FP8", "BF16")] / row["µs"])


def test_one_device_has_nothing_to_exchange(monkeypatch):
    monkeypatch.setattr(expert_exchange.jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="needs several devices"):
        expert_exchange.exchange_rows(with_torch=False)


@pytest.mark.parity
def test_processes_of_torch_exchange_and_report_their_seconds(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seconds = nccl_peer.all_to_all_seconds([16, 4096], num_devices=2)
    assert len(seconds) == 2 and all(1e-7 < value < 10 for value in seconds)


def test_a_failed_process_of_the_peer_is_no_result(monkeypatch):
    monkeypatch.setattr(nccl_peer.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"nccl_peer 0 2 \d+ 16 failed"):
        nccl_peer.all_to_all_seconds([16], num_devices=2)
