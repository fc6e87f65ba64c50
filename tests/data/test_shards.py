"""A file between stages is whole or not there."""

import pathlib

import numpy as np
import pytest

from dsv3_jax.data import shards


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    shards.write_json(path, {"old": "ä"})
    with pytest.raises(KeyError), shards.written_whole(path) as file:
        file.write(b"half of it")
        assert next(p.name for p in tmp_path.iterdir() if p != path).endswith(".tmp")
        raise KeyError
    assert list(tmp_path.iterdir()) == [path] and shards.read_json(path) == {"old": "ä"}


def test_errors_of_writing_name_the_path_once(tmp_path):
    with (
        pytest.raises(OSError, match=r"free space and start again.*tmp/some/path"),
        shards.naming(pathlib.Path("/tmp/some/path")),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="other") as error, shards.naming(tmp_path):
        (tmp_path / "other").read_bytes()
    assert str(error.value).count(str(tmp_path)) == 1


def test_an_index_gives_back_arrays_and_values_by_name(tmp_path):
    arrays = {"sizes": np.arange(3), "empty": np.zeros((0, 32), np.uint8)}
    shards.write_index(tmp_path / "a.npz", arrays, {"ids": ["\udc80", "é"], "report": {"n": 1}})
    report, empty, ids, sizes = shards.read_index(tmp_path / "a.npz", "report", "empty", "ids", "sizes")
    assert report == {"n": 1} and ids == ["\udc80", "é"] and empty.shape == (0, 32)
    np.testing.assert_array_equal(sizes, [0, 1, 2])


def test_pieces_are_read_in_any_order_from_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes(range(number, number + 10)))
    with shards.RandomReader() as reader:
        pieces = [reader.read(tmp_path / str(i), offset, 3) for i, offset in [(0, 0), (4, 5), (1, 2), (3, 7), (0, 6)]]
    assert pieces == [bytes(range(first, first + 3)) for first in (0, 9, 3, 10, 6)]


def test_leading_integers_order_hashes_as_their_bytes():
    digests = np.array([[0] * 7 + [1] + [9] * 24, [255] * 32, [1] + [0] * 31], np.uint8)
    assert shards.leading_integers(digests).tolist() == [1, 2**64 - 1, 2**56]
    assert shards.leading_integers(digests, begin=8).tolist()[1:] == [2**64 - 1, 0]
