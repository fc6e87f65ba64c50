"""The parameters of a training checkpoint, read from disk as they are asked for, never onto a device.

Orbax stores every parameter as a zarr array in an OCDBT store; what is read at one time is what lies in one of its
chunks. A checkpoint whose chunks are single layers and experts is exported with one such block in memory; one that
stored parameters whole has each in host memory once.
"""

import json
import pathlib

import numpy as np
import tensorstore

from dsv3_jax.checkpoint.training import CHECKPOINTS, find_step
from dsv3_jax.config import RunConfig, from_json, require
from dsv3_jax.model import param_specs


class StoredParam:
    """One parameter on disk: indexing reads a block. Not for several threads at once."""

    def __init__(self, store: tensorstore.TensorStore):
        self.shape = tuple(store.shape)
        self._store = store
        self._region, self._values = None, None

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Reads the block at leading indices; the chunk around it stays in memory until another is asked for."""
        chunk = self._store.chunk_layout.read_chunk.shape
        region = tuple(slice(i - i % size, min(i - i % size + size, n)) for i, size, n in zip(index, chunk, self.shape))
        if region != self._region or self._values is None:
            self._values = None  # the previous chunk is freed first
            self._region, self._values = region, self._store[region].read().result()
        return self._values[tuple(i - part.start for i, part in zip(index, region))]


def open_stored_params(
    workdir: str | pathlib.Path, *, step: int | None = None, ema: bool = False
) -> tuple[RunConfig, dict]:
    """Opens the parameters of a checkpoint without reading them.

    Args:
      workdir: directory of a training run or of an import.
      step: optimizer step of the checkpoint; None: the newest.
      ema: the moving average instead of the last weights.

    Returns:
      (configuration saved with the checkpoint, tree of `StoredParam`).

    Raises:
      ValueError: no such checkpoint, no moving average in it, or a damaged one.
    """
    directory = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(find_step(workdir, step))
    item = directory / ("ema" if ema else "params")
    require(item.is_dir(), "ema", ema, f"{directory} holds no {item.name}; train with train.ema_decay > 0, or take "
            "what it holds")  # fmt: skip
    config = _config(directory)
    return config, _open_tree(item, param_specs(config.model), ())


def _config(directory: pathlib.Path) -> RunConfig:
    file = directory / "run" / "metadata"
    try:
        values = json.loads(file.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: holds no configuration ({error}); choose another checkpoint") from error
    return from_json(json.dumps(values))


def _open_tree(item: pathlib.Path, specs: dict, path: tuple[str, ...]) -> dict:
    return {
        name: _open_tree(item, spec, (*path, name))
        if isinstance(spec, dict)
        else _open(item, (*path, name), spec.shape)
        for name, spec in specs.items()
    }


def _open(item: pathlib.Path, path: tuple[str, ...], shape: tuple[int, ...]) -> StoredParam:
    kvstore = {"driver": "ocdbt", "base": f"file://{item}/", "path": ".".join(path) + "/"}
    try:
        stored = StoredParam(tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True).result())
    except ValueError as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"{item}: {'/'.join(path)} cannot be read ({reason}); choose another checkpoint") from error
    require(stored.shape == shape, f"{item}: {'/'.join(path)}", stored.shape, f"its configuration needs {shape}")
    return stored
