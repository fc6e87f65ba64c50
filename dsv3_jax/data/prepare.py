"""Turns text files into a prepared corpus: tokenizer, token files, manifest.

Everything is written to `<directory>.partial` and renamed at the end. Whatever stops the work, a killed process
included, `<directory>` is either whole or not there; the next run clears what a killed one left.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data import corpus, prepared
from dsv3_jax.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train_tokenizer

SOURCE = "text"  # the one source that all documents belong to
BATCH_BYTES = 2_000_000  # text encoded at a time; its tokens take about 100 times that in memory

OnProgress = Callable[[str, int, int | None], None]  # (stage, UTF-8 bytes done, bytes in all if known)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What makes a corpus; recorded in the manifest."""

    sources: tuple[str, ...]  # `installed`, files, directories, globs
    max_bytes: int  # UTF-8 bytes of text in all; 0: no limit
    max_document_bytes: int  # larger files are left out
    vocab_size: int  # tokens of the tokenizer to train; unused when one is given
    tokenizer: str  # directory of the tokenizer to use; empty: train one on the training documents
    heldout_fraction: float  # share of the documents kept from training, chosen by the hash of their text

    def __post_init__(self):
        require(self.max_bytes >= 0, "max_bytes", self.max_bytes, "must not be negative")
        require(self.max_document_bytes > 0, "max_document_bytes", self.max_document_bytes, "must be greater than 0")
        require(self.vocab_size >= MIN_VOCAB_SIZE, "vocab_size", self.vocab_size, f"must be at least {MIN_VOCAB_SIZE}")
        require(0 <= self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "must lie in [0, 1)")


