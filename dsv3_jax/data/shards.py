"""Files between the stages of a preparation: shards of documents, then of their tokens. A file is whole or not there.

A shard of documents is NAME.text, the UTF-8 of its documents one after the other, NAME.signatures.npy, and NAME.npz,
what else is known of each. A shard of tokens is NAME.tokens and NAME.npz. The .npz is written last: where it is, the
shard is whole.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

MAX_OPEN_FILES = 128


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Gives a file to write that gets its name when all of it is on disk.

    Raises:
      OSError: writing failed (a full disk); names the path.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the path into an OSError that names none: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        message = f"{error.strerror}; what is whole is kept: free space and start again to continue"
        raise OSError(error.errno, message, str(path)) from error


def sync(directory: pathlib.Path) -> None:
    """Makes the directory's files durable before the rename that declares them whole."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape"))


def read_json(path: pathlib.Path) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))


def write_index(path: pathlib.Path, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Writes arrays and JSON values as one .npz, whole or not at all; `read_index` gives them back."""
    texts = {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in values.items()}
    with written_whole(path) as file:
        np.savez(file, **arrays, **{f"{name}.json": text for name, text in texts.items()})


def read_index(path: pathlib.Path, *names: str) -> list[Any]:
    """Reads some of the arrays and values of an .npz that `write_index` wrote."""
    with np.load(path) as file:
        return [file[name] if name in file else json.loads(file[f"{name}.json"].tobytes()) for name in names]


def index(shard: pathlib.Path) -> pathlib.Path:
    """Names the .npz of a shard, which is there when the shard is whole."""
    return shard.with_suffix(".npz")


def signatures(shard: pathlib.Path) -> pathlib.Path:
    """Names the MinHash signatures of a shard of documents."""
    return shard.with_suffix(".signatures.npy")


def map_array(path: pathlib.Path) -> np.ndarray:
    """Maps a .npy file into memory; one without elements is read."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, *_ = np.lib.format.read_array_header_1_0(file)
    return np.load(path, mmap_mode="r" if all(shape) else None)


def leading_integers(digests: np.ndarray, begin: int = 0) -> np.ndarray:
    """Reads eight bytes of each hash, uint8 [n, 32], as a number: uint64 [n], big-endian in memory."""
    return np.ascontiguousarray(digests[:, begin : begin + 8]).view(">u8")[:, 0]


def read_slices(path: pathlib.Path, sizes: np.ndarray) -> Iterator[bytes]:
    """Gives consecutive pieces of a file, one at a time.

    Args:
      path: what to read.
      sizes: bytes of each piece.
    """
    with path.open("rb") as file:
        for size in sizes.tolist():
            yield file.read(size)


class RandomReader:
    """Reads pieces of many files in any order, with a bounded number of files open and nothing mapped. A context
    manager."""

    def __init__(self):
        self._open = functools.lru_cache(MAX_OPEN_FILES)(_OpenFile)

    def __enter__(self) -> "RandomReader":
        return self

    def __exit__(self, *_) -> None:
        self._open.cache_clear()

    def read(self, path: pathlib.Path, offset: int, num_bytes: int) -> bytes:
        """Reads num_bytes from offset on."""
        return os.pread(self._open(path).fileno(), num_bytes, offset)


class _OpenFile(io.FileIO):
    """A file that closes when the cache drops it."""

    def __del__(self):
        self.close()
