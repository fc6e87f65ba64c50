"""A batch as arrays on the devices. Every process reads only the rows that its own devices compute."""

import functools

import jax
import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.data import TrainBatches
from dsv3_jax.sharding.rules import batch_sharding


def next_batch(config: RunConfig, mesh: jax.sharding.Mesh, batches: TrainBatches, *, batch_size: int) -> jax.Array:
    """Reads the next batch and moves it to the devices, arranged as passes.

    Which row stands where does not depend on the processes.

    Args:
      config: its passes: A those of the largest batch, each of `rows_per_pass` rows.
      mesh: over whose devices the rows of a pass are spread.
      batches: moves on by batch_size windows.
      batch_size: rows of all passes together.

    Returns:
      int32 [A, rows_per_pass, T+1], unused passes zero.
    """
    shape_ABT = (config.train.max_passes, config.train.rows_per_pass, config.data.sequence_length + 1)
    sharding = batch_sharding(mesh, leading_dims=1)
    own_rows = rows_of_process(sharding, shape_ABT, process=jax.process_index())
    first_of_pass = range(0, batch_size, config.train.rows_per_pass)
    tokens_BT = batches.next(batch_size, [first + row for first in first_of_pass for row in own_rows])
    tokens_AbT = np.zeros((config.train.max_passes, len(own_rows), tokens_BT.shape[1]), np.int32)
    tokens_AbT[: len(first_of_pass)] = tokens_BT.reshape(-1, *tokens_AbT.shape[1:])

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        rows = range(*index[1].indices(shape_ABT[1]))
        first = own_rows.index(rows[0])
        return tokens_AbT[:, first : first + len(rows)]

    return jax.make_array_from_callback(shape_ABT, sharding, read_part)


@functools.cache
def rows_of_process(sharding: jax.sharding.Sharding, shape_ABT: tuple[int, ...], *, process: int) -> tuple[int, ...]:
    """Returns the rows of a pass that a process's devices hold, in ascending order, each once."""
    parts = sharding.devices_indices_map(shape_ABT).items()
    ranges = {index[1].indices(shape_ABT[1]) for device, index in parts if device.process_index == process}
    return tuple(sorted({row for bounds in ranges for row in range(*bounds)}))


def place_rows(mesh: jax.sharding.Mesh, tokens_BT: np.ndarray) -> jax.Array:
    """Moves sequences, the same in every process, to the devices that compute them."""
    return jax.make_array_from_callback(tokens_BT.shape, batch_sharding(mesh), lambda index: tokens_BT[index])
