import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import TrainConfig
from dsv3_jax.train.optimizer import adamw, clip_factor, global_norm

CONFIG = TrainConfig(adam_moments="fp32", learning_rate=0.01)


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"o_proj": (3, 4, 5), "norm": (4,), "input_layernorm": (2, 4), "e_score_correction_bias": (2, 6)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run(config: TrainConfig, params: dict, grads: list[dict], learning_rate: float):
    optimizer = adamw(config)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params, learning_rate=learning_rate, grad_scale=0.5)
        params = optax.apply_updates(params, updates)
    return params, state


def numpy_adamw(param, grads, *, learning_rate, decay):
    param, mu, nu = param.astype(np.float64), 0.0, 0.0
    for count, grad in enumerate(grads, start=1):
        grad = grad.astype(np.float64) * 0.5
        mu, nu = 0.9 * mu + 0.1 * grad, 0.95 * nu + 0.05 * grad**2
        direction = mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.95**count)) + 1e-8)
        param = param - learning_rate * (direction + decay * param)
    return param


def test_matches_float64_adamw_that_decays_matrices_only():
    params, grads = draw(0), [draw(seed) for seed in range(1, 7)]
    trained, _ = run(CONFIG, params, grads, 0.01)
    for name, decay in [("o_proj", 0.1), ("norm", 0.0), ("input_layernorm", 0.0)]:
        expected = numpy_adamw(params[name], [grad[name] for grad in grads], learning_rate=0.01, decay=decay)
        np.testing.assert_allclose(trained[name], expected, rtol=2e-6, atol=1e-7)  # float32 rounding of six steps


def test_matches_optax_adamw_in_float32():
    params, grads = draw(0), [draw(seed) for seed in range(1, 7)]
    trained, _ = run(CONFIG, params, grads, 0.01)
    mask = {"o_proj": True, "norm": False, "input_layernorm": False, "e_score_correction_bias": False}
    oracle = optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
    expected, state = params, oracle.init(params)
    for grad in grads:
        updates, state = oracle.update(jax.tree.map(lambda g: 0.5 * g, grad), state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in ("o_proj", "norm", "input_layernorm"):
        np.testing.assert_allclose(trained[name], expected[name], rtol=2e-6, atol=1e-7)


def test_correction_bias_is_not_optimized():
    params, grads = draw(0), [draw(1)]
    trained, state = run(CONFIG, params, grads, 0.01)
    np.testing.assert_array_equal(trained["e_score_correction_bias"], params["e_score_correction_bias"])
    assert not np.any(state.mu["e_score_correction_bias"])


def test_bf16_moments_stay_near_float32_ones():
    config = TrainConfig(adam_moments="bf16")
    params, grads = draw(0), [draw(seed) for seed in range(1, 40)]
    trained, state = run(config, params, grads, 0.01)
    exact, exact_state = run(CONFIG, params, grads, 0.01)
    assert state.mu["o_proj"].dtype == state.nu["o_proj"].dtype == jnp.bfloat16
    # Rounding to 2^-9 every step, remembered for 1 / (1 - 0.95) = 20 steps.
    np.testing.assert_allclose(state.nu["o_proj"].astype(np.float32), exact_state.nu["o_proj"], rtol=20 * 2**-9)
    distance = np.abs(trained["o_proj"] - params["o_proj"]).mean()
    assert np.abs(trained["o_proj"] - exact["o_proj"]).mean() < 0.02 * distance


@pytest.mark.parametrize("start", [1e-4, 1e4])
def test_bf16_second_moment_does_not_stall(start):
    """From far below or far above, nu comes as near to a constant g² as one BF16 rounding allows: 2^-8 / 0.05."""
    optimizer = adamw(TrainConfig(adam_moments="bf16"))
    params = {"kernel": jnp.zeros((1000,))}
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).uniform(0.5, 2.0, 1000), jnp.float32)}
    state = optimizer.init(params)._replace(nu={"kernel": jnp.full((1000,), start, jnp.bfloat16)})

    def step(_, state):
        return optimizer.update(grads, state, params, learning_rate=0.0)[1]

    state = jax.jit(lambda state: jax.lax.fori_loop(0, 400, step, state))(state)
    distance = np.abs(1 - np.square(grads["kernel"]) / np.asarray(state.nu["kernel"], np.float32))
    assert distance.max() <= 2**-8 / 0.05


def test_bf16_moments_refuse_decays_that_would_stall():
    with pytest.raises(ValueError, match=r"train\.adam_b2=0\.999.*adam_moments=fp32"):
        TrainConfig(adam_b2=0.999)


def test_global_norm_clips_without_the_correction_bias():
    grads = {"kernel": jnp.full((4,), 3.0, jnp.bfloat16), "e_score_correction_bias": jnp.full((9,), 100.0)}
    norm = global_norm(grads, dict.fromkeys(grads))
    assert float(norm) == 6.0
    assert float(clip_factor(norm, clip_norm=1.5)) == 0.25
    assert float(clip_factor(norm, clip_norm=7.0)) == 1.0
    assert float(global_norm(grads, {"kernel": jnp.float32(49), "e_score_correction_bias": None})) == 7.0
