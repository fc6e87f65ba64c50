"""How far the losses of two runs on the same data lie apart: numbers, a plot and the curves themselves."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import config as configuration
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.config import require
from dsv3_jax.train.metrics import METRICS_FILE, read_records

NUM_PARTS = 10  # of a run, with a row each
MAY_DIFFER = {  # settings that two compared runs need not share: everything else changes data or recipe
    "model.precision", "model.fp8_input_cache", "model.fp8_attention_cache", "model.fp8_swiglu_cache",
    "model.remat_policy", "data.corpus", "data.prefetch_windows", "data.reader_threads", "train.log_every_steps",
    "train.checkpoint_every_steps", "train.checkpoints_to_keep", "train.checkpoint_keep_every_steps",
    "train.eval_every_steps", "train.eval_sequences", "train.peak_tflops", "mesh.gpu", "mesh.node", "mesh.replica",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The losses of two runs at the steps that both have finished."""

    names: tuple[str, str]
    steps: np.ndarray  # int
    tokens: np.ndarray  # int, trained by the end of each step
    losses: tuple[np.ndarray, np.ndarray]  # float64, nats per token

    @property
    def differences(self) -> np.ndarray:
        """Gives (second - first) / first of every step."""
        first, second = self.losses
        return second / first - 1

    def row(self, part: str, chosen: slice) -> Row:
        """Returns what a part of the run looks like: the difference of its mean losses, and the mean |difference|."""
        first, second = (losses[chosen].mean() for losses in self.losses)
        tokens = self.tokens[chosen]
        return {
            "case": part, "tokens": f"{tokens[0] / 1e6:.1f}M - {tokens[-1] / 1e6:.1f}M",
            f"loss {self.names[0]}": float(first), f"loss {self.names[1]}": float(second),
            "difference %": float(100 * (second / first - 1)),
            "mean |step difference| %": float(100 * np.abs(self.differences[chosen]).mean()),
        }  # fmt: skip

    def rows(self) -> list[Row]:
        """Returns a row per tenth of the steps, and one of the last half."""
        count = len(self.steps)
        edges = [round(part * count / NUM_PARTS) for part in range(NUM_PARTS + 1)]
        tenths = [self.row(f"tenth {i + 1}", slice(*edges[i : i + 2])) for i in range(NUM_PARTS)]
        return [*tenths, self.row("last half", slice(count // 2, count))]


def compare(workdir_a: str | Path, workdir_b: str | Path) -> Comparison:
    """Reads the losses of two workdirs at the steps that both have.

    Raises:
      ValueError: a workdir without configuration or metrics, runs of other data or another recipe, runs that share
        fewer than 20 steps, or a loss that is not finite.
    """
    configs = [_read_config(workdir) for workdir in (workdir_a, workdir_b)]
    for setting, values in _unequal_settings(*configs).items():
        require(False, setting, values, f"differs between {workdir_a} and {workdir_b}; compare runs of one recipe")
    by_step = [
        {record["step"]: record for record in read_records(workdir) if record["kind"] == "train"}
        for workdir in (workdir_a, workdir_b)
    ]
    steps = sorted(by_step[0].keys() & by_step[1].keys())
    require(len(steps) >= 2 * NUM_PARTS, METRICS_FILE, len(steps),
            f"steps are in both {workdir_a} and {workdir_b}; train at least {2 * NUM_PARTS}")  # fmt: skip
    for workdir, records in zip((workdir_a, workdir_b), by_step):
        bad = [step for step in steps if records[step]["loss"] is None or not math.isfinite(records[step]["loss"])]
        require(not bad, f"{workdir} loss", "not finite", f"at steps {bad[:5]}; there is nothing to compare")
    names = [config.model.precision for config in configs]
    if names[0] == names[1]:
        names = [Path(workdir).name for workdir in (workdir_a, workdir_b)]
    return Comparison(
        names=tuple(names),
        steps=np.array(steps),
        tokens=np.array([by_step[0][step]["tokens"] for step in steps]),
        losses=tuple(np.array([records[step]["loss"] for step in steps]) for records in by_step),
    )


def write_json(comparison: Comparison, path: str | Path) -> None:
    """Writes the table and the curves."""
    curves = {
        "steps": comparison.steps.tolist(), "tokens": comparison.tokens.tolist(),
        "losses": {name: losses.round(5).tolist() for name, losses in zip(comparison.names, comparison.losses)},
    }  # fmt: skip
    Path(path).write_text(json.dumps({"rows": comparison.rows(), "curves": curves}) + "\n")


def write_plot(comparison: Comparison, path: str | Path) -> None:
    """Draws both losses, and below them the relative difference, over tokens."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    millions = comparison.tokens / 1e6
    for name, losses in zip(comparison.names, comparison.losses):
        above.plot(millions, losses, label=name, linewidth=0.8)
    above.set_ylabel("training loss, nats per token")
    above.legend()
    width = max(1, len(millions) // 50)
    smooth = np.convolve(comparison.differences, np.ones(width) / width, mode="valid")
    below.plot(millions, 100 * comparison.differences, color="tab:gray", linewidth=0.4, label="every step")
    below.plot(millions[width - 1 :], 100 * smooth, color="tab:red", label=f"mean of {width} steps")
    below.axhline(0, color="black", linewidth=0.6)
    for bound in (-0.25, 0.25):
        below.axhline(bound, color="black", linewidth=0.6, linestyle="--")
    below.set_ylim(-1, 1)
    below.set_ylabel(f"({comparison.names[1]} - {comparison.names[0]}) / {comparison.names[0]}, %")
    below.set_xlabel("million tokens")
    below.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def _read_config(workdir: str | Path) -> configuration.RunConfig:
    path = Path(workdir) / "config.json"
    require(path.is_file(), "workdir", str(workdir), "has no config.json; name a directory that launch/train.py wrote")
    return configuration.from_json(path.read_text("utf-8"))


def _unequal_settings(first: configuration.RunConfig, second: configuration.RunConfig) -> dict[str, tuple]:
    """Returns the settings that must be equal and are not, with both values."""
    first, second = _flat(dataclasses.asdict(first)), _flat(dataclasses.asdict(second))
    unequal = {}
    for path in sorted(first.keys() | second.keys()):
        if path not in MAY_DIFFER and first.get(path) != second.get(path):
            unequal[path] = (first.get(path), second.get(path))
    return unequal


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
