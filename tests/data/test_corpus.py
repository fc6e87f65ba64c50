"""Which files make a corpus, in which order, and what is said of the others."""

import hashlib
import os

import pytest

from dsv3_jax.data import corpus


def select(*sources, max_bytes=None, max_document_bytes=1000):
    chosen = []
    selection = corpus.select(
        [str(source) for source in sources],
        max_bytes=max_bytes,
        max_document_bytes=max_document_bytes,
        on_document=chosen.append,
    )
    assert chosen == selection.documents
    return selection


@pytest.fixture
def tree(tmp_path):
    files = {
        "a.txt": b"first",
        "deep/b.md": "zwölf".encode(),
        "deep/copy_of_a.rst": b"first",
        "deep/c.py": b"x = 1\n",
        "empty.txt": b" \n\t",
        "latin1.txt": "zwölf".encode("latin-1"),
        "utf16.txt": "text".encode("utf-16-le"),
        "huge.txt": b"x" * 1001,
        "ignored.bin": b"binary",
        "__pycache__/cached.py": b"cached",
        ".git/hidden.txt": b"hidden",
    }
    root = tmp_path / "tree"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "broken.txt").symlink_to("nowhere")
    return root


def test_every_file_is_chosen_or_counted(tree):
    selection = select(tree)
    assert sorted(document.read() for document in selection.documents) == ["first", "x = 1\n", "zwölf"]
    assert selection.num_bytes == 5 + 6 + 6
    assert selection.skipped == {
        "duplicate": 1, "empty": 1, "not_utf8": 2, "over_budget": 0, "too_large": 1, "unreadable": 1,
    }  # fmt: skip


def test_the_order_is_that_of_the_hashes_of_the_names(tmp_path):
    for place, indices in (("here", range(20)), ("there", reversed(range(20)))):
        root = tmp_path / place / "text"
        root.mkdir(parents=True)
        for index in indices:
            (root / f"{index:02}.txt").write_text(f"{place} {index}")
        names = [document.name for document in select(root).documents]
        expected = [f"text/{index:02}.txt" for index in range(20)]
        assert names == sorted(expected, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def test_a_budget_cuts_all_sources_alike(tmp_path):
    for source in ("one", "two"):
        (tmp_path / source).mkdir()
        for i in range(20):
            (tmp_path / source / f"{i}.txt").write_text(f"{source} {i:5}")  # 9 bytes
    selection = select(tmp_path / "one", tmp_path / "two", max_bytes=9 * 10 + 8)
    sources = [document.source for document in selection.documents]
    assert sources == [str(tmp_path / "one"), str(tmp_path / "two")] * 5
    assert selection.skipped["over_budget"] == 30


def test_globs_take_every_kind_of_file(tree):
    assert [document.path.name for document in select(f"{tree}/**/*.bin").documents] == ["ignored.bin"]


def test_a_named_file_must_be_readable(tree):
    assert [document.read() for document in select(tree / "a.txt").documents] == ["first"]
    with pytest.raises(FileNotFoundError, match=r"broken\.txt"):
        select(tree / "broken.txt")


def test_sources_without_documents_are_refused_by_name(tree):
    with pytest.raises(ValueError, match=r"source='/no/such\*': matches no file"):
        select("/no/such*")
    (tree / "none").mkdir()
    with pytest.raises(ValueError, match=r"none': has no \.py"):
        select(tree / "none")
    with pytest.raises(ValueError, match=r"no document is left.*'empty': 1"):
        select(tree / "empty.txt")
    with pytest.raises(ValueError, match="sources="):
        select()


def test_a_file_that_changes_after_its_selection_is_noticed(tree):
    (document,) = select(tree / "a.txt").documents
    (tree / "a.txt").write_text("other")
    with pytest.raises(ValueError, match=r"a\.txt.*changed while"):
        document.read()


def test_every_machine_has_a_corpus():
    selection = select(corpus.INSTALLED, max_bytes=400_000, max_document_bytes=100_000)
    assert 200_000 < selection.num_bytes <= 400_000
    assert {document.source for document in selection.documents} >= {"installed/stdlib", "installed/purelib"}
    directories = {part for document in selection.documents for part in document.name.split("/")[:-1]}
    assert not directories & {"test", "tests", "__pycache__"}
    stdlib = os.path.dirname(os.__file__)
    assert all(str(d.path).startswith(stdlib) for d in selection.documents if d.source == "installed/stdlib")
