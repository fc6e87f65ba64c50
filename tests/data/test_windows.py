"""Windows: every token accounted for, and every batch a pure function of (seed, position)."""

import itertools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import TrainBatches, evaluation_windows, heldout_windows

BOS, EOS = 0, 1


def counting_corpus(num_tokens: int):
    """A corpus whose token at position i is i, so that a batch says which positions it read."""
    tokens = np.arange(num_tokens, dtype=np.uint32)
    return types.SimpleNamespace(tokens=lambda split: tokens, num_tokens=lambda split: num_tokens, directory="counting")


def batches_of(num_tokens: int, sequence_length: int, batch_sizes, **arguments) -> list[np.ndarray]:
    arguments = {"seed": 7, "prefetch_windows": 8} | arguments
    batches = TrainBatches(counting_corpus(num_tokens), sequence_length=sequence_length, **arguments)
    read = [batches.next(size) for size in batch_sizes]
    assert batches.position == arguments.get("position", 0) + sum(batch_sizes)
    batches.close()
    return read


@given(num_tokens=st.integers(2, 200), sequence_length=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_each_target_once_and_the_tail_is_counted(num_tokens, sequence_length):
    corpus = counting_corpus(num_tokens)
    if num_tokens <= sequence_length:
        with pytest.raises(ValueError, match=r"data\.sequence_length"):
            TrainBatches(corpus, sequence_length=sequence_length, seed=0, prefetch_windows=4)
        return
    batches = TrainBatches(corpus, sequence_length=sequence_length, seed=0, prefetch_windows=4)
    for _ in range(2):
        windows = batches.next(batches.num_windows)
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(windows - windows[:, :1], [range(sequence_length + 1)] * batches.num_windows)
        targets = sorted(windows[:, 1:].ravel())
        assert targets == list(range(1, num_tokens - batches.num_unused_tokens))
        assert batches.num_unused_tokens < sequence_length
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
    assert (windows[:, 0] // 10).tolist() == [11, 9, 6, 2, 10, 7, 15, 3, 13, 12, 0, 5, 1, 14, 4, 8]


@pytest.mark.parametrize("position", [0, 1, 12, 13, 50, 97])
def test_a_resumed_stream_continues_bit_for_bit_with_other_batch_sizes(position):
    stream = np.concatenate(batches_of(331, 10, [100] * 2))  # 33 windows: six epochs
    resumed = batches_of(331, 10, [3, 3, 5, 1, 40, 40], position=position)
    np.testing.assert_array_equal(np.concatenate(resumed), stream[position : position + 92])


@pytest.mark.parametrize("prefetch_windows, num_threads", [(1, 0), (1, 1), (3, 2), (500, 7)])
def test_reading_ahead_changes_nothing(prefetch_windows, num_threads):
    sizes = [4, 4, 4, 9, 9, 2]
    expected = batches_of(331, 10, sizes)
    read = batches_of(331, 10, sizes, prefetch_windows=prefetch_windows, num_threads=num_threads)
    for batch, other in zip(expected, read, strict=True):
        np.testing.assert_array_equal(batch, other)


def test_rows_of_several_processes_make_the_global_batch():
    (*_, batch) = batches_of(331, 10, [6, 8, 8])
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, None)):
        batches = TrainBatches(counting_corpus(331), sequence_length=10, seed=7, prefetch_windows=8)
        batches.next(6)
        batches.next(8, rows=rows)
        parts.append(batches.next(8, rows=rows))
        assert batches.position == 22
        batches.close()
    np.testing.assert_array_equal(np.concatenate(parts), batch)
    assert [len(part) for part in parts] == [3, 1, 4]


def test_impossible_requests_name_the_field():
    corpus = counting_corpus(100)
    with pytest.raises(ValueError, match="position=-1"):
        TrainBatches(corpus, sequence_length=10, seed=0, prefetch_windows=4, position=-1)
    batches = TrainBatches(corpus, sequence_length=10, seed=0, prefetch_windows=4)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches.next(0)
    with pytest.raises(ValueError, match="rows="):
        batches.next(4, rows=slice(4, 8))


document = st.lists(st.integers(2, 9), max_size=12)


@given(st.lists(document, min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_evaluation_predicts_each_token_once_and_counts_its_bytes(documents, sequence_length, batch_size):
    num_bytes_of_token = np.array([0, 0, 1, 1, 2, 3, 5, 8, 13, 21], np.int32)
    tokens = np.array([token for text in documents for token in (BOS, *text, EOS)], np.uint16)
    batches = list(
        evaluation_windows(
            tokens,
            num_bytes_of_token=num_bytes_of_token,
            bos_token_id=BOS,
            sequence_length=sequence_length,
            batch_size=batch_size,
        )
    )
    assert {batch.tokens_BT.shape for batch in batches} == {(batch_size, sequence_length + 1)}
    predicted, contexts = [], []
    for batch in batches:
        for row, weights in zip(batch.tokens_BT, batch.weights_BT):
            for i in np.flatnonzero(weights):
                predicted.append(row[i + 1])
                contexts.append(row[i])
    assert predicted == [token for text in documents for token in (*text, EOS)]
    assert contexts == [token for text in documents for token in (BOS, *text)]
    expected_bytes = sum(int(num_bytes_of_token[token]) for text in documents for token in text)
    assert sum(batch.num_bytes for batch in batches) == expected_bytes


def test_fewer_sequences_are_spread_over_the_whole_text():
    batches = evaluation_windows(
        np.arange(100),
        num_bytes_of_token=np.ones(100, np.int32),
        bos_token_id=BOS,
        sequence_length=10,
        batch_size=2,
        max_sequences=4,
    )
    assert [row[0] for batch in batches for row in batch.tokens_BT] == [0, 20, 50, 70]


def test_heldout_bytes_are_those_of_the_text(small_corpus):
    whole = list(heldout_windows(small_corpus, sequence_length=16, batch_size=4))
    assert sum(batch.num_bytes for batch in whole) == small_corpus.num_bytes("heldout")
    num_documents = small_corpus.manifest["splits"]["heldout"]["documents"]
    assert sum(batch.weights_BT.sum() for batch in whole) == small_corpus.num_tokens("heldout") - num_documents

    part = list(heldout_windows(small_corpus, sequence_length=16, batch_size=4, max_sequences=6))
    assert [batch.weights_BT.any(axis=1).sum() for batch in part] == [4, 2]
    for batch in part:
        text = small_corpus.tokenizer.decode_bytes(batch.tokens_BT[:, 1:].ravel())
        assert batch.num_bytes == len(text)
    all_rows = {tuple(row) for batch in whole for row in batch.tokens_BT}
    assert all(tuple(row) in all_rows for row in itertools.chain(*(batch.tokens_BT for batch in part)) if row.any())
