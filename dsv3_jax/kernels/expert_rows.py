"""Where tokens lie among the rows of experts: sorted by expert, in the layout of `kernels.grouped_matmul`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.grouped_matmul import group_starts, padded_rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("choice_of_row_M", "row_of_choice_TK", "rows_per_expert_E"),
    meta_fields=("alignment",),
)
@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """The row of every (token, choice) pair and the pair of every row, all int32."""

    choice_of_row_M: jax.Array  # token · K + choice; T · K for a row that holds none
    row_of_choice_TK: jax.Array  # M or more for a choice whose expert is not here
    rows_per_expert_E: jax.Array
    alignment: int  # the rows of every expert begin at a multiple of it

    @property
    def token_of_row_M(self) -> jax.Array:
        """The token of every row; T for a row that holds none."""
        return self.choice_of_row_M // self.row_of_choice_TK.shape[-1]


def plan_rows(experts_TK: jax.Array, *, num_experts: int, alignment: int, max_choices: int) -> ExpertRows:
    """Sorts the (token, choice) pairs by expert, stably.

    Args:
      experts_TK: int32; `num_experts` marks a choice whose expert is not here.
      num_experts: how many are here.
      alignment: the multiple of rows at which every expert's begin.
      max_choices: not less than the pairs whose expert is here, nor than 1 if there is a token; determines the rows.
    """
    num_tokens, top_K = experts_TK.shape
    num_choices = num_tokens * top_K
    num_rows = padded_rows(max_choices, num_experts, alignment)
    experts_P = experts_TK.reshape(-1)
    rows_per_expert_E = jnp.zeros(num_experts, jnp.int32).at[experts_P].add(1)  # what is not here adds nothing
    order_P = jnp.argsort(experts_P, stable=True).astype(jnp.int32)
    first_pair_E = jnp.cumsum(rows_per_expert_E) - rows_per_expert_E
    shift_E = group_starts(rows_per_expert_E, alignment) - first_pair_E
    shift_P = shift_E.at[experts_P[order_P]].get(mode="fill", fill_value=num_rows)
    rows_P = jnp.arange(num_choices, dtype=jnp.int32) + shift_P.astype(jnp.int32)
    choice_of_row_M = jnp.full(num_rows, num_choices, jnp.int32).at[rows_P].set(order_P, unique_indices=True)
    row_of_choice_P = jnp.zeros_like(rows_P).at[order_P].set(rows_P, unique_indices=True)
    return ExpertRows(choice_of_row_M, row_of_choice_P.reshape(num_tokens, top_K), rows_per_expert_E, alignment)


def gather_rows(x_TD: jax.Array, rows: ExpertRows) -> jax.Array:
    """Copies every token to its rows: [M, D], zeros where a row holds none."""
    return jnp.take(x_TD, rows.token_of_row_M, axis=0, mode="fill", fill_value=0)


def gather_weights(weights_TK: jax.Array, rows: ExpertRows) -> jax.Array:
    """Returns the gate weight of every row: [M], zero where a row holds no token."""
    return weights_TK.reshape(-1).at[rows.choice_of_row_M].get(mode="fill", fill_value=0)


def gather_choices(value_M: jax.Array, rows: ExpertRows) -> jax.Array:
    """Returns the value of every choice's row: [T, K], zero for a choice whose expert is not here."""
    return value_M.at[rows.row_of_choice_TK].get(mode="fill", fill_value=0)


def sum_rows(y_MD: jax.Array, rows: ExpertRows) -> jax.Array:
    """Sums the rows of every token in float32, rounded once: [T, D] in y's dtype."""
    return sum(_rows_of_choices(y_MD, rows)).astype(y_MD.dtype)


def sum_weighted_rows(y_MD: jax.Array, weights_TK: jax.Array, rows: ExpertRows) -> jax.Array:
    """Sums the rows of every token with its gate weights in float32, rounded once: [T, D] in y's dtype."""
    weighted = (y_TD * weights_T[:, None] for y_TD, weights_T in zip(_rows_of_choices(y_MD, rows), weights_TK.T))
    return sum(weighted).astype(y_MD.dtype)


def _rows_of_choices(y_MD: jax.Array, rows: ExpertRows) -> list[jax.Array]:
    """Returns for every choice the rows of all tokens, float32 [T, D]."""
    return [y_MD.at[row_T].get(mode="fill", fill_value=0).astype(jnp.float32) for row_T in rows.row_of_choice_TK.T]
