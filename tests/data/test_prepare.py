"""A prepared corpus is exactly its documents, whoever worked on it, and is whole or not there."""

import hashlib
import json
import resource
import shutil

import numpy as np
import pytest
import tokenizers
from small_text import contents, no_progress, preparation, prepared_in, source, write_documents
from tokenizers import normalizers

from dsv3_jax.data import assembly, open_corpus, prepare
from dsv3_jax.data.runner import SerialRunner, open_runner


def text_of(tokenizer, tokens) -> str:
    """Puts a document together again, whatever its form: an oracle that knows FIM by its tokens alone."""
    bos, *inner, eos = tokens.tolist()
    assert (bos, eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    begin, hole, end = tokenizer.fim_token_ids
    if begin not in inner:
        return tokenizer.decode_bytes(inner).decode()
    assert inner[0] == begin
    prefix = inner[1 : inner.index(hole)]
    suffix = inner[inner.index(hole) + 1 : inner.index(end)]
    middle = inner[inner.index(end) + 1 :]
    return b"".join(map(tokenizer.decode_bytes, (prefix, middle, suffix))).decode()


def test_token_files_hold_every_document_once(small_corpus, text_directory):
    texts = {path.read_text("utf-8") for path in text_directory.iterdir()}
    tokenizer = small_corpus.tokenizer
    begin = tokenizer.fim_token_ids[0]
    (account,) = small_corpus.manifest["sources"].values()
    assert account["collected"] == {
        "rows": 60, "documents": 60, "utf8_bytes": sum(len(text.encode()) for text in texts)
    }  # fmt: skip
    found = []
    for split, of_split in account["splits"].items():
        (prepared_source,) = small_corpus.sources.values()
        tokens, offsets = prepared_source.tokens(split), prepared_source.document_offsets(split)
        assert tokens.dtype == np.uint16 and offsets.dtype == np.int64 and offsets[0] == 0
        documents = np.split(tokens, offsets[1:])
        assert len(documents.pop()) == 0
        split_texts = [text_of(tokenizer, ids) for ids in documents]
        num_cut = sum(begin in ids for ids in documents)
        if split == "heldout":
            assert [ids.tolist() for ids in documents] == [tokenizer.encode_document(text) for text in split_texts]
            assert of_split["statistics"]["boundary_splits"] == 0
        else:
            assert 5 <= num_cut <= 25  # 0.3 of about 48
            assert 0 < of_split["statistics"]["boundary_splits"] < of_split["statistics"]["boundary_tokens"]
        assert of_split["statistics"]["fim_documents"] == num_cut
        assert of_split["documents"] == len(documents)
        assert of_split["tokens"] == len(tokens)
        assert of_split["utf8_bytes"] == sum(len(text.encode()) for text in split_texts)
        data = (small_corpus.directory / of_split["file"]).read_bytes()
        assert of_split["sha256"] == hashlib.sha256(data).hexdigest()
        hashes = [hashlib.sha256(text.encode()).digest() for text in split_texts]
        assert hashes == sorted(hashes)  # the order of the documents depends on nothing but their texts
        found += split_texts
    assert len(found) == len(texts) and set(found) == texts
    np.testing.assert_array_equal(small_corpus.token_bytes, [len(token) for token in tokenizer.token_bytes])


def test_the_manifest_names_every_file_but_itself(small_corpus):
    files = contents(small_corpus.directory)
    del files["manifest.json"]
    assert small_corpus.manifest["files"] == {name: len(data) for name, data in files.items()}


def test_token_ids_beyond_16_bits_are_kept(tmp_path, text_directory):
    prepared_in(tmp_path / "own", text_directory)
    shutil.copytree(tmp_path / "own" / "tokenizer", tmp_path / "tokenizer")
    definition = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"]["a"] = 70_000
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    prepared_in(tmp_path / "wide", text_directory, tokenizer=str(tmp_path / "tokenizer"))
    wide, own = open_corpus(tmp_path / "wide"), open_corpus(tmp_path / "own")
    assert wide.vocab_size == 70_001
    a = own.tokenizer.token_bytes.index(b"a")
    expected = own.sources["given"].tokens("train").astype(np.int64)
    expected[expected == a] = 70_000
    assert wide.sources["given"].tokens("train").dtype == np.uint32
    np.testing.assert_array_equal(wide.sources["given"].tokens("train"), expected)


def test_bytes_do_not_depend_on_workers_or_shards(tmp_path, monkeypatch):
    for number, name in enumerate(("one", "two")):
        write_documents(tmp_path / name, num_documents=40, words_per_document=60, seed=number)
    given = [source(name, tmp_path / name) for name in ("one", "two")]
    for max_bytes, setups in (
        (0, [(10**7, 1), (2_000, 1), (5_000, 2)]),
        (20_000, [(5_000, 1), (5_000, 2), (5_000, 4)]),
    ):
        made = []
        for shard_bytes, num_workers in setups:
            monkeypatch.setattr(assembly, "SHARD_BYTES", shard_bytes)
            directory = tmp_path / f"{max_bytes}-{shard_bytes}-{num_workers}"
            with open_runner("local", num_workers=num_workers, ray_address="") as runner:
                arguments = preparation(*given, max_bytes=max_bytes)
                assert prepare.prepare(arguments, directory, runner=runner, on_progress=no_progress)
            made.append(contents(directory))
        assert made[0] == made[1] == made[2]
    assert open_corpus(directory).manifest["sources"]["one"]["removed"]["over_budget"]["documents"] > 0


def test_rejections_are_counted_named_and_stop_above_a_share(tmp_path):
    write_documents(tmp_path / "text", num_documents=20, words_per_document=40)
    (tmp_path / "text" / "empty.txt").write_text(" \n")
    (tmp_path / "text" / "latin1.txt").write_bytes("zwölf".encode("latin-1"))
    prepared_in(tmp_path / "corpus", tmp_path / "text", max_broken_share=0.05)
    (account,) = open_corpus(tmp_path / "corpus").manifest["sources"].values()
    assert account["collected"]["rows"] == 22 and account["collected"]["documents"] == 20
    assert {reason: removed["documents"] for reason, removed in account["removed"].items()} == {
        "empty": 1, "not_utf8": 1
    }  # fmt: skip
    assert account["removed"]["not_utf8"]["examples"][0][0].endswith("latin1.txt")
    with pytest.raises(ValueError, match=r"broken rows=1: of 22 .*latin1\.txt"):
        prepared_in(tmp_path / "strict", tmp_path / "text", max_broken_share=0.04)


def test_a_corpus_without_heldout_documents_opens(tmp_path, text_directory):
    prepared_in(tmp_path / "corpus", text_directory / "document_0.txt", heldout_fraction=0.0)
    corpus = open_corpus(tmp_path / "corpus")
    assert len(corpus.sources["given"].tokens("heldout")) == corpus.num_tokens("heldout") == 0
    with pytest.raises(ValueError, match=r"heldout_fraction=0\.1: leaves none of 1 document"):
        prepared_in(tmp_path / "other", text_directory / "document_0.txt", heldout_fraction=0.1)


def test_preparing_again_does_nothing_or_refuses(tmp_path, text_directory):
    directory = tmp_path / "corpus"
    directory.mkdir()
    assert prepared_in(directory, text_directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert not prepared_in(directory, text_directory)
    assert not prepared_in(directory, text_directory, max_broken_share=1.0)  # leaves no trace in a corpus
    with pytest.raises(ValueError, match=r"vocab_size=400 \(asked: 351\)"):
        prepared_in(directory, text_directory, vocab_size=351)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        prepared_in(text_directory, text_directory)


def test_a_recipe_is_recorded_by_its_hash(tmp_path, text_directory):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("# one")
    prepared_in(tmp_path / "corpus", text_directory, recipe=str(recipe))
    recorded = open_corpus(tmp_path / "corpus").manifest["arguments"]["recipe"]
    assert recorded == {"path": str(recipe), "sha256": hashlib.sha256(b"# one").hexdigest()}
    recipe.write_text("# two")
    with pytest.raises(ValueError, match=r"recipe=.*\(asked:"):
        prepared_in(tmp_path / "corpus", text_directory, recipe=str(recipe))


def test_a_tokenizer_that_loses_bytes_is_refused(tmp_path, small_corpus, text_directory):
    shutil.copytree(small_corpus.directory / "tokenizer", tmp_path / "tokenizer")
    path = str(tmp_path / "tokenizer" / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.normalizer = normalizers.Replace("\n", "")
    backend.save(path)
    with pytest.raises(ValueError, match="byte-level BPE without a normalizer"):
        prepared_in(tmp_path / "corpus", text_directory, tokenizer=str(tmp_path / "tokenizer"))
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("limit, file", [(2_000, r"units\.json"), (60_000, r"corpus/tokens/.*\.npy")])
def test_a_full_disk_names_the_path_and_the_work_goes_on_from_there(tmp_path, monkeypatch, limit, file):
    monkeypatch.setattr(assembly, "SHARD_BYTES", 20_000)
    write_documents(tmp_path / "text", num_documents=60, words_per_document=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match=rf"corpus\.partial/{file}"):
            prepared_in(tmp_path / "corpus", tmp_path / "text", min_similarity=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "corpus").exists()
    assert (tmp_path / "corpus.partial").exists() == (limit == 60_000)  # where nothing was done, nothing is left
    prepared_in(tmp_path / "corpus", tmp_path / "text", min_similarity=0.0)
    prepared_in(tmp_path / "undisturbed", tmp_path / "text", min_similarity=0.0)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "undisturbed")


def test_a_directory_that_cannot_be_written_is_named(tmp_path, text_directory):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/corpus"):
        prepared_in(tmp_path / "file" / "corpus", text_directory)


def test_a_corpus_is_prepared_by_one_at_a_time(tmp_path, text_directory):
    refused = []

    def prepare_meanwhile(stage, done_bytes, total_bytes):
        if stage == "encoding" and not refused:
            with pytest.raises(ValueError, match="another process") as error:
                prepared_in(tmp_path / "corpus", text_directory)
            refused.append(error)

    arguments = preparation(text_directory)
    assert prepare.prepare(arguments, tmp_path / "corpus", runner=SerialRunner(), on_progress=prepare_meanwhile)
    assert refused and open_corpus(tmp_path / "corpus")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_bytes": -1}, "max_bytes=-1"),
        ({"max_document_bytes": 0}, "max_document_bytes=0"),
        ({"vocab_size": 100}, "vocab_size=100: must be at least"),
        ({"tokenizer_bytes": 0}, "tokenizer_bytes=0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction=1.0"),
        ({"fim_rate": 1.5}, "fim_rate=1.5"),
        ({"boundary_split_share": -0.1}, "boundary_split_share=-0.1"),
        ({"min_similarity": 2.0}, "min_similarity=2.0"),
        ({"max_broken_share": 2.0}, "max_broken_share=2.0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        preparation(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"weights.*sum to 0"):
        preparation(source("one", tmp_path, weight=0.0))
