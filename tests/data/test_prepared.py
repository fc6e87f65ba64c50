"""A prepared corpus is read as it was written, and refused by name where it is not whole."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import open_corpus
from dsv3_jax.data.prepared import write_corpus
from dsv3_jax.data.tokenizer import train_tokenizer

TEXTS = {"code": {"train": ["x = 1", "y"], "heldout": ["z = 3"]}, "prose": {"train": ["eins zwei"]}}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([], 300)


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    documents = {
        name: {split: tokenizer.encode_documents(texts) for split, texts in splits.items()}
        for name, splits in TEXTS.items()
    }
    directory = tmp_path_factory.mktemp("written") / "corpus"
    return write_corpus(directory, tokenizer, documents, weights={"code": 0.25, "prose": 3.0})


def test_every_source_and_split_is_read_as_written(written, tokenizer):
    corpus = open_corpus(written.directory)
    assert {name: source.weight for name, source in corpus.sources.items()} == {"code": 0.25, "prose": 3.0}
    for name, source in corpus.sources.items():
        for split in ("train", "heldout"):
            texts = TEXTS[name].get(split, [])
            tokens, offsets = source.tokens(split), source.document_offsets(split)
            assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
            documents = [tokens[start:end] for start, end in itertools.pairwise(offsets)]
            assert [document.tolist() for document in documents] == [tokenizer.encode_document(t) for t in texts]
            assert source.num_tokens(split) == len(tokens) == offsets[-1]
            assert source.num_documents(split) == len(texts)
            assert source.num_bytes(split) == sum(len(text.encode()) for text in texts)
    assert (corpus.num_documents("train"), corpus.num_bytes("train"), corpus.num_bytes("heldout")) == (3, 15, 5)
    assert corpus.num_tokens("train") == 15 + 2 * 3
    np.testing.assert_array_equal(corpus.token_bytes, [len(token) for token in tokenizer.token_bytes])


def test_the_fingerprint_is_that_of_what_is_trained_on(written, tokenizer, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(written.directory, moved)
    assert open_corpus(moved).fingerprint == written.fingerprint
    edit_manifest(moved, arguments={"other": 1})
    assert open_corpus(moved).fingerprint == written.fingerprint
    sources = json.loads(json.dumps(written.manifest["sources"]))
    sources["code"]["weight"] = 0.5
    edit_manifest(moved, sources=sources)
    assert open_corpus(moved).fingerprint != written.fingerprint


def test_a_corpus_fits_models_with_a_row_for_every_token(written):
    written.require_fits(ModelConfig(vocab_size=written.vocab_size))
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        written.require_fits(ModelConfig(vocab_size=written.vocab_size - 1))


def test_opening_a_corpus_and_a_tokenizer_need_no_grain(written):
    code = (
        f"import sys, dsv3_jax.data as data; data.open_corpus({str(written.directory)!r}).tokenizer; "
        "print('grain' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def remove_tokens(directory):
    (directory / "tokens" / "code.heldout.npy").unlink()


def truncate_tokens(directory):
    os.truncate(directory / "tokens" / "code.train.npy", 130)


def foreign_manifest(directory):
    (directory / "manifest.json").write_text('{"format": "something else"}')


def manifest_of_the_version_before(directory):
    edit_manifest(directory, version=1)


def half_a_manifest(directory):
    text = (directory / "manifest.json").read_text("utf-8")
    (directory / "manifest.json").write_text(text[: len(text) // 2], "utf-8")


def manifest_without_sources(directory):
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    del manifest["sources"]
    (directory / "manifest.json").write_text(json.dumps(manifest))


def source_without_weight(directory):
    sources = json.loads((directory / "manifest.json").read_text("utf-8"))["sources"]
    del sources["code"]["weight"]
    edit_manifest(directory, sources=sources)


def source_without_heldout(directory):
    sources = json.loads((directory / "manifest.json").read_text("utf-8"))["sources"]
    del sources["prose"]["splits"]["heldout"]
    edit_manifest(directory, sources=sources)


def other_tokenizer(directory):
    path = directory / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("{1,3}", "{1,2}"), "utf-8")


def edit_manifest(directory, **changes):
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    (directory / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove_tokens, r"code\.heldout\.npy': is missing"),
        (truncate_tokens, r"code\.train\.npy': has 130 bytes, the manifest says"),
        (foreign_manifest, r"manifest\.json format='something else'"),
        (manifest_of_the_version_before, r"manifest\.json version=1: .* prepare the corpus again"),
        (half_a_manifest, r"manifest\.json: not JSON"),
        (manifest_without_sources, r"manifest\.json lacks=\['sources'\]"),
        (source_without_weight, r"manifest\.json sources\.code lacks=\['weight'\]"),
        (source_without_heldout, r"manifest\.json sources\.prose\.splits lacks=\['heldout'\]"),
        (other_tokenizer, "is not the tokenizer that made the tokens"),
        (shutil.rmtree, "is no directory"),
    ],
)
def test_a_damaged_corpus_is_refused_by_name(tmp_path, written, damage, message):
    directory = tmp_path / "corpus"
    shutil.copytree(written.directory, directory)
    open_corpus(directory)
    damage(directory)
    with pytest.raises(ValueError, match=message):
        open_corpus(directory)
