"""What a run shows: metrics.jsonl and TensorBoard events in the workdir, one live line on the screen."""

import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dsv3_jax.config import RunConfig
from dsv3_jax.train.flops import train_flops_per_token
from dsv3_jax.train.schedule import StepSettings

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EXPERT_STACKS = {"moe_layers": "MoE layer", "mtp_layers": "MTP module"}


class RunLog:
    """Writes records to metrics.jsonl, one JSON object per line, and their numbers to TensorBoard.

    Lines past the step that the run starts from are dropped, so that repeated steps appear once.
    """

    def __init__(self, workdir: str | Path, *, start_step: int):
        self._path = Path(workdir) / METRICS_FILE
        _keep_lines_until(self._path, start_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, lives as long as the run
        self._tensorboard = _TensorBoard(Path(workdir) / TENSORBOARD, start_step)

    def write(self, record: dict) -> None:
        """Appends a record with `kind` and `step`, flushed; numbers that are not finite become null.

        Raises:
          OSError: it cannot be written, e.g. on a full disk; names the file.
        """
        line = json.dumps({name: _finite_or_none(value) for name, value in record.items()}) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
            self._tensorboard.write(record)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; make room and start the same command again",
                          str(self._path)) from error  # fmt: skip

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


class NoLog:
    """Writes nothing: the log of a process that is not the first."""

    def write(self, record: dict) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    """Writes the numbers of records as TensorBoard events, in the calling thread.

    tensorboardX's SummaryWriter hands them to a thread; when that one dies of a full disk, its caller waits forever.
    """

    FLUSH_SECONDS = 20

    def __init__(self, directory: Path, start_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))
        restart = SessionLog(status=SessionLog.START)  # TensorBoard forgets earlier events from this step on
        self._events.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=restart))
        self._flushed = time.monotonic()

    def write(self, record: dict) -> None:
        values = [
            Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in ("kind", "step") and isinstance(value, int | float)
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        self._events.write_event(event)
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def read_records(workdir: str | Path) -> list[dict]:
    """Reads metrics.jsonl; a last line cut short by a kill is left out."""
    path = Path(workdir) / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Throughput:
    """Measures tokens per second between calls, and what follows from it."""

    def __init__(self, config: RunConfig, *, num_devices: int):
        self._flops_per_token = train_flops_per_token(config.model, sequence_length=config.data.sequence_length)
        self._peak_flops = config.train.peak_tflops * 1e12 * num_devices
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last call: compilation, evaluation and saving are no training."""
        self._last_time, self._tokens = None, 0

    def measure(self, tokens: int, *, is_due: bool) -> dict:
        """Counts tokens of a finished step; when due, returns tokens_per_second and model_flops_utilization.

        Both are None for the first step after a restart, the utilization also without `train.peak_tflops`.
        """
        if self._last_time is None:
            self._last_time = time.perf_counter()
            return {"tokens_per_second": None, "model_flops_utilization": None}
        self._tokens += tokens
        if not is_due:
            return {}
        seconds = time.perf_counter() - self._last_time
        rate = self._tokens / seconds
        self._last_time, self._tokens = self._last_time + seconds, 0
        utilization = rate * self._flops_per_token / self._peak_flops if self._peak_flops else None
        return {"tokens_per_second": rate, "model_flops_utilization": utilization}


def step_record(step: int, *, tokens: int, settings: StepSettings, metrics: dict) -> dict:
    """Returns the record of a finished step.

    Args:
      step: steps finished, this one included.
      tokens: tokens trained, this step included.
      settings: what the step ran with.
      metrics: of `train.step.make_train_step`, fetched to the host.

    Returns:
      kind, step, tokens, every scalar metric, the settings, and how unevenly the experts were loaded. Of these
      exchange_further_rounds says what an uneven load cost: 0 on one device and whenever all tokens found room at once.
    """
    relative_load = {
        f"{EXPERT_STACKS[stack]} {layer}": load_E / load_E.mean()
        for stack, load_LE in metrics["tokens_per_expert"].items()
        for layer, load_E in enumerate(np.asarray(load_LE, np.float64))
    }
    scalars = {name: np.asarray(value).item() for name, value in metrics.items() if name != "tokens_per_expert"}
    record = {"kind": "train", "step": step, "tokens": tokens, **scalars}
    record |= {
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "mtp_loss_weight": settings.mtp_loss_weight,
        "bias_update_speed": settings.bias_update_speed,
    }
    if relative_load:
        largest = {name: round(load_E.max(), 4) for name, load_E in relative_load.items()}
        record["expert_load_max_over_mean"] = max(largest.values())
        record["expert_load_max_over_mean_by_layer"] = largest
        record["expert_load_min_over_mean_by_layer"] = {
            name: round(load_E.min(), 4) for name, load_E in relative_load.items()
        }
    return record


def fetch(metrics: dict) -> dict:
    """Brings a step's metrics to the host; returns once that step has run."""
    return jax.device_get(metrics)


def remaining_tokens(config: RunConfig, *, step: int, tokens: int, batch_size: int) -> int:
    """Returns the tokens still to train, batches staying as they are."""
    if config.train.num_steps:
        return (config.train.num_steps - step) * batch_size * config.data.sequence_length
    return config.train.schedule_tokens - tokens


def progress_line(config: RunConfig, record: dict) -> str:
    """Says in one line how a run stands."""
    total = f"/{config.train.num_steps}" if config.train.num_steps else ""
    parts = [f"step {record['step']}{total}", f"loss {record['loss']:.4f}"]
    rate = record["tokens_per_second"]
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if record["model_flops_utilization"] is not None:
        parts.append(f"MFU {record['model_flops_utilization']:.1%} of {config.train.peak_tflops:g} TFLOP/s")
    if "expert_load_max_over_mean" in record:
        parts.append(f"expert load max/mean {record['expert_load_max_over_mean']:.2f}")
    parts += [f"lr {record['learning_rate']:.2e}", f"grad norm {record['grad_norm']:.2f}"]
    if record["exchange_further_rounds"]:
        parts.append(f"further exchange rounds {record['exchange_further_rounds']}")
    if record["bad_steps"]:
        parts.append(f"bad steps {record['bad_steps']}")
    if rate is not None:
        left = remaining_tokens(config, step=record["step"], tokens=record["tokens"], batch_size=record["batch_size"])
        parts.append(f"ETA {_clock(left / rate)}")
    return "  ".join(parts)


class Screen:
    """Shows one live line on a terminal; elsewhere prints every line."""

    def __init__(self):
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def show(self, line: str) -> None:
        """Replaces the live line."""
        if self._live:
            self._live.update(Text(line))
        else:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        if self._live:
            self._console.print(Text(line))
        else:
            print(line, flush=True)


class SilentScreen(Screen):
    """Shows nothing: the screen of a process that is not the first."""

    def __init__(self):
        self._live = None

    def show(self, line: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def _keep_lines_until(path: Path, step: int) -> None:
    """Rewrites a JSONL file without lines past the step and without a line cut short, atomically."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
