"""Experts in slots: refused placements, and one device that holds all slots."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax import model
from dsv3_jax.config import MeshConfig
from dsv3_jax.serve import on_mesh, placed_params
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import random_tokens, small_config, telling_params

CONFIG = small_config(num_nextn_predict_layers=0, n_redundant_experts=4)  # 2 layers of 8 experts
PLACEMENT = np.array([[3, 1, 2, 0, 4, 5, 6, 7, 3, 3, 0, 7], [7, 6, 5, 4, 3, 2, 1, 0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("redundant", "placement", "message"),
    [
        (4, None, r"expert_of_slot=None: model.n_redundant_experts=4 need a placement"),
        (4, PLACEMENT[:, :11], r"expert_of_slot=\(2, 11\): must be \[MoE layers, slots\] = \[2, 12\]"),
        (4, PLACEMENT[:1], r"expert_of_slot=\(1, 12\): must be \[MoE layers, slots\] = \[2, 12\]"),
        (4, np.minimum(PLACEMENT, 6), r"expert_of_slot\[0\]=\[7\]: every expert from 0 to 7 must have a slot"),
        (0, PLACEMENT[:, :8], r"expert_of_slot=\(2, 8\): .*with model.n_redundant_experts > 0"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(mesh, redundant, placement, message):
    config = dataclasses.replace(CONFIG, n_redundant_experts=redundant)
    place = placed_params.make_placement(config, mesh, for_decoding=False)
    with pytest.raises(ValueError, match=message):
        place({}, placement)


def test_copies_change_no_logits_on_one_device(mesh):
    params, tokens_BT = telling_params(CONFIG, 0), random_tokens(CONFIG, 1, 3, 8)
    lengths_B = np.array([8, 3, 5], np.int32)
    cache = model.init_cache(CONFIG, 3, 8)
    expected, _, _ = jax.jit(model.prefill, static_argnums=0)(CONFIG, params, tokens_BT, lengths_B, cache)
    placed = placed_params.make_placement(CONFIG, mesh, for_decoding=False)(params, PLACEMENT)
    prefill = on_mesh.make_prefill(CONFIG, mesh, batch_size=3, length=8)
    found, _, _ = prefill(placed, tokens_BT, lengths_B, on_mesh.make_cache(CONFIG, mesh, batch_size=3, max_length=8))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
