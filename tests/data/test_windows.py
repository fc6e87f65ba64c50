"""Windows: every token accounted for, and every batch a pure function of (seed, position)."""

import itertools

import numpy as np
import pytest
from counting_corpus import counting_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import DataConfig
from dsv3_jax.data import TrainBatches, evaluation_windows, heldout_windows

BOS, EOS = 0, 1


def batches_of(num_tokens: int, sequence_length: int, batch_sizes, *, position=0, **settings) -> list[np.ndarray]:
    batches = open_batches(counting_corpus(text=num_tokens), sequence_length, position=position, **settings)
    read = [batches.next(size) for size in batch_sizes]
    assert batches.position == position + sum(batch_sizes)
    batches.close()
    return read


def open_batches(corpus, sequence_length: int, *, seed=7, position=0, prefetch_windows=8, **settings) -> TrainBatches:
    config = DataConfig(sequence_length=sequence_length, prefetch_windows=prefetch_windows, **settings)
    return TrainBatches(corpus, config, seed=seed, position=position)


@given(num_tokens=st.integers(2, 200), sequence_length=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_each_target_once_and_the_tail_is_counted(num_tokens, sequence_length):
    corpus = counting_corpus(text=num_tokens)
    if num_tokens <= sequence_length:
        with pytest.raises(ValueError, match=r"data\.sequence_length"):
            open_batches(corpus, sequence_length)
        return
    batches = open_batches(corpus, sequence_length)
    source = batches.sources["text"]
    for _ in range(2):
        windows = batches.next(source.num_windows)
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(windows - windows[:, :1], [range(sequence_length + 1)] * source.num_windows)
        targets = sorted(windows[:, 1:].ravel())
        assert targets == list(range(1, num_tokens - source.num_unused_tokens))
        assert source.num_unused_tokens < sequence_length
    batches.close()


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = {}
    for seed in range(3):
        epochs = batches_of(501, 5, [100, 100, 100], seed=seed)
        orders |= {(seed, epoch): tuple(windows[:, 0]) for epoch, windows in enumerate(epochs)}
    assert len(set(orders.values())) == len(orders)  # seed 1 in epoch 0 is not seed 0 in epoch 1 either
    assert all(sorted(order) == sorted(orders[0, 0]) for order in orders.values())


def test_the_order_of_a_seed_is_pinned():
    # Runs continue on other versions of the libraries: another order would repeat some windows and skip others.
    (windows,) = batches_of(161, 10, [16], seed=1234)
    assert (windows[:, 0] // 10).tolist() == [10, 0, 13, 1, 5, 14, 11, 4, 15, 8, 2, 3, 6, 7, 12, 9]


@pytest.mark.parametrize("position", [0, 1, 12, 13, 50, 97])
def test_a_resumed_stream_continues_bit_for_bit_with_other_batch_sizes(position):
    stream = np.concatenate(batches_of(331, 10, [100] * 2))  # 33 windows: six epochs
    resumed = batches_of(331, 10, [3, 3, 5, 1, 40, 40], position=position)
    np.testing.assert_array_equal(np.concatenate(resumed), stream[position : position + 92])


@pytest.mark.parametrize("prefetch_windows, reader_threads", [(1, 0), (1, 1), (3, 2), (500, 7)])
def test_reading_ahead_changes_nothing(prefetch_windows, reader_threads):
    sizes = [4, 4, 4, 9, 9, 2]
    expected = batches_of(331, 10, sizes)
    read = batches_of(331, 10, sizes, prefetch_windows=prefetch_windows, reader_threads=reader_threads)
    for batch, other in zip(expected, read, strict=True):
        np.testing.assert_array_equal(batch, other)


def test_rows_of_several_processes_make_the_global_batch():
    (*_, batch) = batches_of(331, 10, [6, 8, 8])
    parts = []
    for rows in (range(3), [3], [6, 4, 5, 7]):
        batches = open_batches(counting_corpus(text=331), 10)
        batches.next(6)
        batches.next(8, rows=rows)
        parts.append(batches.next(8, rows=rows))
        assert batches.position == 22
        batches.close()
    np.testing.assert_array_equal(np.concatenate(parts), batch[[0, 1, 2, 3, 6, 4, 5, 7]])
    assert [len(part) for part in parts] == [3, 1, 4]


def test_impossible_requests_name_the_field():
    corpus = counting_corpus(text=100)
    with pytest.raises(ValueError, match="position=-1"):
        open_batches(corpus, 10, position=-1)
    batches = open_batches(corpus, 10)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches.next(0)
    for rows in ([], range(3, 5), [-1]):
        with pytest.raises(ValueError, match="rows="):
            batches.next(4, rows=rows)


document = st.lists(st.integers(2, 9), max_size=12)
source = st.lists(document, max_size=4)


@given(st.lists(source, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_evaluation_predicts_each_token_once_and_counts_its_bytes(sources, sequence_length, batch_size):
    num_bytes_of_token = np.array([0, 0, 1, 1, 2, 3, 5, 8, 13, 21], np.int32)
    tokens = [np.array([t for text in documents for t in (BOS, *text, EOS)], np.uint16) for documents in sources]
    batches = list(
        evaluation_windows(
            tokens,
            num_bytes_of_token=num_bytes_of_token,
            bos_token_id=BOS,
            sequence_length=sequence_length,
            batch_size=batch_size,
        )
    )
    assert {batch.tokens_BT.shape for batch in batches} <= {(batch_size, sequence_length + 1)}
    for number, documents in enumerate(sources):
        predicted, contexts, num_bytes = [], [], 0
        for batch in batches:
            for row in np.flatnonzero((batch.source_B == number) & batch.weights_BT.any(axis=1)):
                targets = np.flatnonzero(batch.weights_BT[row])
                predicted += batch.tokens_BT[row, targets + 1].tolist()
                contexts += batch.tokens_BT[row, targets].tolist()
                num_bytes += batch.num_bytes_B[row]
        assert predicted == [token for text in documents for token in (*text, EOS)]
        assert contexts == [token for text in documents for token in (BOS, *text)]
        assert num_bytes == sum(int(num_bytes_of_token[token]) for text in documents for token in text)
    num_windows = sum(-(-max(0, len(ids) - 1) // sequence_length) for ids in tokens)
    assert len(batches) == -(-num_windows // batch_size)


def chosen(*num_tokens: int, max_sequences: int) -> list[tuple[int, int]]:
    """Gives (source, first token) of the windows of 10 tokens that are scored."""
    batches = evaluation_windows(
        [np.arange(1, 1 + number) for number in num_tokens],
        num_bytes_of_token=np.ones(200, np.int32),
        bos_token_id=BOS,
        sequence_length=10,
        batch_size=2,
        max_sequences=max_sequences,
    )
    rows = [row for batch in batches for row in zip(batch.source_B.tolist(), batch.tokens_BT.tolist())]
    return [(source, tokens[0] - 1) for source, tokens in rows if tokens[0] != BOS]


def test_fewer_sequences_are_spread_over_the_whole_text():
    assert chosen(100, max_sequences=4) == [(0, 0), (0, 20), (0, 50), (0, 70)]


def test_every_source_gives_its_share_of_the_sequences_and_at_least_one():
    assert chosen(101, 0, 12, 51, max_sequences=6) == [(0, 0), (0, 30), (0, 60), (2, 0), (3, 0)]
    assert len(chosen(101, 0, 12, 51, max_sequences=17)) == 10 + 2 + 5


def test_heldout_bytes_are_those_of_the_text(small_corpus):
    whole = list(heldout_windows(small_corpus, sequence_length=16, batch_size=4))
    assert sum(batch.num_bytes_B.sum() for batch in whole) == small_corpus.num_bytes("heldout")
    num_targets = small_corpus.num_tokens("heldout") - small_corpus.num_documents("heldout")
    assert sum(batch.weights_BT.sum() for batch in whole) == num_targets

    part = list(heldout_windows(small_corpus, sequence_length=16, batch_size=4, max_sequences=6))
    assert [batch.weights_BT.any(axis=1).sum() for batch in part] == [4, 2]
    for batch in part:
        texts = [small_corpus.tokenizer.decode_bytes(row) for row in batch.tokens_BT[:, 1:]]
        assert batch.num_bytes_B.tolist() == [len(text) for text in texts]
    all_rows = {tuple(row) for batch in whole for row in batch.tokens_BT}
    assert all(tuple(row) in all_rows for row in itertools.chain(*(batch.tokens_BT for batch in part)) if row.any())
