"""Documents of a unit, read as a stream: text files, JSON lines, Parquet, ArrayRecord, Hugging Face datasets.

What cannot be read is said, not skipped: every file, row or record gives a `RawDocument` or a `Rejected` that names it.
A file of rows that is cut off or damaged has lost an unknown number of them, and stops the work. Memory is bounded by
`max_document_bytes`, whatever stands in a file; Parquet adds a row group.
"""

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import os
import types
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from dsv3_jax.config import require

FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
# Reasons that speak of damage, not of taste: above some share the source is not what it is taken for.
BROKEN = frozenset({"broken_row", "missing_field", "not_utf8", "unreadable"})

_ROWS = 64  # read at a time: each may be as large as a document
_OTHER_FIELDS_BYTES = 1 << 20  # of a JSON line, besides its text


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of a source that is read at once: a file, or a part of a large one. Small enough to send to a worker."""

    source: str  # name of the source
    name: str  # where its documents come from; the same on every machine
    path: str  # the file, or what a dataset is called
    format: str  # text, jsonl, jsonl.gz, jsonl.zst, parquet, array_record, hf
    num_bytes: int  # on disk; 0 if not known
    text_field: str  # of a row; "": the record itself is the text (array_record)
    begin: int = 0  # first byte (jsonl), row group (parquet), record (array_record), shard (hf)
    end: int = 0  # the one behind the last (hf: number of shards); 0: all of the file
    is_named: bool = False  # the user named this very file: if it cannot be read, that is an error


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """Text as it stands in a source."""

    id: str  # the unit's name and the place in it; the same on every machine
    text: str


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A file, row or record that gives no document."""

    reason: str  # empty, too_large, or one of `BROKEN`
    where: str  # file, or file:line, or file and row
    num_bytes: int  # that are lost
    detail: str = ""  # what the parser said


def format_of(file_name: str) -> str:
    """Tells the format of a file by its suffix; "text" is every file that is none of rows."""
    for suffix, format in FORMAT_OF_SUFFIX.items():
        if file_name.lower().endswith(suffix):
            return format
    return "text"


def read_unit(unit: Unit, *, max_document_bytes: int) -> Iterator[RawDocument | Rejected]:
    """Gives the documents of a unit in their order.

    Args:
      unit: what to read.
      max_document_bytes: documents whose UTF-8 text is larger are rejected as too_large, without being held.

    Raises:
      OSError: the unit cannot be read, and is a file of rows or one that the user named. A text file that was found is
        rejected as unreadable.
      ValueError: a file of rows is damaged, or an optional library is missing.
    """
    try:
        yield from _READERS[unit.format](unit, max_document_bytes)
    except OSError as error:
        if unit.is_named or unit.format != "text":
            raise
        yield Rejected("unreadable", unit.path, unit.num_bytes, str(error.strerror or error))


def require_mostly_whole(
    source: str, *, num_rows: int, num_broken: int, examples: Sequence[Rejected], max_broken_share: float
) -> None:
    """Raises a ValueError if too many rows of a source are broken; names some of them.

    Args:
      source: name of the source.
      num_rows: its documents and rejections.
      num_broken: rejections whose reason is in `BROKEN`.
      examples: some of them.
      max_broken_share: share of broken rows that is put up with.
    """
    first = "; ".join(f"{r.where}: {r.reason}{f' ({r.detail})' if r.detail else ''}" for r in examples)
    require(num_broken <= max_broken_share * num_rows, f"source {source!r} broken rows", num_broken,
            f"of {num_rows} are more than max_broken_share={max_broken_share:g}; mend the files, name the right "
            f"text_field, or raise max_broken_share. For example {first}")  # fmt: skip


def parts(unit: Unit, *, target_bytes: int) -> Iterator[Unit]:
    """Cuts a file into units of about target_bytes where its format allows.

    JSON lines that are not compressed are cut at bytes, Parquet at row groups, ArrayRecord at records.

    Raises:
      ValueError: a Parquet or ArrayRecord file is none, or has no such text field.
    """
    if unit.format == "jsonl":
        sizes = [min(target_bytes, unit.num_bytes - begin) for begin in range(0, unit.num_bytes, target_bytes)]
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
    elif unit.format == "parquet":
        ends, sizes = _parquet_parts(unit, target_bytes)
    elif unit.format == "array_record":
        ends, sizes = _array_record_parts(unit, target_bytes)
    else:
        ends, sizes = [0], [unit.num_bytes]
    for begin, end, num_bytes in zip([0, *ends], ends, sizes):
        yield dataclasses.replace(unit, begin=begin, end=end, num_bytes=num_bytes)


