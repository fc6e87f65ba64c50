"""Every process reads its own rows only, and together they hold the batch that one process would."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import RunConfig, override
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train import batches as batches_module
from dsv3_jax.train.batches import next_batch, rows_of_process
from dsv3_jax.train.step import split_batch

SHAPE_ABT = (3, 8, 13)


class Rows:
    """Stands for TrainBatches: row i of the stream is all i; notes what was read."""

    def __init__(self):
        self.position = 0
        self.read = []

    def next(self, batch_size: int, rows) -> np.ndarray:
        self.read += [self.position + row for row in rows]
        tokens_BT = np.repeat(np.array(rows, np.int32)[:, None] + self.position, SHAPE_ABT[2], axis=1)
        self.position += batch_size
        return tokens_BT


@dataclasses.dataclass(frozen=True)
class Device:
    number: int
    process_index: int


class Layout:
    """Stands for a sharding of passes over the devices of several processes.

    Devices are numbered as in a mesh (shards of the batch, tensor); consecutive ones belong to one process.
    """

    def __init__(self, num_shards: int, num_tensor: int, num_processes: int):
        num_devices = num_shards * num_tensor
        devices = [Device(number, number * num_processes // num_devices) for number in range(num_devices)]
        self._num_shards = num_shards
        self._shards = {device: device.number // num_tensor for device in devices}

    def devices_indices_map(self, shape_ABT) -> dict:
        size = shape_ABT[1] // self._num_shards
        return {
            device: (slice(None), slice(shard * size, (shard + 1) * size), slice(None))
            for device, shard in self._shards.items()
        }


@pytest.fixture
def config(micro) -> RunConfig:
    return override(micro, {"train.batch_size": 24, "train.microbatch_size": 8})


@pytest.mark.parametrize("batch_size", [24, 16, 8])
@pytest.mark.parametrize(
    ("num_shards", "num_tensor", "num_processes"), [(4, 1, 2), (8, 1, 4), (2, 4, 4), (1, 4, 2), (4, 2, 2), (2, 1, 1)]
)
def test_processes_together_hold_the_batch(config, monkeypatch, num_shards, num_tensor, num_processes, batch_size):
    layout = Layout(num_shards, num_tensor, num_processes)
    monkeypatch.setattr(batches_module, "batch_sharding", lambda mesh, leading_dims: layout)
    monkeypatch.setattr(batches_module, "rows_of_process", rows_of_process.__wrapped__)
    whole = split_batch(config, Rows().next(batch_size, range(batch_size)))
    found = np.full(SHAPE_ABT, -1)
    for process in range(num_processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)

        def hold(shape, sharding, read_part, process=process):
            for device, index in sharding.devices_indices_map(shape).items():
                if device.process_index == process:
                    found[index] = read_part(index)

        monkeypatch.setattr(jax, "make_array_from_callback", hold)
        rows = Rows()
        next_batch(config, None, rows, batch_size=batch_size)
        assert len(rows.read) == len(set(rows.read)), "each row once"
        assert len(rows.read) == batch_size * max(1, num_shards // num_processes) // num_shards, "no other row"
        assert rows.position == batch_size
    np.testing.assert_array_equal(found, whole)


def test_one_process_holds_all_rows_of_consecutive_batches(config):
    mesh = make_mesh(config.mesh, devices=jax.devices()[:1])
    rows = Rows()
    for batch_size in (8, 24, 24):
        expected = split_batch(config, np.repeat(np.arange(batch_size)[:, None] + rows.position, 13, axis=1))
        tokens_ABT = next_batch(config, mesh, rows, batch_size=batch_size)
        assert tokens_ABT.dtype == np.int32
        np.testing.assert_array_equal(tokens_ABT, expected)
