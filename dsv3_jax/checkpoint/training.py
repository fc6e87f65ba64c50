"""Training checkpoints: what a workdir holds, and how a run finds itself again.

    workdir/config.json           the resolved configuration of the last start
    workdir/checkpoints/<step>/   params, ema, optimizer (Orbax) and run (JSON: configuration, progress)

A checkpoint appears under its final name only once it is whole. Saving copies arrays to the host, then writes while
training goes on.
"""

import errno
import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from dsv3_jax.config import RunConfig, from_json, require, settings, to_json
from dsv3_jax.model import ParamSpec, param_shardings, param_specs
from dsv3_jax.sharding.processes import is_first

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
WEIGHT_ITEMS = {"params", "ema"}
BLOCK_BYTES = 2**28  # largest block of a weight on disk

# A run stays the same run when these change: where and how long it runs, what it shows, when it stops itself, and the
# precision that its float32 parameters are multiplied in.
# Everything else decides which numbers are trained.
FREE_SETTINGS = (
    "mesh.", "data.corpus", "data.prefetch_windows", "data.reader_threads", "model.precision", "model.fp8_",
    "model.remat_policy", "train.num_steps", "train.microbatch_size", "train.loss_chunk_tokens",
    "train.spike_factor", "train.max_bad_steps", "train.log_every_steps", "train.eval_every_steps",
    "train.eval_sequences", "train.checkpoint_every_steps", "train.checkpoints_to_keep",
    "train.checkpoint_keep_every_steps", "train.peak_tflops",
)  # fmt: skip


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Drops what Orbax logs: its failures are raised as well, thread after thread. `--verbosity=1` shows all."""
    return "orbax" not in record.pathname or absl_logging.get_verbosity() >= absl_logging.DEBUG


absl_logging.get_absl_logger().addFilter(_is_worth_showing)


class TrainingCheckpoints:
    """The checkpoints of one workdir, opened for one configuration, which is written into it.

    Several processes open, save, restore and close together; every one writes what its devices hold.

    Raises:
      ValueError: the workdir belongs to another configuration, or holds something else; nothing was changed.
    """

    def __init__(self, workdir: str | Path, config: RunConfig):
        self._workdir = Path(workdir)
        require_same_run(self._workdir, config)
        self._config = config
        if is_first():
            self._workdir.mkdir(parents=True, exist_ok=True)
            _write_config(self._workdir, config)
        self._manager = _open_manager(self._workdir, config)

    def save(self, step: int, trees: dict[str, Any], *, progress: dict) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied, so that they may be donated.

        Args:
          step: optimizer steps finished.
          trees: item name (params, ema, optimizer) -> tree of arrays.
          progress: plain numbers and strings that say where the run stands.

        Raises:
          OSError: this or the checkpoint before could not be written, e.g. on a full disk; older ones stay whole.
        """
        self._require_room(trees)
        run = {"config": json.loads(to_json(self._config)), "progress": progress}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        for name in WEIGHT_ITEMS & trees.keys():
            items[name] = ocp.args.StandardSave(trees[name], save_args=_in_blocks(self._config))
        self._guarded(lambda: self._manager.save(step, args=ocp.args.Composite(**items, run=ocp.args.JsonSave(run))))

    def restore(self, step: int, structs: dict[str, Any]) -> dict[str, Any]:
        """Reads items of a checkpoint straight into the given shardings, on any number of devices.

        Args:
          structs: item name -> tree of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          Item name -> tree of arrays.

        Raises:
          ValueError: the checkpoint is damaged or made by something else.
        """
        return _restore(self._workdir, self._manager, step, structs)

    def wait(self) -> None:
        """Returns once every checkpoint is whole on disk.

        Raises:
          OSError: as `save`.
        """
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for what is being written and lets go of the workdir."""
        self._guarded(self._manager.close)

    def _require_room(self, trees: dict[str, Any]) -> None:
        """Raises the OSError of a full disk before anything is written, where the disk says how full it is."""
        needed = sum(array.nbytes for array in jax.tree.leaves(trees))
        free = shutil.disk_usage(self._workdir).free
        if free < needed:
            reason = f"it takes {needed:,} bytes and {free:,} are free"
            raise self._failed_write(errno.ENOSPC, reason)

    def _failed_write(self, number: int, reason: str) -> OSError:
        left = newest_step(self._workdir)
        return OSError(
            number,
            f"a checkpoint could not be written under {self._workdir / CHECKPOINTS}: {reason}. "
            + (f"The checkpoint of step {left} is whole" if left is not None else "No checkpoint exists")
            + "; make room and start the same command again",
        )

    def _guarded(self, action) -> None:
        """Runs an action of the manager; a failed write becomes one OSError that says what is left."""
        try:
            action()
        except (OSError, ValueError) as error:
            if "os_error_code" not in str(error) and not isinstance(error, OSError):
                raise
            if is_first():
                _remove_unfinished(self._workdir)
            raise self._failed_write(_errno(error), _reason(error)) from error


def newest_step(workdir: str | Path) -> int | None:
    """Returns the step of the newest whole checkpoint in a workdir, None without any."""
    return max(_whole_steps(Path(workdir)), default=None)


def find_step(workdir: str | Path, step: int | None) -> int:
    """Returns the given step, or the newest, of which the workdir holds a whole checkpoint.

    Raises:
      ValueError: it holds none, or not this one.
    """
    steps = _whole_steps(Path(workdir))
    require(bool(steps), "workdir", str(workdir), f"holds no whole checkpoint in {CHECKPOINTS}/; train first")
    require(step is None or step in steps, "step", step, f"no such checkpoint in {workdir}; there are {sorted(steps)}")
    return max(steps) if step is None else step


def saved_items(workdir: str | Path, step: int) -> set[str]:
    """Returns which of params, ema, optimizer and run a checkpoint holds."""
    directory = Path(workdir) / CHECKPOINTS / str(step)
    return {name for name in ("params", "ema", "optimizer", "run") if (directory / name).is_dir()}


def read_run(workdir: str | Path, step: int) -> tuple[RunConfig, dict]:
    """Reads the configuration and the progress that a checkpoint was saved with.

    Raises:
      ValueError: the checkpoint is damaged or made by something else.
    """
    path = Path(workdir) / CHECKPOINTS / str(step) / "run" / "metadata"
    try:
        run = json.loads(path.read_text())
        config, progress = json.dumps(run["config"]), run["progress"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path.parent.parent, f"{path.name} of run: {error}")) from error
    return from_json(config), progress


def require_same_run(workdir: str | Path, config: RunConfig) -> None:
    """Checks that a workdir is new, or holds a run of this configuration; touches nothing.

    A workdir that holds parameters only (`save_params`) starts any run of the same model.

    Raises:
      ValueError: naming every setting that differs with both values, or the file that is no configuration.
    """
    workdir = Path(workdir)
    if not (workdir / CONFIG_FILE).exists():
        require(not (workdir / CHECKPOINTS).exists(), "workdir", str(workdir),
                f"has {CHECKPOINTS}/ but no {CONFIG_FILE}, so it is not a run of this program; "
                "choose another directory")  # fmt: skip
        return
    there = settings_of(_read_config(workdir))
    here = settings_of(config)
    step = newest_step(workdir)
    is_bare = step is not None and "optimizer" not in saved_items(workdir, step)
    differing = [
        path
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
        and not path.startswith(FREE_SETTINGS)
        and (path.startswith("model.") or not is_bare)
    ]
    lines = "\n".join(f"  {path}: {there.get(path)!r} in the workdir, {here.get(path)!r} here" for path in differing)
    require(not differing, "workdir", str(workdir),
            f"holds a run of another configuration:\n{lines}\n"
            "choose another workdir, or set these as they were")  # fmt: skip


def open_params(workdir: str | Path, *, step: int | None = None, ema: bool = False,
                mesh: jax.sharding.Mesh | None = None) -> tuple[RunConfig, dict]:  # fmt: skip
    """Reads the float32 parameters of a checkpoint onto the default device, or the devices of a mesh.

    Args:
      workdir: directory of a training run or of `save_params`.
      step: optimizer step of the checkpoint; None: the newest.
      ema: the moving average instead of the last weights.
      mesh: over whose devices parameters lie as in training; all of its processes call.

    Returns:
      (configuration saved with the checkpoint, parameters).

    Raises:
      ValueError: no such checkpoint, no moving average in it, or a damaged one.
    """
    workdir, step = Path(workdir), find_step(workdir, step)
    item = "ema" if ema else "params"
    require(item in saved_items(workdir, step), "ema", ema,
            f"the checkpoint of step {step} in {workdir} has no moving average; "
            "train with train.ema_decay > 0")  # fmt: skip
    config, _ = read_run(workdir, step)
    structs = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding),
        param_specs(config.model), param_shardings(config.model, mesh),
    )  # fmt: skip
    with _open_manager(workdir, config, read_only=True) as manager:
        return config, _restore(workdir, manager, step, {item: structs})[item]


def save_params(workdir: str | Path, config: RunConfig, params: dict) -> None:
    """Makes a workdir around float32 parameters from elsewhere; training in it starts from them at step 0.

    Raises:
      ValueError: the workdir exists and is not empty.
      OSError: it could not be written.
    """
    workdir = Path(workdir)
    is_free = not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir()))
    require(is_free, "workdir", str(workdir), "exists and is not empty; choose another directory")
    checkpoints = TrainingCheckpoints(workdir, config)
    checkpoints.save(0, {"params": params}, progress={})
    checkpoints.close()


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Returns a configuration as dotted path -> value, settings of an absent section left out."""
    found = {}
    for setting in settings():
        section: Any = config
        for name in setting.path.split("."):
            section = getattr(section, name) if section is not None else None
        if section is not None:
            found[setting.path] = section
    return found


