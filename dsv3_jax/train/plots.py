"""Draws a run's metrics: loss and held-out bits per byte, and how evenly the experts are loaded."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.train.metrics import read_records

matplotlib.use("Agg")


def write_plots(workdir: str | Path) -> list[Path]:
    """Writes loss.png and, for a model with experts, expert_load.png into the workdir; returns their paths.

    Without metrics of training steps there is nothing to draw.
    """
    records = read_records(workdir)
    train = [record for record in records if record["kind"] == "train" and record["loss"] is not None]
    heldout = [record for record in records if record["kind"] == "heldout"]
    if not train:
        return []
    paths = [_write(Path(workdir) / "loss.png", lambda axes: draw_loss(axes, train, heldout))]
    if "expert_load_max_over_mean" in train[0]:
        paths.append(_write(Path(workdir) / "expert_load.png", lambda axes: draw_expert_load(axes, train)))
    return paths


def draw_loss(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    """Draws training losses in nats per token, and held-out bits per byte on a second scale."""
    steps = [record["step"] for record in train]
    lines = axes.plot(steps, [record["loss"] for record in train], color="tab:blue", label="next token")
    if any(record["mtp_loss"] for record in train):
        losses = [record["mtp_loss"] for record in train]
        lines += axes.plot(steps, losses, color="tab:cyan", label="multi-token prediction")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    if heldout:
        bits = [record["bits_per_byte"] for record in heldout]
        right = axes.twinx()
        lines += right.plot(
            [record["step"] for record in heldout], bits, color="tab:red", marker="o", label="held-out text"
        )
        right.set_ylabel("bits per byte")
        axes.set_title(f"held-out text: {bits[0]:.3f} → {bits[-1]:.3f} bits per byte")
    axes.legend(handles=lines)


def draw_expert_load(axes: Axes, train: list[dict]) -> None:
    """Draws the load of the most and the least loaded expert of every layer, relative to the mean.

    On a second scale: the further rounds of the expert exchange, if there were any.
    """
    steps = [record["step"] for record in train]
    layers = list(train[0]["expert_load_max_over_mean_by_layer"])
    colors = matplotlib.colormaps["viridis"].resampled(max(len(layers), 2))
    for index, layer in enumerate(layers):
        for side in ("max", "min"):
            loads = [record[f"expert_load_{side}_over_mean_by_layer"][layer] for record in train]
            axes.plot(steps, loads, color=colors(index), label=layer if side == "max" else None)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens of the most and least loaded expert / mean")
    axes.set_ylim(bottom=0)
    rounds = [record.get("exchange_further_rounds", 0) for record in train]  # older lines of a workdir tell none
    if any(rounds):
        right = axes.twinx()
        right.plot(steps, rounds, color="tab:red", linewidth=0.8)
        right.set_ylabel("further rounds of the expert exchange in a step, all layers", color="tab:red")
        right.set_ylim(bottom=0)
    if len(layers) <= 12:
        axes.legend()


def _write(path: Path, draw) -> Path:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure.add_subplot())
    figure.savefig(path, dpi=120)
    return path
