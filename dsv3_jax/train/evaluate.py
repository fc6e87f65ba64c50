"""Bits per byte and perplexity: of the held-out split while training, and of any text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig, RunConfig, require
from dsv3_jax.data import EvaluationBatch, Tokenizer
from dsv3_jax.model import cast_params, document_starts, forward, gather_params, param_splits, prepare_params
from dsv3_jax.sharding.collectives import SEQUENCE_AXIS, own_tokens
from dsv3_jax.sharding.mesh import BATCH_AXES, num_batch_shards
from dsv3_jax.sharding.rules import batch_sharding, batch_spec, per_device, replicated
from dsv3_jax.sharding.zero import as_part
from dsv3_jax.train.batches import place_rows
from dsv3_jax.train.loss import chunk_columns, token_cross_entropy

ScoreTokens = Callable[[dict, np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    num_bytes: int  # UTF-8
    num_tokens: int  # predicted, the closing eos of a document included
    nats: float  # -log P of all of them

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.num_tokens)


def make_score_tokens(config: ModelConfig, mesh: jax.sharding.Mesh, *, chunk_tokens: int,
                      segment_masks: bool = False) -> ScoreTokens:  # fmt: skip
    """Builds `score(params, tokens_BT1) -> float32 [B, T]`: -log P in nats of every token after the first.

    With segment_masks a token is predicted from its own document alone, as `data.segment_masks` trains it.
    params lie as `model.param_shardings` says; they may have been cast. tokens are numpy, the same in every process.
    """

    def score(params: dict, tokens_BT1: jax.Array) -> jax.Array:
        params = cast_params(config, params)
        targets_BT = tokens_BT1[:, 1:]
        inputs_BT = tokens_BT1[:, :-1]
        first_key_BT = document_starts(inputs_BT, config.bos_token_id) if segment_masks else None
        h_BTD = forward(config, params, inputs_BT, first_key_BT=first_key_BT).h_BTD
        targets_Bt = own_tokens(targets_BT, 1)
        return token_cross_entropy(h_BTD, params["lm_head"], targets_Bt, chunk_columns(targets_Bt.shape, chunk_tokens))

    def score_parts(parts: dict, tokens_BT1: jax.Array) -> jax.Array:
        own = jax.tree.map(as_part, parts, param_splits(config, mesh))
        return score(gather_params(prepare_params(config, own)), tokens_BT1)

    scores = PartitionSpec(BATCH_AXES, SEQUENCE_AXIS)
    if mesh.size == 1:
        share = per_device(score, mesh=mesh, in_specs=(PartitionSpec(), batch_spec()), out_specs=scores)
    else:
        masters = jax.tree.map(lambda split: split.master, param_splits(config, mesh))
        share = per_device(score_parts, mesh=mesh, in_specs=(masters, batch_spec()), out_specs=scores)
    jitted = jax.jit(share, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
    return lambda params, tokens_BT1: jitted(params, place_rows(mesh, tokens_BT1))


def score_sources(score_tokens: ScoreTokens, params: dict, batches: Iterable[EvaluationBatch], *,
                  num_sources: int) -> list[Score]:  # fmt: skip
    """Scores all batches, every source by itself; sums in float64. A source without a row has a score of zeros."""
    nats, num_tokens, num_bytes = np.zeros(num_sources), np.zeros(num_sources, int), np.zeros(num_sources, int)
    for batch in batches:
        losses_BT = np.asarray(score_tokens(params, batch.tokens_BT), np.float64)
        np.add.at(nats, batch.source_B, np.sum(losses_BT * batch.weights_BT, axis=1))
        np.add.at(num_tokens, batch.source_B, batch.weights_BT.sum(axis=1).astype(int))
        np.add.at(num_bytes, batch.source_B, batch.num_bytes_B)
    return [Score(*score) for score in zip(num_bytes.tolist(), num_tokens.tolist(), nats.tolist())]


def total(scores: Iterable[Score]) -> Score:
    """Adds up scores: that of all their texts together."""
    return Score(*(sum(part) for part in zip(*map(dataclasses.astuple, scores))))


def score_text(score_tokens: ScoreTokens, params: dict, text: str, *, tokenizer: Tokenizer, sequence_length: int,
               batch_size: int) -> Score:  # fmt: skip
    """Scores one document: every token of the text and its closing eos once, see `sliding_windows`.

    Raises:
      ValueError: the text is empty.
    """
    require(bool(text), "text", text, "is empty; there is nothing to score")
    tokens = np.asarray(tokenizer.encode_document(text), np.int32)
    batches = sliding_windows(
        tokens, num_bytes=len(text.encode()), sequence_length=sequence_length, batch_size=batch_size
    )
    return total(score_sources(score_tokens, params, batches, num_sources=1))


def sliding_windows(tokens: np.ndarray, *, num_bytes: int, sequence_length: int,
                    batch_size: int) -> Iterator[EvaluationBatch]:  # fmt: skip
    """Cuts one document into overlapping windows, half a window apart, that predict every token but the first once.

    The first window predicts T tokens; each later one only those of its second half that none predicted before, so all
    but the first T tokens are predicted from at least T/2 tokens before them. Every batch has the same shape; what
    pads the last ones has weight 0. The first row carries all of num_bytes.

    Args:
      tokens: bos, text, eos.
      num_bytes: UTF-8 bytes of the text.
      sequence_length: T.
      batch_size: rows of every batch.
    """
    num_targets, stride = len(tokens) - 1, max(1, sequence_length // 2)
    num_windows = 1 + max(0, -(-(num_targets - sequence_length) // stride))
    for first in range(0, num_windows, batch_size):
        tokens_BT = np.zeros((batch_size, sequence_length + 1), np.int32)
        weights_BT = np.zeros((batch_size, sequence_length), np.float32)
        for row, window in enumerate(range(first, min(first + batch_size, num_windows))):
            start = window * stride
            piece = tokens[start : start + sequence_length + 1]
            tokens_BT[row, : len(piece)] = piece
            num_predicted_before = sequence_length - stride if window else 0
            weights_BT[row, num_predicted_before : len(piece) - 1] = 1
        num_bytes_B = np.zeros(batch_size, np.int64)
        num_bytes_B[0] = num_bytes if first == 0 else 0
        yield EvaluationBatch(tokens_BT, weights_BT, num_bytes_B, source_B=np.zeros(batch_size, np.int32))


def heldout_batch_size(config: RunConfig, mesh: jax.sharding.Mesh) -> int:
    """Returns the sequences scored at a time: those of a training pass, or one per device where that is more."""
    return max(config.train.rows_per_pass, num_batch_shards(mesh))
