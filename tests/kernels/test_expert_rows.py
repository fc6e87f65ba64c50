"""Where (token, choice) pairs lie among the rows of experts, against a plain walk over them."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import grouped_matmul as kernel
from dsv3_jax.kernels.expert_rows import (
    gather_choices,
    gather_rows,
    gather_weights,
    plan_rows,
    sum_rows,
    sum_weighted_rows,
)
from dsv3_jax.testing import shapes

NUM_EXPERTS, TOP_K, ALIGNMENT = 5, 2, 8


def draw_experts(num_tokens, skew):
    """Returns distinct experts for every token; `NUM_EXPERTS` for a choice whose expert is elsewhere."""
    rng = np.random.default_rng(num_tokens)
    first = {
        "even": rng.integers(0, NUM_EXPERTS, num_tokens),
        "one expert": np.zeros(num_tokens, int),
        "last expert": np.full(num_tokens, NUM_EXPERTS - 1),
        "most elsewhere": np.where(rng.random(num_tokens) < 0.8, NUM_EXPERTS, 0),
        "all elsewhere": np.full(num_tokens, NUM_EXPERTS),
    }[skew]
    second = (first + 1 + rng.integers(0, NUM_EXPERTS - 1, num_tokens)) % NUM_EXPERTS
    if "elsewhere" in skew:
        second = np.where(rng.random(num_tokens) < (0.5 if skew == "most elsewhere" else 1), NUM_EXPERTS, second)
    return np.stack([first, second], axis=1).astype(np.int32)


@pytest.mark.parametrize("num_tokens", shapes.ROWS)
@pytest.mark.parametrize("skew", ["even", "one expert", "last expert", "most elsewhere", "all elsewhere"])
def test_every_choice_has_its_own_row_in_its_experts_group(num_tokens, skew):
    """So do tokens, weights and sums that are copied along; rows without a token are zero, choices elsewhere too."""
    experts_TK = draw_experts(num_tokens, skew)
    is_here_TK = experts_TK < NUM_EXPERTS
    max_choices = max(min(1, num_tokens), int(is_here_TK.sum()) + num_tokens % 3)  # exact for some sizes
    rows = plan_rows(jnp.asarray(experts_TK), num_experts=NUM_EXPERTS, alignment=ALIGNMENT, max_choices=max_choices)
    row_of_choice_TK, token_of_row_M = np.asarray(rows.row_of_choice_TK), np.asarray(rows.token_of_row_M)
    num_rows = len(token_of_row_M)
    assert num_rows == kernel.padded_rows(max_choices, NUM_EXPERTS, ALIGNMENT)
    counts_E = np.bincount(experts_TK[is_here_TK], minlength=NUM_EXPERTS)
    np.testing.assert_array_equal(rows.rows_per_expert_E, counts_E)
    start_E = np.concatenate([[0], np.cumsum(-(-counts_E // ALIGNMENT) * ALIGNMENT)])
    expected_row_TK = np.full((num_tokens, TOP_K), -1)
    next_row_E = start_E[:-1].copy()
    for (token, choice), expert in np.ndenumerate(experts_TK):
        if expert < NUM_EXPERTS:
            expected_row_TK[token, choice] = next_row_E[expert]
            next_row_E[expert] += 1
    np.testing.assert_array_equal(row_of_choice_TK[is_here_TK], expected_row_TK[is_here_TK])
    assert (row_of_choice_TK[~is_here_TK] >= num_rows).all()

    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(num_tokens, 3)).astype(np.float32)
    weights_TK = rng.normal(size=(num_tokens, TOP_K)).astype(np.float32)
    expected_x_MD, expected_weights_M = np.zeros((num_rows, 3), np.float32), np.zeros(num_rows, np.float32)
    for (token, choice), row in np.ndenumerate(expected_row_TK):
        if row >= 0:
            expected_x_MD[row], expected_weights_M[row] = x_TD[token], weights_TK[token, choice]
    np.testing.assert_array_equal(gather_rows(jnp.asarray(x_TD), rows), expected_x_MD)
    np.testing.assert_array_equal(gather_weights(jnp.asarray(weights_TK), rows), expected_weights_M)
    choices_TK = np.where(is_here_TK, weights_TK, 0)
    np.testing.assert_array_equal(gather_choices(jnp.asarray(expected_weights_M), rows), choices_TK)
    y_MD = rng.normal(size=(num_rows, 3)).astype(np.float32)
    y_TKD = np.where(is_here_TK[..., None], np.append(y_MD, [[0] * 3], axis=0)[expected_row_TK], 0)
    np.testing.assert_allclose(sum_rows(jnp.asarray(y_MD), rows), y_TKD.sum(axis=1), atol=1e-6)
    weighted_TD = (y_TKD * weights_TK[..., None]).sum(axis=1)
    actual_TD = sum_weighted_rows(jnp.asarray(y_MD), jnp.asarray(weights_TK), rows)
    np.testing.assert_allclose(actual_TD, weighted_TD, atol=1e-6)


def test_sums_are_rounded_once():
    """Three bfloat16 rows whose sum needs more bits between than in the end."""
    experts_TK = jnp.asarray([[0, 1, 2]], jnp.int32)
    rows = plan_rows(experts_TK, num_experts=3, alignment=1, max_choices=3)
    y_MD = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert float(sum_rows(y_MD, rows)[0, 0]) == 258
    assert float(sum_weighted_rows(y_MD, jnp.ones((1, 3)), rows)[0, 0]) == 258
