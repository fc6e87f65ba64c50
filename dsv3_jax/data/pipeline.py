"""Token windows for training and for evaluation.

Training reads windows of T + 1 tokens, T apart, so that every token of a source is a target once per epoch of that
source; documents follow one another without attention masks (§4.1). The mixture says which source each window is from.
A batch is a pure function of (seed, position): position, the number of windows consumed, is all the state there is, and
neither threads nor read-ahead nor batch sizes nor the number of processes change what stands where.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.config import DataConfig, require
from dsv3_jax.data.mixture import Mixture, parse_mixture, recipe_mixture
from dsv3_jax.data.orders import RandomOrder
from dsv3_jax.data.prepared import Corpus, PreparedSource


class TrainBatches:
    """Gives the training batches of a corpus, from any position on.

    Every source is an endless stream of windows: epoch after epoch, each in an order of its own. The mixture takes the
    windows of the sources in the order of those streams.

    Attributes:
      position: windows consumed so far; a `TrainBatches` started there continues the stream.
      sources: name -> `SourceWindows`, for all sources of the corpus.
      mixture: the `Mixture`.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, *, seed: int, position: int = 0):
        """Opens the stream.

        Args:
          corpus: a prepared corpus.
          config: length of the sequences, mixture, read-ahead.
          seed: determines the order of every epoch, and that of the sources.
          position: windows that were consumed before.

        Raises:
          ValueError: the mixture is not one of this corpus, a source that it names has less than one window, or
            position is negative.
        """
        require(position >= 0, "position", position, "must not be negative")
        if config.mixture:
            phases = parse_mixture(config.mixture)
        else:
            phases = recipe_mixture({name: source.weight for name, source in corpus.sources.items()})
        self.mixture = Mixture(phases, sources=tuple(corpus.sources), sequence_length=config.sequence_length, seed=seed)
        self.sources = {
            name: SourceWindows(source, sequence_length=config.sequence_length, seed=seed)
            for name, source in corpus.sources.items()
        }
        self.position = position
        for (name, source), is_used in zip(self.sources.items(), self.mixture.is_used()):
            require(source.num_windows > 0 or not is_used, "data.sequence_length", config.sequence_length,
                    f"the source {name} of {corpus.directory} has {source.num_tokens} training tokens and one window "
                    "takes sequence_length + 1; shorten the sequences, prepare more text, or leave the source out of "
                    "data.mixture")  # fmt: skip
        self._config = config
        self._reader = None
        self._reader_reads = None

    def next(self, batch_size: int, rows: Sequence[int] | None = None) -> np.ndarray:
        """Returns the next batch, int32 [batch_size, T + 1], and moves on by batch_size windows.

        Args:
          batch_size: sequences of the global batch.
          rows: the rows to return (and to read), for a process that holds only a part of the batch; None: all.
        """
        require(batch_size > 0, "batch_size", batch_size, "must be greater than 0")
        rows_read = tuple(range(batch_size) if rows is None else rows)
        is_part = bool(rows_read) and min(rows_read) >= 0 and max(rows_read) < batch_size
        require(is_part, "rows", rows, f"choose one or more of the {batch_size} rows of the batch")
        if self._reader_reads != (batch_size, rows_read):
            self._restart_reader(batch_size, rows_read)
        batch_BT = next(self._reader)
        self.position += batch_size
        return batch_BT

    def epochs(self, position: int) -> dict[str, float]:
        """Gives how many times each source was read before a position; 0 for a source without a window."""
        windows = self.mixture.windows_before(position)
        return {
            name: int(count) / max(1, source.num_windows)
            for (name, source), count in zip(self.sources.items(), windows)
        }

    def close(self) -> None:
        """Stops reading ahead."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._reader_reads = None

    def _restart_reader(self, batch_size: int, rows: tuple[int, ...]) -> None:
        import grain  # heavy; the tokenizer and the evaluation do without

        self.close()
        batches = _Batches(self.mixture, tuple(self.sources.values()), self.position, batch_size, rows)
        batches_ahead = max(1, self._config.reader_threads, math.ceil(self._config.prefetch_windows / len(rows)))
        options = grain.ReadOptions(num_threads=self._config.reader_threads, prefetch_buffer_size=batches_ahead)
        self._reader = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._reader_reads = (batch_size, rows)


class SourceWindows:
    """The endless stream of a source's training windows.

    Window i of the text holds the tokens [i T, i T + T]: its last token is the first of the next one.

    Attributes:
      sequence_length: T.
      num_tokens: tokens of one epoch.
      num_windows: windows of one epoch.
      num_unused_tokens: tokens at the end of the source that fill no window and are never a target.
    """

    def __init__(self, source: PreparedSource, *, sequence_length: int, seed: int):
        self._tokens = source.tokens("train")
        self.sequence_length = sequence_length
        self.num_tokens = len(self._tokens)
        self.num_windows = max(0, (self.num_tokens - 1) // sequence_length)
        self.num_unused_tokens = max(0, self.num_tokens - 1 - self.num_windows * sequence_length)

        key = f"order of windows of {source.name} {seed}"
        self._order = functools.lru_cache(lambda epoch: RandomOrder(self.num_windows, f"{key} {epoch}"))

    def read(self, number: int, out_T: np.ndarray) -> None:
        """Copies a window of the stream into an array of T + 1 integers."""
        epoch, place = divmod(number, self.num_windows)
        start = self._order(epoch)[place] * self.sequence_length
        out_T[:] = self._tokens[start : start + self.sequence_length + 1]


class _Batches:
    """Batch i holds the given rows of the windows [position + i batch_size, position + (i + 1) batch_size)."""

    def __init__(self, mixture: Mixture, sources: tuple[SourceWindows, ...], position: int, batch_size: int,
                 rows: tuple[int, ...]):  # fmt: skip
        self._mixture = mixture
        self._sources = sources
        self._position = position
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return (sys.maxsize - self._position) // self._batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._position + index * self._batch_size
        sequence_length = self._sources[0].sequence_length
        tokens_BT = np.empty((len(self._rows), sequence_length + 1), np.int32)
        for row, tokens_T in zip(self._rows, tokens_BT):
            source, number = self._mixture.place(start + row)
            self._sources[source].read(number, tokens_T)
        return tokens_BT


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Sequences to score, and what their scores are worth.

    With nll_BT in nats for the targets tokens_BT[:, 1:], bits per byte of any set of rows is
    sum(nll_BT * weights_BT) / ln 2 / sum(num_bytes_B).
    """

    tokens_BT: np.ndarray  # int32 [batch_size, T + 1]
    weights_BT: np.ndarray  # float32 [batch_size, T]: 1 where the target counts, 0 for bos and padding
    num_bytes_B: np.ndarray  # int64 [batch_size]: UTF-8 bytes of text that the row's counted targets stand for
    source_B: np.ndarray  # int32 [batch_size]: number of the source that the row is from


