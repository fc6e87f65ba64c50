"""Every token of every source is counted through the pipeline: none lost, none doubled, the remainder stated."""

import numpy as np
import pytest
from counting_corpus import SOURCE_STRIDE, counting_corpus

from dsv3_jax.config import DataConfig
from dsv3_jax.data import TrainBatches
from dsv3_jax.data.prepared import write_corpus
from dsv3_jax.data.tokenizer import train_tokenizer

T = 7
MIXTURE = "0:code=0.5,math=0.25,prose=0.25;2100:prose=1,math=0.1"


def open_batches(corpus, *, mixture=MIXTURE, position=0, reader_threads=2) -> TrainBatches:
    config = DataConfig(sequence_length=T, mixture=mixture, reader_threads=reader_threads, prefetch_windows=8)
    return TrainBatches(corpus, config, seed=3, position=position)


def test_each_epoch_of_each_source_has_every_target_once():
    num_tokens = {"code": 150, "math": 71, "prose": 2024}
    batches = open_batches(counting_corpus(**num_tokens))
    read = np.concatenate([batches.next(13) for _ in range(100)])
    batches.close()
    epochs = batches.epochs(batches.position)
    for source, (name, number) in enumerate(num_tokens.items()):
        windows = read[read[:, 0] // SOURCE_STRIDE == source] - source * SOURCE_STRIDE
        np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(T + 1), (len(windows), 1)))
        stated = batches.sources[name]
        assert stated.num_windows * T + stated.num_unused_tokens == number - 1 and stated.num_unused_tokens < T
        assert epochs[name] == len(windows) / stated.num_windows > 1
        for first in range(0, len(windows), stated.num_windows):
            targets = windows[first : first + stated.num_windows, 1:].ravel().tolist()
            assert len(set(targets)) == len(targets)
            if len(targets) == stated.num_windows * T:
                assert sorted(targets) == list(range(1, number - stated.num_unused_tokens))
    assert len(read) == sum(np.sum(read[:, 0] // SOURCE_STRIDE == source) for source in range(3))


def test_one_epoch_of_a_corpus_on_disk_is_the_encoded_text(tmp_path):
    tokenizer = train_tokenizer([], 300)
    texts = {name: [f"{name} {i}\n" * (i % 5) for i in range(40)] for name in ("code", "prose")}
    documents = {name: {"train": tokenizer.encode_documents(of_source)} for name, of_source in texts.items()}
    corpus = write_corpus(tmp_path / "corpus", tokenizer, documents, weights={"code": 1, "prose": 1})
    for name, of_source in texts.items():
        expected = [token for text in of_source for token in tokenizer.encode_document(text)]
        batches = open_batches(corpus, mixture=f"{name}=1")
        source = batches.sources[name]
        read = batches.next(source.num_windows)
        batches.close()
        targets = np.bincount(read[:, 1:].ravel(), minlength=tokenizer.vocab_size)
        targeted = expected[1 : len(expected) - source.num_unused_tokens]
        np.testing.assert_array_equal(targets, np.bincount(targeted, minlength=tokenizer.vocab_size))


@pytest.mark.parametrize("stop", [0, 1, 33, 300])
def test_other_processes_and_threads_continue_without_repeating_or_skipping(stop):
    """Three processes of two threads read until they are stopped; two of none go on, then one of five."""
    corpus = counting_corpus(code=150, math=71, prose=2024)
    batches = open_batches(corpus)
    expected = np.concatenate([batches.next(6) for _ in range(stop + 10)])
    batches.close()
    read, position = [], 0
    for num_processes, reader_threads, num_steps in [(3, 2, stop), (2, 0, 6), (1, 5, 4)]:
        processes = [
            open_batches(corpus, position=position, reader_threads=reader_threads) for _ in range(num_processes)
        ]
        rows = 6 // num_processes
        for _ in range(num_steps):
            read += [batches.next(6, range(i * rows, (i + 1) * rows)) for i, batches in enumerate(processes)]
        position = processes[0].position
        for batches in processes:
            batches.close()
    np.testing.assert_array_equal(np.concatenate(read), expected)


def test_a_source_without_a_window_is_refused_unless_it_is_left_out():
    corpus = counting_corpus(weights={"code": 1.0, "math": 0.0, "prose": 1.0}, code=100, math=0, prose=T)
    with pytest.raises(
        ValueError, match=rf"data\.sequence_length={T}: the source prose of counting has {T} .*data.mixture"
    ):
        open_batches(corpus, mixture="")
    batches = open_batches(corpus, mixture="code=1")
    assert batches.next(30).max() < SOURCE_STRIDE
    batches.close()
    assert batches.epochs(30)["prose"] == batches.epochs(30)["math"] == 0
    with pytest.raises(ValueError, match=r"source prose"):
        open_batches(corpus, mixture="0:code=1;100000:prose=1")
    with pytest.raises(ValueError, match=r"no source of the corpus is called so"):
        open_batches(corpus, mixture="poetry=1")


def test_the_weights_of_the_corpus_hold_unless_the_run_has_its_own():
    corpus = counting_corpus(weights={"code": 3.0, "prose": 1.0}, code=100, prose=100)
    for mixture, share in [("", 0.75), ("code=1,prose=1", 0.5)]:
        batches = open_batches(corpus, mixture=mixture)
        assert np.mean(batches.next(1024)[:, 0] < SOURCE_STRIDE) == share
        assert batches.mixture.shares(0).tolist() == [share, 1 - share]
        batches.close()
