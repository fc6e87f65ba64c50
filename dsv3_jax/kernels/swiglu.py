"""SwiGLU and its derivative, for all that compute them."""

import jax


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) · up; float32 like both."""
    return jax.nn.silu(gate) * up


def swiglu_gradients(gate: jax.Array, up: jax.Array, dhidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of gate and up, given that of silu(gate) · up; all float32 of one shape."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dhidden * up * (sigmoid + silu * (1 - sigmoid)), dhidden * silu
