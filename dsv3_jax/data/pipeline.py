"""Token windows for training and for evaluation.

Training reads windows of T + 1 tokens, T apart, so that every token is a target once per epoch; documents follow one
another without attention masks (§4.1). A batch is a pure function of (seed, position): position, the number of windows
consumed, is all the state there is, and neither threads nor read-ahead nor batch sizes change what stands where.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator

import grain
import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data.prepared import Corpus


class TrainBatches:
    """Gives the training batches of a corpus, from any position on.

    Window number `position` of the endless stream is element `position % num_windows` of epoch
    `position // num_windows`; every epoch has its own order.

    Attributes:
      position: windows consumed so far; a `TrainBatches` started there continues the stream.
      num_windows: windows of one epoch.
      num_unused_tokens: tokens at the end of the corpus that fill no window and are never a target.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        seed: int,
        prefetch_windows: int,
        position: int = 0,
        num_threads: int = 2,
    ):
        """Opens the stream.

        Args:
          corpus: a prepared corpus.
          sequence_length: T, tokens per sequence.
          seed: determines the order of every epoch.
          prefetch_windows: windows read ahead of the consumer; at least one batch per thread is.
          position: windows that were consumed before.
          num_threads: threads that read ahead; 0 reads when asked.

        Raises:
          ValueError: the corpus has less than one window, or position is negative.
        """
        require(position >= 0, "position", position, "must not be negative")
        windows = _Windows(corpus.tokens("train"), sequence_length)
        self.num_windows = len(windows)
        num_tokens = corpus.num_tokens("train")
        require(self.num_windows > 0, "data.sequence_length", sequence_length,
                f"{corpus.directory} has {num_tokens} training tokens and one window takes sequence_length + 1; "
                "shorten the sequences or prepare more text")  # fmt: skip
        self.num_unused_tokens = num_tokens - 1 - self.num_windows * sequence_length
        self.position = position
        self._stream = grain.MapDataset.source(windows).shuffle(seed=_order_seed(seed)).repeat()
        self._stream[position]  # Grain prepares its datasets at the first read, and not safely in several threads.
        self._prefetch_windows = prefetch_windows
        self._num_threads = num_threads
        self._reader = None
        self._reader_reads = None

    def next(self, batch_size: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the next batch, int32 [batch_size, T + 1], and moves on by batch_size windows.

        Args:
          batch_size: sequences of the global batch.
          rows: the rows to return (and to read), for a process that holds only a part of the batch.
        """
        require(batch_size > 0, "batch_size", batch_size, "must be greater than 0")
        rows_read = range(batch_size)[rows]
        require(len(rows_read) > 0, "rows", rows, f"choose none of the {batch_size} rows of the batch")
        if self._reader_reads != (batch_size, rows_read):
            self._restart_reader(batch_size, rows_read)
        batch_BT = next(self._reader)
        self.position += batch_size
        return batch_BT

    def close(self) -> None:
        """Stops reading ahead."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._reader_reads = None

    def _restart_reader(self, batch_size: int, rows: range) -> None:
        self.close()
        batches = grain.MapDataset.source(_Batches(self._stream, self.position, batch_size, rows))
        batches_ahead = max(1, self._num_threads, math.ceil(self._prefetch_windows / len(rows)))
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=batches_ahead)
        self._reader = iter(batches.to_iter_dataset(options))
        self._reader_reads = (batch_size, rows)


class _Windows:
    """Window i holds the tokens [i T, i T + T]: its last token is the first of the next one."""

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        self._tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.sequence_length
        return self._tokens[start : start + self.sequence_length + 1].astype(np.int32)


class _Batches:
    """Batch i holds the given rows of the windows [position + i batch_size, position + (i + 1) batch_size)."""

    def __init__(self, stream: grain.MapDataset, position: int, batch_size: int, rows: range):
        self._stream = stream
        self._position = position
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return (sys.maxsize - self._position) // self._batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._position + index * self._batch_size
        return np.stack([self._stream[start + row] for row in self._rows])


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Sequences to score, and what their scores are worth.

    With nll_BT in nats for the targets tokens_BT[:, 1:], bits per byte of any set of batches is
    sum(nll_BT * weights_BT) / ln 2 / sum(num_bytes).
    """

    tokens_BT: np.ndarray  # int32 [batch_size, T + 1]
    weights_BT: np.ndarray  # float32 [batch_size, T]: 1 where the target counts, 0 for bos and padding
    num_bytes: int  # UTF-8 bytes of text that the counted targets stand for


def heldout_windows(
    corpus: Corpus,
    *,
    sequence_length: int,
    batch_size: int,
    max_sequences: int | None = None,
) -> Iterator[EvaluationBatch]:
    """Gives the held-out documents as batches of one shape; see `evaluation_windows`.

    Raises:
      ValueError: the corpus has no held-out tokens.
    """
    tokens = corpus.tokens("heldout")
    require(len(tokens) > 0, "data.corpus", str(corpus.directory),
            "has no held-out documents; prepare one with --heldout_fraction above 0")  # fmt: skip
    return evaluation_windows(
        tokens,
        num_bytes_of_token=corpus.token_bytes,
        bos_token_id=corpus.manifest["tokenizer"]["bos_token_id"],
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_sequences=max_sequences,
    )


def evaluation_windows(
    tokens: np.ndarray,
    *,
    num_bytes_of_token: np.ndarray,
    bos_token_id: int,
    sequence_length: int,
    batch_size: int,
    max_sequences: int | None = None,
) -> Iterator[EvaluationBatch]:
    """Cuts documents (bos text eos bos text eos ...) into windows in which each token is predicted exactly once.

    The windows are those of training: T + 1 tokens, T apart, documents packed without masks. Every token of text and
    every eos counts once; bos opens a document and is never a counted target, so a document's first token is predicted
    from bos. The last window and the last batch are padded with weight 0. Over all windows, num_bytes adds up to the
    UTF-8 bytes of the documents exactly; eos costs bits but stands for no byte.

    Args:
      tokens: flat tokens of whole documents, the first of them bos.
      num_bytes_of_token: bytes of text of each token id.
      bos_token_id: id that opens a document.
      sequence_length: T.
      batch_size: rows of every batch.
      max_sequences: windows to give, evenly spaced over all of them; None gives all.
    """
    num_windows = math.ceil((len(tokens) - 1) / sequence_length)
    num_chosen = num_windows if max_sequences is None else min(max_sequences, num_windows)
    chosen = [index * num_windows // num_chosen for index in range(num_chosen)]
    for first in range(0, num_chosen, batch_size):
        tokens_BT = np.full((batch_size, sequence_length + 1), bos_token_id, np.int32)
        for row, window in enumerate(chosen[first : first + batch_size]):
            start = window * sequence_length
            piece = tokens[start : start + sequence_length + 1]
            tokens_BT[row, : len(piece)] = piece
        targets_BT = tokens_BT[:, 1:]
        weights_BT = (targets_BT != bos_token_id).astype(np.float32)
        yield EvaluationBatch(tokens_BT, weights_BT, int(num_bytes_of_token[targets_BT].sum()))


def _order_seed(seed: int) -> int:
    """Spreads a seed over 32 bits: Grain adds the epoch to it, and neighbouring seeds must not share orders."""
    return int.from_bytes(hashlib.sha256(f"order of windows {seed}".encode()).digest()[:4], "little")
