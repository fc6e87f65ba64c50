"""AdamW as the report runs it (§3.3.3, §4.2): float32 master weights and arithmetic, moments kept in BF16.

Weight decay follows the usual rule, since the report names only its factor: every matrix decays, embedding, head and
router included; norm weights do not. The router's correction bias is moved by the load (`train.step`), never here.

A BF16 second moment stands still once g² is within about 2^-8 / (1 - b2) of it: 8% at b2 = 0.95, 4% of the step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import TrainConfig

CORRECTION_BIAS = "e_score_correction_bias"
MOMENT_DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}


class AdamWState(NamedTuple):
    """What AdamW remembers; both moments shaped like the parameters."""

    count: jax.Array  # int32, updates applied
    mu: dict
    nu: dict


def adamw(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Builds AdamW; `update(grads, state, params, learning_rate=, grad_scale=)` returns float32 updates to add.

    One elementwise expression per parameter, so that a compiler makes one pass over memory of it. Gradients may be of
    any dtype and are multiplied by grad_scale in float32 (the clipping factor, the mean over accumulated passes).
    """
    moment_dtype = MOMENT_DTYPES[config.adam_moments]

    def init(params: dict) -> AdamWState:
        mu, nu = (jax.tree.map(lambda param: jnp.zeros(param.shape, moment_dtype), params) for _ in range(2))
        return AdamWState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads, state, params, *, learning_rate, grad_scale=1.0):
        count = state.count + 1
        mu_correction = 1 - config.adam_b1 ** count.astype(jnp.float32)
        nu_correction = 1 - config.adam_b2 ** count.astype(jnp.float32)

        def update_one(path, grad, mu, nu, param):
            if path[-1].key == CORRECTION_BIAS:
                return jnp.zeros_like(param), mu, nu
            grad = grad.astype(jnp.float32) * grad_scale
            mu = config.adam_b1 * mu.astype(jnp.float32) + (1 - config.adam_b1) * grad
            nu = config.adam_b2 * nu.astype(jnp.float32) + (1 - config.adam_b2) * jnp.square(grad)
            direction = (mu / mu_correction) / (jnp.sqrt(nu / nu_correction) + config.adam_eps)
            decay = config.weight_decay * param if is_decayed(path) else 0.0
            return -learning_rate * (direction + decay), mu.astype(moment_dtype), nu.astype(moment_dtype)

        combined = jax.tree_util.tree_map_with_path(update_one, grads, state.mu, state.nu, params)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), combined)
        return updates, AdamWState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def is_decayed(path: tuple) -> bool:
    """Returns whether weight decay applies to the parameter at this tree path: to matrices, so not to norms."""
    name = path[-1].key
    return not name.endswith("norm") and name != CORRECTION_BIAS


def global_norm(grads: dict, squares: dict) -> jax.Array:
    """Returns the L2 norm over all gradients but the correction biases', accumulated in float32.

    Args:
      grads: any float dtype.
      squares: in the place of every gradient its sum of squares, float32, where that is known, or None.
    """

    def sum_of_squares(path, grad, known):
        if path[-1].key == CORRECTION_BIAS:
            return jnp.float32(0)
        return jnp.sum(jnp.square(grad.astype(jnp.float32))) if known is None else known

    return jnp.sqrt(sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(sum_of_squares, grads, squares))))


def clip_factor(norm: jax.Array, *, clip_norm: float) -> jax.Array:
    """Returns the factor that brings gradients of this global norm down to at most clip_norm."""
    return jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
