"""The loader's bench: it counts the tokens it reads, and both kinds of steps train on the same kind of batches."""

import time

import numpy as np
import pytest

from dsv3_jax.benchmarks import loader
from dsv3_jax.benchmarks.networks import Workload
from dsv3_jax.config import ModelConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "NUM_DOCUMENTS", 8)
        return loader.write_random_corpus(tmp_path_factory.mktemp("loader") / "corpus")


def test_the_random_corpus_has_three_sources_of_whole_documents(corpus):
    assert {name: source.weight for name, source in corpus.sources.items()} == loader.WEIGHTS
    for source in corpus.sources.values():
        tokens = source.tokens("train").reshape(8, loader.DOCUMENT_TOKENS)
        assert (tokens[:, 0] == 0).all() and (tokens[:, -1] == 1).all() and (tokens[:, 1:-1] > 2).all()


def test_tokens_per_second_are_those_that_were_read(corpus, monkeypatch):
    monkeypatch.setattr(loader, "BATCH_TOKENS", 2**10)
    monkeypatch.setattr(loader, "LOADER_TOKENS", 2**12)
    read = []

    class SlowBatches(loader.TrainBatches):
        def next(self, batch_size):
            time.sleep(0.01)
            read.append(batch_size)
            return super().next(batch_size)

    monkeypatch.setattr(loader, "TrainBatches", SlowBatches)
    row = loader.loader_row(corpus, 128)
    assert read == [8] * (1 + 3 * 4)
    assert 0 < row["tokens/s"] < 2**10 / 0.01


def test_both_kinds_of_steps_are_timed(corpus, monkeypatch):
    monkeypatch.setattr(loader, "BURST_STEPS", 2)
    monkeypatch.setattr(loader, "BURSTS", 1)
    model = ModelConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, n_routed_experts=2, kv_lora_rank=4, q_lora_rank=None, qk_rope_head_dim=2,
        qk_nope_head_dim=2, v_head_dim=2, n_group=1, topk_group=1, num_experts_per_tok=1, first_k_dense_replace=1,
        num_nextn_predict_layers=0, precision="fp32",
    )  # fmt: skip
    workload = Workload(model, batch_size=2, sequence_length=16, precisions=())
    in_memory, read = loader.step_rows(corpus, workload, case="micro")
    assert (in_memory["implementation"], read["implementation"]) == ("batches in memory", "batches read")
    assert in_memory["of in memory"] == 1
    assert np.isclose(read["of in memory"], read["s per step"] / in_memory["s per step"])
    assert np.isclose(read["tokens/s"] * read["s per step"], 32)