def prepare(preparation: Preparation, directory: str | pathlib.Path, *, on_progress: OnProgress) -> bool:
    """Prepares a corpus in a directory, all or nothing.

    Args:
      preparation: what to prepare.
      directory: where; must not exist, be empty, or hold a corpus prepared with the same arguments.
      on_progress: called often with what is done.

    Returns:
      False if the directory already holds this corpus (its sources are not looked at again), else True.

    Raises:
      ValueError: the directory holds something else, another process prepares it, or the sources make no corpus.
      OSError: a named source cannot be read, or writing failed (a full disk); names the path.
    """
    directory = pathlib.Path(directory)
    given_tokenizer = Tokenizer.load(preparation.tokenizer) if preparation.tokenizer else None
    arguments = _arguments(preparation, given_tokenizer)
    if _is_prepared(directory, arguments):
        return False
    with _partial_directory(directory) as partial:
        manifest = _write(preparation, given_tokenizer, partial, on_progress)
        manifest["arguments"] = arguments
        manifest["files"] = {
            path.relative_to(partial).as_posix(): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        _write_text(partial / prepared.MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        _sync(partial)
        partial.rename(directory)
    return True


def _arguments(preparation: Preparation, given_tokenizer: Tokenizer | None) -> dict:
    """Gives what a manifest records: the arguments as JSON holds them, a given tokenizer by its hash."""
    arguments = dataclasses.asdict(preparation) | {"sources": list(preparation.sources)}
    if given_tokenizer:
        arguments |= {"tokenizer": given_tokenizer.sha256, "vocab_size": given_tokenizer.vocab_size}
    return arguments


def _is_prepared(directory: pathlib.Path, arguments: dict) -> bool:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    existing = prepared.open_corpus(directory).manifest["arguments"]
    changes = [
        f"{name}={existing.get(name)!r} (asked: {asked!r})"
        for name, asked in arguments.items()
        if existing.get(name) != asked
    ]
    require(not changes, "output", str(directory),
            f"holds a corpus with {', '.join(changes)}; name another directory or remove this one")  # fmt: skip
    return True


@contextlib.contextmanager
def _partial_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty `<directory>.partial` that no other process uses, and removes it unless it was renamed."""
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
            is_ours = partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor))
        except BlockingIOError:
            is_ours = False
        require(is_ours, "output", str(directory), "is being prepared by another process; wait, or name another")
        _clear(partial)
        try:
            yield partial
        finally:
            if partial.exists():
                shutil.rmtree(partial)
    finally:
        os.close(descriptor)


def _write(
    preparation: Preparation, tokenizer: Tokenizer | None, directory: pathlib.Path, on_progress: OnProgress
) -> dict:
    """Writes everything but the manifest, and returns the manifest's account of it."""
    selection = corpus.select(
        preparation.sources,
        max_bytes=preparation.max_bytes or None,
        max_document_bytes=preparation.max_document_bytes,
        on_document=_Counter("reading", preparation.max_bytes or None, on_progress).add,
    )
    splits = split(selection.documents, preparation.heldout_fraction)
    if tokenizer is None:
        counter = _Counter("training the tokenizer", sum(d.num_bytes for d in splits["train"]), on_progress)
        tokenizer = train_tokenizer((counter.add(d).read() for d in splits["train"]), preparation.vocab_size)
    with _naming(directory / prepared.TOKENIZER):
        tokenizer.save(directory / prepared.TOKENIZER)
    with _naming(directory / prepared.TOKEN_BYTES):
        np.save(directory / prepared.TOKEN_BYTES, tokenizer.num_bytes_of_token)
    counter = _Counter("encoding", selection.num_bytes, on_progress)
    (directory / "tokens").mkdir()
    return {
        "format": prepared.FORMAT,
        "version": prepared.VERSION,
        "tokenizer": prepared.tokenizer_account(tokenizer),
        "sources": {
            SOURCE: {
                "weight": 1.0,
                "kind": "text",
                "language": "",
                "licence": "",
                "splits": {
                    name: _write_split(directory, name, documents, tokenizer, counter)
                    for name, documents in splits.items()
                },
            }
        },
        "parts": _count_sources(selection.documents),
        "skipped": selection.skipped,
    }


def split(documents: list[corpus.Document], heldout_fraction: float) -> dict[str, list[corpus.Document]]:
    """Divides whole documents into "train" and "heldout" by the hash of their text, so that no other file matters.

    Held out are the documents whose hash lies below heldout_fraction of its range, and at least the lowest one.

    Raises:
      ValueError: nothing is left to train on.
    """
    lowest = min(document.sha256 for document in documents)
    is_heldout = {
        document.sha256: heldout_fraction > 0
        and (int(document.sha256[:16], 16) < heldout_fraction * 2**64 or document.sha256 == lowest)
        for document in documents
    }
    splits = {
        "train": [document for document in documents if not is_heldout[document.sha256]],
        "heldout": [document for document in documents if is_heldout[document.sha256]],
    }
    require(splits["train"], "heldout_fraction", heldout_fraction, f"leaves none of {len(documents)} document(s) to "
            "train on; add documents, or set it to 0 for a corpus without a held-out part")  # fmt: skip
    return splits


def _write_split(
    directory: pathlib.Path, name: str, documents: list[corpus.Document], tokenizer: Tokenizer, counter: "_Counter"
) -> dict:
    dtype = prepared.token_dtype(tokenizer.vocab_size)
    path, offsets_path = (directory / file(SOURCE, name) for file in (prepared.tokens_file, prepared.offsets_file))
    offsets = [0]
    with _naming(path), path.open("w+b") as file:
        _write_npy_header(file, dtype, 0)
        for batch in _batches(documents):
            for ids in tokenizer.encode_documents([document.read() for document in batch]):
                file.write(ids.astype(dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
            for document in batch:
                counter.add(document)
        _write_npy_header(file, dtype, offsets[-1])
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with _naming(offsets_path):
        np.save(offsets_path, np.array(offsets, "<i8"))
    return {
        "file": prepared.tokens_file(SOURCE, name),
        "offsets_file": prepared.offsets_file(SOURCE, name),
        "dtype": dtype.name,
        "documents": len(documents),
        "utf8_bytes": sum(document.num_bytes for document in documents),
        "tokens": offsets[-1],
        "sha256": digest,
    }


def _write_npy_header(file, dtype: np.dtype, num_elements: int) -> None:
    """Writes the header of a flat .npy file at its start. NumPy pads it so that its length fits any element count."""
    file.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (num_elements,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(documents: list[corpus.Document]) -> Iterator[list[corpus.Document]]:
    batch, num_bytes = [], 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _count_sources(documents: list[corpus.Document]) -> dict[str, dict[str, int]]:
    counts = {}
    for document in documents:
        count = counts.setdefault(document.source, {"documents": 0, "utf8_bytes": 0})
        count["documents"] += 1
        count["utf8_bytes"] += document.num_bytes
    return counts


class _Counter:
    """Adds up the bytes of documents and reports them."""

    def __init__(self, stage: str, total_bytes: int | None, on_progress: OnProgress):
        self._stage = stage
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0

    def add(self, document: corpus.Document) -> corpus.Document:
        self._done_bytes += document.num_bytes
        self._on_progress(self._stage, self._done_bytes, self._total_bytes)
        return document


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the path into an OSError that names none: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        message = f"{error.strerror}; nothing half-written is left, free space and start again"
        raise OSError(error.errno, message, str(path)) from error


def _write_text(path: pathlib.Path, text: str) -> None:
    with _naming(path):
        path.write_text(text, "utf-8")


def _clear(directory: pathlib.Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(directory: pathlib.Path) -> None:
    """Makes the directory's files durable before the rename that declares them whole."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