def heldout_windows(
    corpus: Corpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
) -> Iterator[EvaluationBatch]:
    """Gives the held-out documents of all sources as batches of one shape; see `evaluation_windows`.

    Sources are numbered as in `corpus.sources`.

    Raises:
      ValueError: the corpus has no held-out tokens.
    """
    require(corpus.num_tokens("heldout") > 0, "data.corpus", str(corpus.directory),
            "has no held-out documents; prepare one with --heldout_fraction above 0")  # fmt: skip
    return evaluation_windows(
        [source.tokens("heldout") for source in corpus.sources.values()],
        num_bytes_of_token=corpus.token_bytes,
        bos_token_id=corpus.bos_token_id,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_sequences=max_sequences,
    )


def evaluation_windows(
    sources: Sequence[np.ndarray],
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
    from bos. A source's last window and the last batch are padded with weight 0. Over all windows, num_bytes_B adds up
    to the UTF-8 bytes of the documents exactly; eos costs bits but stands for no byte.

    Args:
      sources: of each source the flat tokens of whole documents, the first of them bos.
      num_bytes_of_token: bytes of text of each token id.
      bos_token_id: id that opens a document.
      sequence_length: T.
      batch_size: rows of every batch.
      max_sequences: windows to give, each source its share evenly spaced over its own and at least one; None gives all.
    """
    chosen = _chosen_windows([math.ceil(max(0, len(t) - 1) / sequence_length) for t in sources], max_sequences)
    for first in range(0, len(chosen), batch_size):
        tokens_BT = np.full((batch_size, sequence_length + 1), bos_token_id, np.int32)
        source_B = np.zeros(batch_size, np.int32)
        for row, (source, window) in enumerate(chosen[first : first + batch_size]):
            start = window * sequence_length
            piece = sources[source][start : start + sequence_length + 1]
            tokens_BT[row, : len(piece)] = piece
            source_B[row] = source
        targets_BT = tokens_BT[:, 1:]
        weights_BT = (targets_BT != bos_token_id).astype(np.float32)
        num_bytes_B = num_bytes_of_token[targets_BT].sum(axis=1, dtype=np.int64)
        yield EvaluationBatch(tokens_BT, weights_BT, num_bytes_B, source_B)


def _chosen_windows(windows: list[int], max_sequences: int | None) -> list[tuple[int, int]]:
    """Gives (source, window) of the windows to score, source after source."""
    num_all = sum(windows)
    chosen = []
    for source, num_windows in enumerate(windows):
        num_chosen = num_windows
        if max_sequences is not None and max_sequences < num_all:
            num_chosen = min(num_windows, max(1, max_sequences * num_windows // num_all))
        chosen += [(source, index * num_windows // num_chosen) for index in range(num_chosen)]
    return chosen
