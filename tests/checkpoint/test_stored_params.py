"""Parameters read from a checkpoint block by block are those that were saved."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from random_models import BASE, flatten, random_params

from dsv3_jax.checkpoint import training
from dsv3_jax.checkpoint.stored_params import StoredParam, open_stored_params
from dsv3_jax.config import DataConfig, RunConfig, to_json

RUN = RunConfig(model=BASE, data=DataConfig(sequence_length=32))


def test_blocks_equal_what_was_saved(tmp_path):
    params = random_params(BASE)
    training.save_params(tmp_path / "run", RUN, params)
    config, stored = open_stored_params(tmp_path / "run")
    assert config == RUN
    for path, values in flatten(params).items():
        parameter = flatten(stored)[path]
        assert parameter.shape == values.shape
        np.testing.assert_array_equal(parameter[()], values)
        if "layers" in path:
            for layer in range(len(values)):
                np.testing.assert_array_equal(parameter[(layer,)], values[layer])


def test_only_the_chunk_asked_for_is_read(tmp_path):
    """With one expert to a chunk; the store forgets a chunk when another is asked for."""
    values = np.random.default_rng(0).normal(size=(3, 4, 16, 8)).astype(np.float32)
    arguments = {"experts": ocp.SaveArgs(chunk_byte_size=values[0, 0].nbytes, shard_axes=(0, 1))}
    (tmp_path / "run/checkpoints/7/run").mkdir(parents=True)
    (tmp_path / "run/checkpoints/7/run/metadata").write_text(json.dumps({"config": json.loads(to_json(RUN))}))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run/checkpoints/7/params", {"experts": values}, save_args=arguments)
    parameter = _open(tmp_path / "run/checkpoints/7/params", "experts")
    for layer, expert in [(0, 0), (2, 3), (1, 2), (1, 2)]:
        np.testing.assert_array_equal(parameter[(layer, expert)], values[layer, expert])
        assert parameter._values.nbytes == values[0, 0].nbytes


@pytest.mark.parametrize(
    ("arguments", "message"), [({"step": 3}, r"step=3.*\[0\]"), ({"ema": True}, "ema=True.*train.ema_decay")]
)
def test_what_is_not_there_is_named(tmp_path, arguments, message):
    training.save_params(tmp_path / "run", RUN, random_params(BASE))
    with pytest.raises(ValueError, match=message):
        open_stored_params(tmp_path / "run", **arguments)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        open_stored_params(tmp_path / "elsewhere")
    (tmp_path / "run/checkpoints/0/run/metadata").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata.*no configuration"):
        open_stored_params(tmp_path / "run")


def _open(item, name):
    kvstore = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"}
    return StoredParam(tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True).result())
