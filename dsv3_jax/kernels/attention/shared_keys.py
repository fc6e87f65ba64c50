"""Keys of which every head has some columns of its own, and all heads share the rest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Widths(NamedTuple):
    """Numbers of columns, and where they are in a head's queries and keys and in its own part of keys beside values."""

    own: int
    rope: int
    value: int

    @property
    def own_columns(self) -> slice:
        return slice(0, self.own)

    @property
    def rope_columns(self) -> slice:
        return slice(self.own, self.own + self.rope)

    @property
    def value_columns(self) -> slice:
        return slice(self.own, self.own + self.value)


def widths(q_BTNX: jax.Array, kv_BTNY: jax.Array, k_rope_BTR: jax.Array) -> Widths:
    """Returns the widths that the shapes of the operands of `causal_attention` say; the value's may be negative."""
    own = q_BTNX.shape[-1] - k_rope_BTR.shape[-1]
    return Widths(own, k_rope_BTR.shape[-1], kv_BTNY.shape[-1] - own)


def keys_and_values(kv_BTNY: jax.Array, k_rope_BTR: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns whole keys [B, T, N, width] and values [B, T, N, U], given the operands of `causal_attention`."""
    k_nope, v_BTNU = jnp.split(kv_BTNY, [width - k_rope_BTR.shape[-1]], axis=-1)
    k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*k_nope.shape[:-1], k_rope_BTR.shape[-1]))
    return jnp.concatenate([k_nope, k_rope_BTNR], axis=-1), v_BTNU


def sum_over_heads(dk_rope_BTNR: jax.Array) -> jax.Array:
    """Returns the gradient of the shared columns, summed in float32 and rounded once."""
    return jnp.sum(dk_rope_BTNR, axis=2, dtype=jnp.float32).astype(dk_rope_BTNR.dtype)
