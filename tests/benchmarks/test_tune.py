"""What launch/tune.py makes of its arguments, and that every operation can be set up."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from dsv3_jax.kernels.fp8_matmul.tuned import FewRowsTile
from dsv3_jax.kernels.scaled_matmul import Tile

PATH = pathlib.Path(__file__).parents[2] / "launch/tune.py"


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("tune_command", PATH)
    module = importlib.util.module_from_spec(spec)
    before = set(flags.FLAGS)
    spec.loader.exec_module(module)
    yield module
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_a_tile_is_what_the_text_says_and_prints_as_its_expression(tune):
    tile = tune.change(Tile(), "raster_rows=12,warpgroups=2")
    assert (tile.warpgroups, tile.raster_rows, tile.stages) == (2, 12, Tile().stages)
    assert tune.expression(tile) == "Tile(warpgroups=2, raster_rows=12)"
    few = tune.change(FewRowsTile(columns=64), "fence=1")
    assert eval(tune.expression(few)) == FewRowsTile(columns=64, fence=True)


@pytest.mark.parametrize("text", ["width=3", "stages", "stages=two"])
def test_a_text_that_is_no_tile_is_refused(tune, text):
    with pytest.raises(ValueError, match="must be NAME=INTEGER, NAME one of warpgroups"):
        tune.change(Tile(), text)


def test_every_operation_takes_the_operands_of_its_sizes(tune):
    for name in tune.OPERATIONS:
        held, operands, multiply, tile = tune.operation(name)
        contest = held[0]
        result = jax.eval_shape(lambda *arrays, f=multiply, t=tile: f(*arrays, tile=t), *contest.types[operands])
        assert result.dtype == (jnp.float32 if name.endswith("weight_gradient") else jnp.bfloat16), name
