import json
import math
import struct

import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dsv3_jax.config import ModelConfig, override
from dsv3_jax.model import param_specs
from dsv3_jax.train.flops import active_matmul_params, train_flops_per_token
from dsv3_jax.train.metrics import METRICS_FILE, RunLog, Throughput, progress_line, read_records, step_record
from dsv3_jax.train.plots import draw_expert_load, write_plots
from dsv3_jax.train.schedule import StepSettings

SETTINGS = StepSettings(learning_rate=1e-3, batch_size=4, mtp_loss_weight=0.3, bias_update_speed=0.001)


def record(step: int, *, loss: float = 2.0, rounds: int = 0) -> dict:
    metrics = {
        "loss": np.float32(loss), "mtp_loss": np.float32(2.5), "balance_loss": np.float32(1),
        "total_loss": np.float32(loss), "grad_norm": np.float32(1), "is_good": np.bool_(True), "bad_steps": np.int32(0),
        "bad_steps_in_row": np.int32(0), "exchange_further_rounds": np.int32(rounds),
        "tokens_per_expert": {"moe_layers": np.array([[1, 3], [2, 2]]), "mtp_layers": np.array([[4, 0]])},
    }  # fmt: skip
    made = step_record(step, tokens=48 * step, settings=SETTINGS, metrics=metrics)
    return made | {"tokens_per_second": 100.0, "model_flops_utilization": None}


def test_repeated_steps_appear_once(tmp_path):
    """Killed after step 5 in the middle of a line, resumed from the checkpoint of step 3."""
    log = RunLog(tmp_path, start_step=0)
    for step in range(1, 6):
        log.write(record(step))
    log.write({"kind": "heldout", "step": 3, "bits_per_byte": 2.0})
    log.close()
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3, 4, 5, 3]

    log = RunLog(tmp_path, start_step=3)
    log.write(record(4, loss=9.0))
    log.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4]
    assert json.loads(lines[-1])["loss"] == 9.0


def test_lines_are_json_even_for_losses_that_are_not_finite(tmp_path):
    log = RunLog(tmp_path, start_step=0)
    log.write(record(1, loss=math.nan))
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_tensorboard_gets_the_numbers(tmp_path):
    log = RunLog(tmp_path, start_step=6)
    log.write(record(7, loss=1.5))
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # length, its checksum, event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert (events[1].step, events[1].session_log.status) == (7, SessionLog.START)
    values = {value.tag: value.simple_value for value in events[2].summary.value}
    assert events[2].step == 7 and values["train/loss"] == 1.5 and values["train/is_good"] == 1


def test_expert_load_is_relative_to_each_layers_mean():
    made = record(1)
    assert made["expert_load_max_over_mean_by_layer"] == {
        "MoE layer 0": 1.5, "MoE layer 1": 1.0, "MTP module 0": 2.0,
    }  # fmt: skip
    assert made["expert_load_min_over_mean_by_layer"]["MTP module 0"] == 0.0
    assert made["expert_load_max_over_mean"] == 2.0


def test_throughput_counts_tokens_between_due_steps(micro, monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput(override(micro, {"train.peak_tflops": 1.0}), num_devices=2)
    assert throughput.measure(100, is_due=True)["tokens_per_second"] is None  # compiled in this one
    assert throughput.measure(100, is_due=False) == {}
    speed = throughput.measure(100, is_due=True)
    assert speed["tokens_per_second"] == 200 / 4
    flops = train_flops_per_token(micro.model, sequence_length=12)
    assert speed["model_flops_utilization"] == pytest.approx(50 * flops / 2e12)


def test_progress_line_says_what_is_left(micro):
    line = progress_line(override(micro, {"train.num_steps": 101}), record(1))
    assert "step 1/101" in line and "100 tokens/s" in line and "ETA 0:00:48" in line  # 100 steps x 48 tokens
    assert "expert load max/mean 2.00" in line and "further" not in line


def test_further_rounds_of_the_exchange_are_written_and_shown(micro, tmp_path):
    log = RunLog(tmp_path, start_step=0)
    log.write(record(1))
    log.write(record(2, rounds=3))
    log.close()
    assert [r["exchange_further_rounds"] for r in read_records(tmp_path)] == [0, 3]
    assert "further exchange rounds 3" in progress_line(micro, record(2, rounds=3))
    figure = Figure()
    draw_expert_load(figure.add_subplot(), read_records(tmp_path))
    assert [line.get_ydata().tolist() for line in figure.axes[1].get_lines()] == [[0, 3]]


def test_active_parameters_equal_a_count_over_the_declared_ones(micro):
    config = override(micro.model, {"q_lora_rank": 6, "num_hidden_layers": 4})

    def count(tree: dict) -> float:
        total = 0.0
        for name, value in tree.items():
            if name == "experts":
                total += count(value) * config.num_experts_per_tok / config.n_routed_experts
            elif isinstance(value, dict):
                total += count(value)
            elif not name.endswith("norm") and name not in ("embed_tokens", "e_score_correction_bias"):
                total += math.prod(value.shape)
        return total

    head = config.hidden_size * config.vocab_size  # once more for the MTP module, which shares it
    assert active_matmul_params(config) == count(param_specs(config)) + head


def test_published_model_activates_37_billion():
    config = ModelConfig(num_nextn_predict_layers=0)
    assert active_matmul_params(config) + config.vocab_size * config.hidden_size == pytest.approx(37e9, rel=0.02)


def test_plots_are_pictures(tmp_path):
    log = RunLog(tmp_path, start_step=0)
    for step in (1, 2):
        log.write(record(step))
    log.write({"kind": "heldout", "step": 2, "bits_per_byte": 3.0})
    log.close()
    paths = write_plots(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "expert_load.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_nothing_is_drawn_without_metrics(tmp_path):
    assert write_plots(tmp_path) == []
