"""Documents packed with segment masks are trained and scored as if each stood alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.model import document_starts, forward, rope
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.testing.networks import QUICK_COMPILE, small_config, telling_params
from dsv3_jax.train.evaluate import make_score_tokens
from dsv3_jax.train.loss import training_loss

BOS, LENGTH = 0, 16
# Where documents begin in rows of 17 tokens. A row that begins in the middle of a document has no bos there.
STARTS = [[6, 7], [0, 2, 16], []]


def packed_tokens() -> np.ndarray:
    tokens_BT1 = np.random.default_rng(0).integers(1, 61, (len(STARTS), LENGTH + 1)).astype(np.int32)
    for row, starts in enumerate(STARTS):
        tokens_BT1[row, starts] = BOS
    return tokens_BT1


def documents_alone(tokens_BT1: np.ndarray) -> list[np.ndarray]:
    return [piece for row, starts in enumerate(STARTS) for piece in np.split(tokens_BT1[row], starts) if len(piece)]


def losses_alone(model, params, documents, depth):
    """Sums -log P of every depth's targets, every document alone in its row, with junk behind it that none sees."""
    rows = np.full((len(documents), LENGTH + 1 + depth), 7, np.int32)
    for row, document in zip(rows, documents):
        row[: len(document)] = document
    lengths = np.array([len(document) for document in documents])
    output = forward(model, params, rows[:, :LENGTH], next_tokens_BT=rows[:, 1 : LENGTH + 1])
    sums = []
    for k, h_BTD in enumerate((output.h_BTD, *output.mtp_h)):
        head_DV = params["lm_head"].astype(h_BTD.dtype).astype(jnp.float32)
        logits_BTV = jnp.dot(h_BTD.astype(jnp.float32), head_DV, precision="highest")
        log_probability_BTV = jax.nn.log_softmax(logits_BTV)
        targets_BT = rows[:, 1 + k : 1 + k + LENGTH]
        log_probability_BT = jnp.take_along_axis(log_probability_BTV, targets_BT[..., None], -1)[..., 0]
        sums.append(-jnp.sum(log_probability_BT, where=np.arange(LENGTH) < lengths[:, None] - 1 - k))
    return sums


@pytest.fixture(scope="module")
def segmented(micro):
    model = small_config(num_nextn_predict_layers=2, max_position_embeddings=LENGTH)
    data = dataclasses.replace(micro.data, sequence_length=LENGTH, segment_masks=True)
    train = dataclasses.replace(micro.train, balance_loss_alpha=0.0, loss_chunk_tokens=12)
    return dataclasses.replace(micro, model=model, data=data, train=train)


def test_document_starts_follow_the_bos_tokens():
    starts_BT = document_starts(packed_tokens(), BOS)
    for row, starts in enumerate(STARTS):
        expected = [max([0, *(start for start in starts if start <= t)]) for t in range(LENGTH + 1)]
        assert starts_BT[row].tolist() == expected


def test_loss_and_gradients_are_those_of_the_documents_alone(segmented):
    config = dataclasses.replace(segmented, model=dataclasses.replace(segmented.model, remat_policy="report"))
    params, tokens_BT1 = telling_params(config.model, 0), packed_tokens()
    documents = documents_alone(tokens_BT1)
    assert sorted(map(len, documents)) == [1, 1, 2, 6, 10, 14, 17]

    def packed(params):
        return training_loss(config, params, tokens_BT1, mtp_loss_weight=0.3)

    def alone(params):
        main, *mtp = losses_alone(segmented.model, params, documents, depth=2)
        count = len(STARTS) * LENGTH
        return (main + 0.3 / 2 * sum(mtp)) / count, (main / count, sum(mtp) / 2 / count)

    differentiate = [
        jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=QUICK_COMPILE) for f in (packed, alone)
    ]
    ((total, (losses, _)), gradients), ((expected, (main, mtp)), expected_gradients) = (
        f(params) for f in differentiate
    )
    np.testing.assert_allclose((losses.main, losses.mtp, total), (main, mtp, expected), rtol=2e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected_gradients):
        mine = gradients
        for key in path:
            mine = mine[key.key]
        np.testing.assert_allclose(mine, gradient, atol=2e-5 * np.abs(gradient).max() + 1e-9, err_msg=str(path))


def test_positions_begin_with_every_document(monkeypatch):
    """Rotations are relative and would not show it, so here a position scales what it should turn."""

    def scaling(config, positions):
        scales = jnp.repeat(positions[..., None] + 1.0, config.qk_rope_head_dim // 2, axis=-1)
        return scales, jnp.zeros_like(scales)

    monkeypatch.setattr(rope, "rotation", scaling)
    model = small_config(num_hidden_layers=1, num_nextn_predict_layers=0)
    params, tokens_BT = telling_params(model, 0), packed_tokens()[:1, :LENGTH]
    h_TD = forward(model, params, tokens_BT, first_key_BT=document_starts(tokens_BT, BOS)).h_BTD[0]
    begin = STARTS[0][-1]
    alone_TD = forward(model, params, tokens_BT[:, begin:]).h_BTD[0]
    np.testing.assert_allclose(h_TD[begin:], alone_TD, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_the_documents_alone(segmented):
    params, tokens_BT1 = telling_params(segmented.model, 0), packed_tokens()
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    score = make_score_tokens(segmented.model, mesh, chunk_tokens=8, segment_masks=True)
    losses_BT = np.array(score(params, tokens_BT1))
    losses_BT[tokens_BT1[:, 1:] == BOS] = 0.0
    main, *_ = jax.jit(lambda params: losses_alone(segmented.model, params, documents_alone(tokens_BT1), depth=2))(
        params
    )
    np.testing.assert_allclose(losses_BT.sum(), main, rtol=2e-5)


def test_fp8_linears_see_the_same_documents(segmented):
    model = small_config(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        num_nextn_predict_layers=0, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, max_position_embeddings=LENGTH, precision="fp8",
    )  # fmt: skip
    params, tokens_BT1 = telling_params(model, 0), packed_tokens()
    config = dataclasses.replace(segmented, model=model)

    def packed(params):
        return training_loss(config, params, tokens_BT1, mtp_loss_weight=0.0)[0]

    def alone(params):
        return losses_alone(model, params, documents_alone(tokens_BT1), depth=0)[0] / (len(STARTS) * LENGTH)

    (loss, gradients), (expected, expected_gradients) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (packed, alone)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    # Scales of a weight's gradient span 128 tokens, whose neighbours differ: both round, each to 4 bits.
    for mine, gradient in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        assert np.linalg.norm(mine - gradient) <= 0.1 * np.linalg.norm(gradient)