def open_hugging_face(name: str) -> Any:
    """Opens NAME[:CONFIG[:SPLIT]] as a stream of rows; the split is `train` unless given.

    Raises:
      ValueError: the dataset, configuration or split is not there, or cannot be reached.
    """
    datasets = _library("datasets", extra="hf")
    dataset, config, split = [*name.split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub, the network and the loaders raise what they like
        raise ValueError(
            f"hf:{name}: cannot be opened ({error}); check name, configuration, split and network"
        ) from error


def _library(name: str, *, extra: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is not installed; pip install 'dsv3-jax[{extra}]'") from error


def _document(id: str, data: bytes | str, where: str, max_document_bytes: int) -> RawDocument | Rejected:
    """Makes a document of its text or its UTF-8."""
    try:
        encoded = data.encode("utf-8") if isinstance(data, str) else data
        if len(encoded) > max_document_bytes:
            return Rejected("too_large", where, len(encoded))
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeError as error:
        return Rejected("not_utf8", where, len(data), error.reason)
    if not text or text.isspace():
        return Rejected("empty", where, len(encoded))
    return RawDocument(id, text)


def _read_text(unit: Unit, max_document_bytes: int) -> Iterator[RawDocument | Rejected]:
    with open(unit.path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_document_bytes:
            yield Rejected("too_large", unit.path, num_bytes)
        else:
            yield _document(unit.name, file.read(), unit.path, max_document_bytes)


def _read_json_lines(unit: Unit, max_document_bytes: int) -> Iterator[RawDocument | Rejected]:
    max_line_bytes = 6 * max_document_bytes + _OTHER_FIELDS_BYTES  # \u0041 is one byte of text
    lines_before = None
    with _open_lines(unit) as file:
        for number, offset, line in _lines(file, unit, max_line_bytes):
            if line.isspace():
                continue
            if len(line) > max_line_bytes:
                row = Rejected("too_large", "", len(line))
            else:
                row = _json_row(f"{unit.name}@{offset}", line, unit.text_field, max_document_bytes)
            if isinstance(row, Rejected):
                if lines_before is None:
                    lines_before = _count_lines(unit.path, offset) + 1 - number if unit.begin else 0
                row = dataclasses.replace(row, where=f"{unit.path}:{lines_before + number}")
            yield row


def _open_lines(unit: Unit) -> BinaryIO:
    if unit.format == "jsonl.gz":
        return gzip.open(unit.path)
    if unit.format == "jsonl.zst":  # the zstandard package takes a file that was cut off for whole; pyarrow does not
        os.stat(unit.path)
        return io.BufferedReader(_library("pyarrow", extra="data").input_stream(unit.path, compression="zstd"))
    return open(unit.path, "rb")


def _lines(file: BinaryIO, unit: Unit, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Gives (number, offset, line) of the lines that begin in the unit, the first as number 1.

    A line longer than max_bytes is passed over and gives its first bytes, max_bytes + 1 of them.
    """
    offset = unit.begin
    if unit.begin:
        file.seek(unit.begin - 1)
        while not (rest := file.readline(max_bytes)).endswith(b"\n") and rest:
            offset += len(rest)
        offset += len(rest) - 1
    number = 0
    while not unit.end or offset < unit.end:
        with _naming_damage(unit, f"after line {number}"):
            line = rest = file.readline(max_bytes + 1)
            num_bytes = len(line)
            while len(rest) > max_bytes and not rest.endswith(b"\n"):
                rest = file.readline(max_bytes + 1)
                num_bytes += len(rest)
        if not line:
            break
        number += 1
        yield number, offset, line
        offset += num_bytes


@contextlib.contextmanager
def _naming_damage(unit: Unit, place: str, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what libraries raise about a damaged file into a ValueError that names it."""
    try:
        yield
    except (EOFError, OSError, zlib.error, *errors) as error:
        raise ValueError(
            f"{unit.path}: cut off or damaged {place} ({error}); remove the file or get it again"
        ) from error


def _count_lines(path: str, num_bytes: int) -> int:
    """Counts the line ends in the first bytes of a file."""
    count, left = 0, num_bytes
    with open(path, "rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def _json_row(id: str, line: bytes, text_field: str, max_document_bytes: int) -> RawDocument | Rejected:
    """Makes a document of a line; where it stands is left open."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejected("not_utf8", "", len(line), error.reason)
    except (ValueError, RecursionError) as error:
        return Rejected("broken_row", "", len(line), str(error))
    if text_field:
        if not isinstance(row, dict):
            return Rejected("broken_row", "", len(line), f"a {type(row).__name__}, not an object")
        if row.get(text_field) is None:
            return Rejected("missing_field", "", len(line), f"{text_field!r} is not among {sorted(row)[:10]}")
        row = row[text_field]
    if not isinstance(row, str):
        return Rejected("broken_row", "", len(line), f"its text is a {type(row).__name__}")
    return _document(id, row, "", max_document_bytes)


def _read_parquet(unit: Unit, max_document_bytes: int) -> Iterator[RawDocument | Rejected]:
    arrow = _library("pyarrow", extra="data")
    with _open_parquet(unit) as file:
        number = sum(file.metadata.row_group(group).num_rows for group in range(unit.begin))
        groups = list(range(unit.begin, unit.end))
        batches = file.iter_batches(_ROWS, row_groups=groups, columns=[unit.text_field], use_threads=False)
        while True:
            with _naming_damage(unit, f"after row {number}", (arrow.ArrowException,)):
                batch = next(batches, None)
                if batch is None:
                    return
                column = batch.column(0).cast(arrow.large_binary())  # the file's word for its UTF-8 is not taken
            for value in column:
                number += 1
                where = f"{unit.path}: row {number}"
                if not value.is_valid:
                    yield Rejected("missing_field", where, 0, f"{unit.text_field!r} is null")
                elif value.as_buffer().size > max_document_bytes:
                    yield Rejected("too_large", where, value.as_buffer().size)
                else:
                    yield _document(f"{unit.name}@{number}", value.as_py(), where, max_document_bytes)


def _open_parquet(unit: Unit) -> Any:
    arrow = _library("pyarrow", extra="data")
    parquet = _library("pyarrow.parquet", extra="data")
    try:
        file = parquet.ParquetFile(unit.path)
    except arrow.ArrowException as error:
        raise ValueError(f"{unit.path}: not a Parquet file ({error}); remove it or get it again") from error
    require(unit.text_field in file.schema_arrow.names, f"{unit.path} text_field", unit.text_field,
            f"is none of its columns; there are {', '.join(file.schema_arrow.names)}")  # fmt: skip
    type_ = file.schema_arrow.field(unit.text_field).type
    is_text = any(
        getattr(arrow.types, f"is_{name}")(type_) for name in ("string", "large_string", "binary", "large_binary")
    )
    require(is_text, f"{unit.path} column {unit.text_field} type", str(type_), "is no text; name another text_field")
    return file


def _parquet_parts(unit: Unit, target_bytes: int) -> tuple[list[int], list[int]]:
    with _open_parquet(unit) as file:
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    return _ends(sizes, target_bytes)


def _read_array_record(unit: Unit, max_document_bytes: int) -> Iterator[RawDocument | Rejected]:
    reader = _open_array_record(unit)
    try:
        for begin in range(unit.begin, unit.end, _ROWS):
            with _naming_damage(unit, f"after record {begin}", (RuntimeError,)):
                records = reader.read(begin, min(begin + _ROWS, unit.end))
            for number, record in enumerate(records, begin + 1):
                id, where = f"{unit.name}@{number}", f"{unit.path}: record {number}"
                if unit.text_field:
                    row = _json_row(id, record, unit.text_field, max_document_bytes)
                    yield dataclasses.replace(row, where=where) if isinstance(row, Rejected) else row
                else:
                    yield _document(id, record, where, max_document_bytes)
    finally:
        reader.close()


def _open_array_record(unit: Unit) -> Any:
    os.stat(unit.path)
    reader = _library("array_record.python.array_record_module", extra="data").ArrayRecordReader(unit.path)
    require(reader.ok(), "file", unit.path, "is not an ArrayRecord file, or a damaged one; remove it or get it again")
    return reader


def _array_record_parts(unit: Unit, target_bytes: int) -> tuple[list[int], list[int]]:
    reader = _open_array_record(unit)
    num_records = reader.num_records()
    reader.close()
    num_parts = max(1, min(num_records, -(-unit.num_bytes // target_bytes)))
    ends = [num_records * part // num_parts for part in range(1, num_parts + 1)]
    return ends, [unit.num_bytes // num_parts] * num_parts


def _ends(sizes: list[int], target: int) -> tuple[list[int], list[int]]:
    """Groups neighbours up to about the target; gives the end of every group and its size."""
    ends, totals = [], []
    for index, size in enumerate(sizes):
        if totals and totals[-1] + size <= target:
            totals[-1] += size
            ends[-1] = index + 1
        else:
            totals.append(size)
            ends.append(index + 1)
    return ends, totals


def _read_hugging_face(unit: Unit, max_document_bytes: int) -> Iterator[RawDocument | Rejected]:
    dataset = open_hugging_face(unit.path).shard(num_shards=unit.end, index=unit.begin)
    for number, row in enumerate(dataset, 1):
        where = f"{unit.name}: row {number}"
        text = row.get(unit.text_field)
        if text is None:
            yield Rejected("missing_field", where, 0, f"{unit.text_field!r} is not among {sorted(row)[:10]}")
        elif not isinstance(text, str):
            yield Rejected("broken_row", where, 0, f"its text is a {type(text).__name__}")
        else:
            yield _document(f"{unit.name}@{number}", text, where, max_document_bytes)


_READERS = {
    "text": _read_text,
    "jsonl": _read_json_lines,
    "jsonl.gz": _read_json_lines,
    "jsonl.zst": _read_json_lines,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
    "hf": _read_hugging_face,
}
