import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import forward, init_params, logits
from dsv3_jax.train.loss import (
    chunk_columns,
    mean_cross_entropy,
    token_cross_entropy,
    training_loss,
    weighted_cross_entropy,
)

B, T, D, V = 3, 10, 8, 17


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    h_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head_DV = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return h_BTD, head_DV, rng.integers(0, V, (B, T)).astype(np.int32), rng.uniform(size=(B, T)).astype(np.float32)


def numpy_loss_and_gradients(h_BTD, head_DV, targets_BT, weights_BT):
    """Cross-entropy and its gradients, float64, one position after the other."""
    h_BTD, head_DV = np.asarray(h_BTD, np.float64), np.asarray(head_DV, np.float64)
    losses_BT, h_grad, head_grad = np.zeros((B, T)), np.zeros_like(h_BTD), np.zeros_like(head_DV)
    for b in range(B):
        for t in range(T):
            scores_V = h_BTD[b, t] @ head_DV
            probability_V = np.exp(scores_V - scores_V.max())
            probability_V /= probability_V.sum()
            losses_BT[b, t] = -np.log(probability_V[targets_BT[b, t]])
            error_V = probability_V - np.eye(V)[targets_BT[b, t]]
            h_grad[b, t] = weights_BT[b, t] * head_DV @ error_V
            head_grad += weights_BT[b, t] * np.outer(h_BTD[b, t], error_V)
    return losses_BT, h_grad, head_grad


@pytest.mark.parametrize("num_columns", [1, 4, 10])
def test_matches_numpy_with_gradients_whatever_the_chunk(num_columns):
    h_BTD, head_DV, targets_BT, weights_BT = inputs()
    losses_BT, h_grad, head_grad = numpy_loss_and_gradients(h_BTD, head_DV, targets_BT, weights_BT)

    def tripled(h_BTD, head_DV):
        return 3 * weighted_cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, num_columns)

    loss, gradients = jax.value_and_grad(tripled, argnums=(0, 1))(h_BTD, head_DV)
    np.testing.assert_allclose(loss, 3 * np.sum(weights_BT * losses_BT), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], 3 * h_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], 3 * head_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(token_cross_entropy(h_BTD, head_DV, targets_BT, num_columns), losses_BT, rtol=1e-5)


def test_bf16_hidden_states_leave_the_heads_gradient_in_float32():
    h_BTD, head_DV, targets_BT, weights_BT = inputs(jnp.bfloat16)
    _, _, expected = numpy_loss_and_gradients(h_BTD, head_DV.astype(jnp.bfloat16), targets_BT, weights_BT)
    h_grad, head_grad = jax.grad(lambda h, w: weighted_cross_entropy(h, w, targets_BT, weights_BT, 4), argnums=(0, 1))(
        h_BTD, head_DV
    )
    assert (h_grad.dtype, head_grad.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.abs(head_grad - expected).max() < 2**-7 * np.abs(expected).max()  # logit gradients rounded to BF16


def test_logits_of_the_whole_batch_never_exist():
    h_BTD, head_DV, targets_BT, weights_BT = inputs()
    gradient = jax.grad(lambda h, w: weighted_cross_entropy(h, w, targets_BT, weights_BT, 2), argnums=(0, 1))
    program = str(jax.make_jaxpr(gradient)(h_BTD, head_DV))
    assert f"f32[{B},2,{V}]" in program
    assert f"[{B},{T},{V}]" not in program and f"[{B * T},{V}]" not in program


@pytest.mark.parametrize("offset", [1, 2])
def test_mtp_loss_divides_by_all_positions(offset):
    """Equation 24: L_k = -1/T Σ_{i=2+k}^{T+1} log P_k(t_i): T - k terms over T."""
    h_BTD, head_DV, targets_BT, _ = inputs()
    total = 0.0
    for b in range(B):
        tokens = [None, *targets_BT[b]]  # tokens[i] is t_{i+1} of the report, whose sequence starts with t_1
        for i in range(2 + offset, T + 2):
            position = i - offset - 1  # the prediction of t_i at depth k stands at position i - k - 1, counted from 1
            scores_V = np.asarray(h_BTD[b, position - 1], np.float64) @ np.asarray(head_DV, np.float64)
            total -= (scores_V - np.log(np.sum(np.exp(scores_V))))[tokens[i - 1]] / T
    loss = mean_cross_entropy(h_BTD, head_DV=head_DV, targets_BT=targets_BT, chunk_tokens=5 * B, offset=offset)
    np.testing.assert_allclose(loss, total / B, rtol=1e-5)


def test_training_loss_adds_its_parts(micro):
    """The parts are recomputed here from whole logits."""
    params = init_params(micro.model, jax.random.key(0), init_std=0.1)
    tokens = np.random.default_rng(0).integers(0, micro.model.vocab_size, (2, 13)).astype(np.int32)

    @jax.jit
    def compute(params):
        loss = training_loss(micro, params, tokens, mtp_loss_weight=0.3)
        output = forward(micro.model, params, tokens[:, :-1], next_tokens_BT=tokens[:, 1:])
        log_probabilities = [
            jax.nn.log_softmax(logits(micro.model, params, h_BTD)) for h_BTD in (output.h_BTD, output.mtp_h[0])
        ]
        return loss, output, log_probabilities

    (total, (losses, routing)), output, (main_BTV, mtp_BTV) = compute(params)
    main = -np.take_along_axis(np.asarray(main_BTV), tokens[:, 1:, None], -1).mean()
    mtp = -np.take_along_axis(np.asarray(mtp_BTV)[:, :-1], tokens[:, 2:, None], -1).sum() / (2 * 12)
    np.testing.assert_allclose(losses.main, main, rtol=1e-5)
    np.testing.assert_allclose(losses.mtp, mtp, rtol=1e-5)
    np.testing.assert_allclose(total, main + 0.3 * mtp + 0.01 * float(output.balance_loss), rtol=1e-5)
    loads = {name: load.sum() for name, load in routing.tokens_per_expert.items()}
    assert loads == {"moe_layers": 48, "mtp_layers": 48}


@pytest.mark.parametrize(
    ("shape", "chunk_tokens", "expected"),
    [((2, 4096), 2048, 1024), ((1, 4096), 2048, 2048), ((4, 10), 16, 4), ((4, 10), 1, 1), ((1, 7), 99, 7)],
)
def test_a_chunk_holds_about_the_tokens_asked_for(shape, chunk_tokens, expected):
    assert chunk_columns(shape, chunk_tokens) == expected
