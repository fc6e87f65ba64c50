import jax
import numpy as np
import pytest

from dsv3_jax.data import EvaluationBatch
from dsv3_jax.model import forward, init_params, logits
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train.evaluate import Score, make_score_tokens, score_sources, sliding_windows, total


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 10, 12, 13, 14, 40, 41])
@pytest.mark.parametrize("sequence_length", [1, 8, 9])
def test_every_token_but_the_first_is_predicted_once_with_half_a_window_before_it(num_tokens, sequence_length):
    tokens = np.arange(100, 100 + num_tokens, dtype=np.int32)
    batches = list(sliding_windows(tokens, num_bytes=77, sequence_length=sequence_length, batch_size=3))
    predicted = []
    for batch in batches:
        assert batch.tokens_BT.shape == (3, sequence_length + 1) and batch.weights_BT.shape == (3, sequence_length)
        for row, weights in zip(batch.tokens_BT, batch.weights_BT):
            for position in np.flatnonzero(weights):
                predicted.append(row[position + 1])
                index = row[position + 1] - 100
                context = position + 1
                assert context >= min(index, sequence_length // 2)
                np.testing.assert_array_equal(row[:context], tokens[index - context : index])
    assert predicted == tokens[1:].tolist()
    assert sum(batch.num_bytes_B.sum() for batch in batches) == 77


def test_scores_are_those_of_whole_logits(micro):
    mesh = make_mesh(micro.mesh)
    params = init_params(micro.model, jax.random.key(1), init_std=0.2)
    rng = np.random.default_rng(0)
    batches = [
        EvaluationBatch(
            rng.integers(0, 61, (2, 11)).astype(np.int32), rng.integers(0, 2, (2, 10)).astype(np.float32),
            np.array(num_bytes), np.array(source, np.int32),
        )
        for num_bytes, source in (([30, 1], [0, 2]), ([12, 5], [2, 2]))
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        score_tokens = make_score_tokens(micro.model, mesh, chunk_tokens=6)
        scores = score_sources(score_tokens, params, batches, num_sources=3)
    whole = jax.jit(lambda tokens: logits(micro.model, params, forward(micro.model, params, tokens).h_BTD))
    nats, count = np.zeros(3), np.zeros(3, int)
    for batch in batches:
        log_probabilities = np.asarray(jax.nn.log_softmax(whole(batch.tokens_BT[:, :-1])), np.float64)
        chosen = np.take_along_axis(log_probabilities, batch.tokens_BT[:, 1:, None], -1)[..., 0]
        for row, source in enumerate(batch.source_B):
            nats[source] -= np.sum(chosen[row] * batch.weights_BT[row])
            count[source] += int(batch.weights_BT[row].sum())
    assert [score.num_bytes for score in scores] == [30, 0, 18]
    assert [score.num_tokens for score in scores] == count.tolist()
    assert [score.nats for score in scores] == pytest.approx(nats.tolist(), rel=1e-5)
    together = total(scores)
    assert (together.num_bytes, together.num_tokens) == (48, count.sum())
    assert together.nats == pytest.approx(nats.sum(), rel=1e-5)


def test_bits_per_byte_and_perplexity_follow_from_nats():
    score = Score(num_bytes=100, num_tokens=25, nats=200 * np.log(2))
    assert score.bits_per_byte == pytest.approx(2.0)
    assert score.perplexity == pytest.approx(2**8)
