"""What a run says about the exchange of tokens, against arithmetic by hand. Activations: tests/fp8."""

import pytest
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.config import ModelConfig, RunConfig, override
from dsv3_jax.sharding.mesh import AXES
from dsv3_jax.train.activation_memory import exchange_lines


def _mesh(**sizes) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(("precision", "row_bytes"), [("fp8", 7168 + 56 + 8 * 6), ("bf16", 2 * 7168 + 8 * 6)])
def test_a_run_says_what_travels_to_experts(precision, row_bytes):
    """The report's mesh: 2560 rows to each of 7 other nodes, 616 rows of 8 sources to each of 7 other devices."""
    config = override(RunConfig(), {"train.microbatch_size": 64, "model.precision": precision})
    (line,) = exchange_lines(config, _mesh(node=8, gpu=8))
    assert "room for 616 of 4,096 tokens" in line
    assert f"{7 * 2560 * row_bytes / 1e6:,.1f} MB to other nodes" in line
    assert f"{7 * 8 * 616 * row_bytes / 1e6:,.1f} MB inside the node" in line


def test_nothing_is_said_where_no_token_travels():
    config = override(RunConfig(), {"train.microbatch_size": 8})
    assert exchange_lines(config, _mesh(replica=8)) == []
    dense = ModelConfig(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
    assert exchange_lines(RunConfig(model=dense), _mesh(gpu=2)) == []
