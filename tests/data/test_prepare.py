"""A prepared corpus is exactly its documents, and is whole or not there."""

import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from small_text import no_progress, preparation, write_documents
from tokenizers import normalizers

from dsv3_jax.data import open_corpus, prepare
from dsv3_jax.data.corpus import Document

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "prepare_data.py"


def prepared_in(directory, *sources, **changes) -> bool:
    sources = tuple(str(source) for source in sources)
    return prepare.prepare(preparation(sources=sources, **changes), directory, on_progress=no_progress)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}


def test_token_files_hold_every_document_once(small_corpus, text_directory):
    texts = {path.read_text("utf-8") for path in text_directory.iterdir()}
    tokenizer = small_corpus.tokenizer
    found = []
    for split in ("train", "heldout"):
        (source,) = small_corpus.sources.values()
        tokens = source.tokens(split)
        account = source.account["splits"][split]
        assert tokens.dtype == np.uint16 and tokens.ndim == 1
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
        documents = np.split(tokens, ends + 1)
        assert len(documents.pop()) == 0
        split_texts = [tokenizer.decode_bytes(ids).decode() for ids in documents]
        for ids, text in zip(documents, split_texts):
            assert ids.tolist() == tokenizer.encode_document(text)
        assert account["documents"] == len(documents)
        np.testing.assert_array_equal(source.document_offsets(split), [0, *(ends + 1)])
        assert account["tokens"] == small_corpus.num_tokens(split) == len(tokens)
        assert account["utf8_bytes"] == small_corpus.num_bytes(split) == sum(len(text.encode()) for text in split_texts)
        data = (small_corpus.directory / account["file"]).read_bytes()
        assert account["sha256"] == hashlib.sha256(data).hexdigest()
        found += split_texts
    assert len(found) == len(texts) and set(found) == texts
    np.testing.assert_array_equal(small_corpus.token_bytes, [len(token) for token in tokenizer.token_bytes])


def test_token_ids_beyond_16_bits_are_kept(tmp_path, text_directory):
    tokenizer_directory = tmp_path / "tokenizer"
    prepared_in(tmp_path / "own", text_directory)
    shutil.copytree(tmp_path / "own" / "tokenizer", tokenizer_directory)
    definition = json.loads((tokenizer_directory / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"]["a"] = 70_000
    (tokenizer_directory / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    prepared_in(tmp_path / "wide", text_directory, tokenizer=str(tokenizer_directory))
    wide, own = open_corpus(tmp_path / "wide"), open_corpus(tmp_path / "own")
    assert wide.vocab_size == 70_001
    wide_tokens, own_tokens = (corpus.sources[prepare.SOURCE].tokens("train") for corpus in (wide, own))
    assert wide_tokens.dtype == np.uint32
    a = own.tokenizer.token_bytes.index(b"a")
    expected = own_tokens.astype(np.int64)
    expected[expected == a] = 70_000
    np.testing.assert_array_equal(wide_tokens, expected)


def test_the_split_of_a_document_depends_on_its_text_alone():
    documents = [Document(f"{i}", pathlib.Path(), "s", hashlib.sha256(b"%d" % i).hexdigest(), 1) for i in range(2000)]
    splits = prepare.split(documents, 0.1)
    assert 150 < len(splits["heldout"]) < 250
    assert sorted(splits["train"] + splits["heldout"], key=lambda document: int(document.name)) == documents
    some = prepare.split(documents[::2], 0.1)
    assert set(some["heldout"]) == set(splits["heldout"]) & set(documents[::2])
    assert len(prepare.split(documents[:5], 1e-9)["heldout"]) == 1
    assert prepare.split(documents[:1], 0)["heldout"] == []
    with pytest.raises(ValueError, match=r"heldout_fraction=0\.1: leaves none of 1 document"):
        prepare.split(documents[:1], 0.1)


def test_a_corpus_without_heldout_documents_opens(tmp_path, text_directory):
    prepared_in(tmp_path / "corpus", text_directory / "document_0.txt", heldout_fraction=0)
    corpus = open_corpus(tmp_path / "corpus")
    assert len(corpus.sources[prepare.SOURCE].tokens("heldout")) == corpus.num_tokens("heldout") == 0


def test_preparing_again_does_nothing_or_refuses(tmp_path, text_directory):
    directory = tmp_path / "corpus"
    directory.mkdir()
    assert prepared_in(directory, text_directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert not prepared_in(directory, text_directory)
    with pytest.raises(ValueError, match=r"vocab_size=350 \(asked: 351\)"):
        prepared_in(directory, text_directory, vocab_size=351)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        prepared_in(text_directory, text_directory)


def test_a_tokenizer_that_loses_bytes_leaves_nothing(tmp_path, small_corpus, text_directory):
    shutil.copytree(small_corpus.directory / "tokenizer", tmp_path / "tokenizer")
    path = str(tmp_path / "tokenizer" / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.normalizer = normalizers.Replace("\n", "")
    backend.save(path)
    with pytest.raises(ValueError, match="byte-level BPE without a normalizer"):
        prepared_in(tmp_path / "corpus", text_directory, tokenizer=str(tmp_path / "tokenizer"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("limit, file", [(2_000, "tokenizer"), (60_000, "tokens/text.train.npy")])
def test_a_full_disk_names_the_path_and_leaves_nothing(tmp_path, limit, file):
    write_documents(tmp_path / "text", num_documents=60, words_per_document=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match=rf"corpus\.partial/{file}"):
            prepared_in(tmp_path / "corpus", tmp_path / "text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["text"]


def test_a_corpus_is_prepared_by_one_at_a_time(tmp_path, text_directory):
    refused = []

    def prepare_meanwhile(stage, done_bytes, total_bytes):
        if stage == "encoding" and not refused:
            with pytest.raises(ValueError, match="another process") as error:
                prepared_in(tmp_path / "corpus", text_directory)
            refused.append(error)

    arguments = preparation(sources=(str(text_directory),))
    assert prepare.prepare(arguments, tmp_path / "corpus", on_progress=prepare_meanwhile)
    assert refused and open_corpus(tmp_path / "corpus")


def test_a_killed_preparation_leaves_nothing_that_passes_for_whole(tmp_path):
    write_documents(tmp_path / "text", num_documents=100, words_per_document=2000)
    directory, partial = tmp_path / "corpus", tmp_path / "corpus.partial"
    command = [sys.executable, str(SCRIPT), f"--source={tmp_path}/text", "--vocab_size=350", "--heldout_fraction=0.2"]
    for file in ("tokenizer", "tokens/text.train.npy"):
        process = subprocess.Popen([*command, f"--output={directory}"], start_new_session=True)
        deadline = time.monotonic() + 120
        while not (partial / file).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert partial.exists() and not directory.exists()
        for path in (directory, partial):
            with pytest.raises(ValueError, match=r"data\.corpus"):
                open_corpus(path)
    (partial / "leftover.npy").touch()
    finished = subprocess.run([*command, f"--output={directory}"], capture_output=True, text=True, check=True)
    for split in ("train", "heldout"):
        assert f"{open_corpus(directory).num_tokens(split):,} tokens" in finished.stdout
    assert not partial.exists()
    undisturbed = tmp_path / "undisturbed"
    prepared_in(undisturbed, tmp_path / "text")
    assert contents(directory) == contents(undisturbed)