def _in_blocks(config: RunConfig) -> dict:
    """Says how weights lie on disk: one block per layer and expert, so that an export reads one at a time."""

    def blocks(spec: ParamSpec) -> ocp.SaveArgs:
        is_stacked = itertools.takewhile(lambda axis: axis in ("layers", "routed_experts"), spec.axes[:-1])
        return ocp.SaveArgs(chunk_byte_size=BLOCK_BYTES, shard_axes=tuple(range(len(list(is_stacked)))))

    return jax.tree.map(blocks, param_specs(config.model))


def _open_manager(workdir: Path, config: RunConfig, *, read_only: bool = False) -> ocp.CheckpointManager:
    keep_every = config.train.checkpoint_keep_every_steps
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else config.train.checkpoints_to_keep,
        keep_period=keep_every if keep_every and not read_only else None,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
    )
    return ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options)


def _restore(workdir: Path, manager: ocp.CheckpointManager, step: int, structs: dict) -> dict:
    directory = workdir / CHECKPOINTS / str(step)
    missing = structs.keys() - saved_items(workdir, step)
    if missing:
        raise ValueError(_damaged(directory, f"no {', '.join(sorted(missing))} in it"))
    items = {name: ocp.args.StandardRestore(tree) for name, tree in structs.items()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise ValueError(_damaged(directory, _reason(error))) from error
    return {name: restored[name] for name in structs}


def _damaged(directory: Path, reason: str) -> str:
    return (
        f"checkpoint={str(directory)!r}: cannot be read ({reason}); it is damaged or not of this program; "
        "remove the directory to go on from the checkpoint before"
    )


def _whole_steps(workdir: Path) -> set[int]:
    directory = workdir / CHECKPOINTS
    if not directory.is_dir():
        return set()
    return {int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir()}


def _remove_unfinished(workdir: Path) -> None:
    for entry in (workdir / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(entry)


def _read_config(workdir: Path) -> RunConfig:
    path = workdir / CONFIG_FILE
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _write_config(workdir: Path, config: RunConfig) -> None:
    temporary = workdir / f".{CONFIG_FILE}.tmp"
    temporary.write_text(to_json(config))
    os.replace(temporary, workdir / CONFIG_FILE)


def _errno(error: Exception) -> int:
    """Returns the operating system's number of a failed write; TensorStore puts it into the text of a ValueError."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    _, _, code = str(error).partition("os_error_code='")
    return int(code.partition("'")[0]) if code else errno.EIO


def _reason(error: Exception) -> str:
    """Returns the operating system's words for a failed write, else the first line of the error."""
    if isinstance(error, OSError) or "os_error_code" in str(error):
        return os.strerror(_errno(error))
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
