"""Safetensors files, read and written one tensor at a time.

The safetensors package's numpy reader does not know FP8 and its writer wants a whole file in memory; the format is
eight bytes of header length, a JSON header, and the tensors back to back.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: pathlib.Path
    dtype: str  # as in the header, e.g. "F8_E4M3"
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file

    def read(self) -> np.ndarray:
        """Reads the tensor into memory of its own; only dtypes in `DTYPES`."""
        values = np.fromfile(self.file, DTYPES[self.dtype], math.prod(self.shape), offset=self.offset)
        return values.reshape(self.shape)


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Returns the tensors of a file by name, without reading them.

    Raises:
      ValueError: the file is not safetensors, or is shorter or longer than its header says.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        _require(2 <= length <= min(_MAX_HEADER_BYTES, size - 8), file, f"has no valid header ({size} bytes in all)")
        try:
            header = json.loads(stream.read(length))
            entries = {name: _entry(file, fields, 8 + length) for name, fields in header.items() if name[:2] != "__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: its safetensors header cannot be read ({error}); fetch it again") from error
    ends = [8 + length] + [end for _, end in entries.values()]
    _require(max(ends) == size, file, f"has {size} bytes where its header says {max(ends)}: truncated or not complete")
    return {name: entry for name, (entry, _) in entries.items()}


def _entry(file: pathlib.Path, fields: dict[str, Any], data_start: int) -> tuple[Entry, int]:
    begin, end = fields["data_offsets"]
    entry = Entry(file, fields["dtype"], tuple(fields["shape"]), data_start + begin)
    if begin < 0 or (entry.dtype in DTYPES and end - begin != num_bytes(entry.dtype, entry.shape)):
        raise ValueError(f"{entry.dtype}{list(entry.shape)} does not fill bytes {begin} to {end}")
    return entry, data_start + end


def _require(claim: bool, file: pathlib.Path, problem: str) -> None:
    if not claim:
        raise ValueError(f"{file}: {problem}; fetch it again")


class Writer:
    """Writes one file whose tensors are known beforehand and arrive one by one, in any order.

    The bytes are those the safetensors library writes: larger dtypes first, then by name, `{"format": "pt"}`.
    """

    def __init__(self, file: pathlib.Path, tensors: dict[str, tuple[str, tuple[int, ...]]]):
        """Creates the file.

        Args:
          file: does not exist yet.
          tensors: name -> (dtype as in `DTYPES`, shape).
        """
        self._tensors = tensors
        self._offsets = {}
        self._header = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
            dtype, shape = tensors[name]
            begin, end = end, end + num_bytes(dtype, shape)
            self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            self._offsets[name] = begin
        text = json.dumps(self._header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._stream = open(file, "xb")  # noqa: SIM115
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor; its dtype and shape are the announced ones."""
        dtype, shape = self._tensors[name]
        assert (values.dtype, values.shape) == (DTYPES[dtype], shape), (name, values.dtype, values.shape, dtype, shape)
        self._stream.seek(self._data_start + self._offsets.pop(name))
        self._stream.write(np.ascontiguousarray(values).view(np.uint8).data)

    def close(self) -> None:
        """Flushes the file to disk; every announced tensor must have been written."""
        assert not self._offsets, f"not written: {list(self._offsets)}"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes that a tensor occupies in a file."""
    return math.prod(shape) * DTYPES[dtype].itemsize
