"""Comparing two runs' losses: the numbers, and refusals of runs that cannot be compared."""

import json

import numpy as np
import pytest

from dsv3_jax.benchmarks import loss_curves
from dsv3_jax.config import ModelConfig, RunConfig, override, to_json


def write_run(directory, losses, *, precision, first_step=1, **changes):
    directory.mkdir()
    config = override(RunConfig(model=ModelConfig()), {"model.precision": precision, **changes})
    (directory / "config.json").write_text(to_json(config))
    records = [{"kind": "heldout", "step": first_step, "loss": 9.0}]
    records += [
        {"kind": "train", "step": first_step + i, "tokens": 1000 * (first_step + i), "loss": loss}
        for i, loss in enumerate(losses)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_differences_are_relative_to_the_first_run(tmp_path):
    bf16 = np.linspace(8, 4, 40)
    fp8 = bf16.copy()
    fp8[20:] *= 1.002
    fp8[20] = bf16[20] * 0.99
    a = write_run(tmp_path / "a", bf16.tolist(), precision="bf16")
    b = write_run(tmp_path / "b", fp8.tolist(), precision="fp8", **{"train.checkpoint_every_steps": 7})
    comparison = loss_curves.compare(a, b)
    *tenths, half = comparison.rows()
    assert len(tenths) == 10 and tenths[4]["difference %"] == 0
    assert tenths[9]["difference %"] == pytest.approx(0.2)
    assert half["difference %"] == pytest.approx(100 * (fp8[20:].mean() / bf16[20:].mean() - 1))
    assert half["mean |step difference| %"] == pytest.approx((19 * 0.2 + 1.0) / 20)
    assert (half["loss bf16"], half["tokens"]) == (pytest.approx(bf16[20:].mean()), "0.0M - 0.0M")


def test_steps_that_both_runs_have_are_compared(tmp_path):
    a = write_run(tmp_path / "a", [3.0] * 30, precision="bf16")
    b = write_run(tmp_path / "b", [3.0] * 30, precision="bf16", first_step=6)
    comparison = loss_curves.compare(a, b)
    assert comparison.steps.tolist() == list(range(6, 31)) and comparison.names == ("a", "b")


def test_curves_and_plot_are_written(tmp_path):
    runs = [write_run(tmp_path / name, [4.0, 3.5] * 15, precision=name) for name in ("bf16", "fp8")]
    comparison = loss_curves.compare(*runs)
    loss_curves.write_json(comparison, tmp_path / "c.json")
    loss_curves.write_plot(comparison, tmp_path / "c.png")
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["curves"]["losses"] == {"bf16": [4.0, 3.5] * 15, "fp8": [4.0, 3.5] * 15}
    assert len(written["rows"]) == 11 and (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"losses": [3.0] * 30, "train.seed": 1}, "train.seed"),
        ({"losses": [3.0] * 30, "data.sequence_length": 2048}, "data.sequence_length"),
        ({"losses": [3.0] * 10}, "train at least 20"),
        ({"losses": [3.0] * 29 + [None]}, r"at steps \[30\]"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, second, message):
    a = write_run(tmp_path / "a", [3.0] * 30, precision="bf16")
    b = write_run(tmp_path / "b", precision="fp8", **second)
    with pytest.raises(ValueError, match=message):
        loss_curves.compare(a, b)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        loss_curves.compare(tmp_path, tmp_path)
