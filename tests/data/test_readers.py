"""What is read from every format, and what is said of what cannot be read."""

import gzip
import json

import pytest

from dsv3_jax.data import readers
from dsv3_jax.data.readers import RawDocument, Rejected, Unit, read_unit


def unit(path, **changes):
    format = readers.format_of(path.name)
    return Unit(**{"source": "s", "name": f"s/{path.name}", "path": str(path), "format": format,
                   "num_bytes": path.stat().st_size, "text_field": "text"} | changes)  # fmt: skip


def read(unit, max_document_bytes=1000):
    return list(read_unit(unit, max_document_bytes=max_document_bytes))


def texts(rows):
    return [row.text for row in rows if isinstance(row, RawDocument)]


def rejections(rows):
    return [(row.reason, row.where.rsplit("/", 1)[-1]) for row in rows if isinstance(row, Rejected)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("zwölf".encode("latin-1"), "not_utf8"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"x" * 1001, "too_large"),
        ("é".encode() * 501, "too_large"),
    ],
)
def test_text_that_gives_no_document_is_named_with_its_reason(tmp_path, data, reason):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    (row,) = read(unit(path))
    assert isinstance(row, Rejected)
    assert (row.reason, row.where, row.num_bytes) == (reason, str(path), len(data))


def test_text_is_read_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffcr\r\nzwölf 十二 😀".encode())
    assert read(unit(path)) == [RawDocument("s/a.txt", "\ufeffcr\r\nzwölf 十二 😀")]


def test_an_unreadable_file_is_counted_when_found_and_an_error_when_named(tmp_path):
    path = tmp_path / "gone.txt"
    path.write_text("text")
    found, named = unit(path), unit(path, is_named=True)
    path.unlink()
    assert rejections(read(found)) == [("unreadable", "gone.txt")]
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        read(named)


BROKEN_LINES = [
    (json.dumps({"text": "one"}).encode(), None),
    (b'{"text": "cut', "broken_row"),
    (b"", "blank"),
    (b'["text"]', "broken_row"),
    (b'{"text": 5}', "broken_row"),
    (b'{"body": "none"}', "missing_field"),
    (b'{"text": null}', "missing_field"),
    (b'{"text": "\xff"}', "not_utf8"),
    (b'{"text": "\\ud800"}', "not_utf8"),
    (b'{"text": "  "}', "empty"),
    (json.dumps({"text": "x" * 1001}).encode(), "too_large"),
    (('{"text": "' + "é" * 501 + '"}').encode(), "too_large"),
    (b'{"text": "' + b"y" * 2_000_000 + b'"}', "too_large"),
    (b"[" * 100_000, "broken_row"),
    (json.dumps({"text": "zwölf 十二"}).encode(), None),
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_broken_line_is_named_by_its_number(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    data = b"\n".join(line for line, _ in BROKEN_LINES)  # the last line has no end
    if suffix == "jsonl.zst":
        arrow = pytest.importorskip("pyarrow")
        with arrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if suffix == "jsonl.gz" else data)
    rows = read(unit(path))
    assert texts(rows) == ["one", "zwölf 十二"]
    expected = [(reason, number) for number, (_, reason) in enumerate(BROKEN_LINES, 1) if reason not in (None, "blank")]
    assert rejections(rows) == [(reason, f"{path.name}:{number}") for reason, number in expected]
    assert rows[0].id == f"s/{path.name}@0"


def test_parts_of_a_file_of_lines_are_the_file_wherever_they_are_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [b"broken" if i % 5 == 3 else json.dumps({"text": f"{i} " * (i % 7 + 1)}).encode() for i in range(30)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    whole = read(unit(path))
    assert len(whole) == 30
    for target_bytes in (1, 7, 50, 333, 10_000):
        parts = list(readers.parts(unit(path), target_bytes=target_bytes))
        assert sum(part.num_bytes for part in parts) == path.stat().st_size
        assert [row for part in parts for row in read(part)] == whole


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_that_was_cut_off_stops_the_work(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    data = b"".join(json.dumps({"text": f"row {i * i}"}).encode() + b"\n" for i in range(2000))
    if suffix == "jsonl.zst":
        compressed = pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True)
    else:
        compressed = gzip.compress(data)
    path.write_bytes(compressed[:-20])
    with pytest.raises(ValueError, match=rf"rows\.{suffix}: cut off or damaged after line \d+"):
        read(unit(path))


def parquet(path, columns, **options):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path, **options)


def test_parquet_rows_are_read_and_named_by_number(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    values = [b"one", None, b"", b"\xff", b"x" * 1001, "zwölf".encode()]
    column = arrow.array(values, arrow.binary())
    parquet(path, {"n": list(range(6)), "text": column}, row_group_size=2)
    rows = read(unit(path, end=3))
    assert texts(rows) == ["one", "zwölf"]
    expected = ["missing_field", "empty", "not_utf8", "too_large"]
    assert rejections(rows) == [(reason, f"rows.parquet: row {i}") for i, reason in enumerate(expected, 2)]
    parts = list(readers.parts(unit(path), target_bytes=1))
    assert [(part.begin, part.end) for part in parts] == [(0, 1), (1, 2), (2, 3)]
    assert [row for part in parts for row in read(part)] == rows


def test_a_parquet_file_without_text_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path, {"body": ["a"], "text": [1]})
    with pytest.raises(ValueError, match=r"text_field='title'.*there are body, text"):
        list(readers.parts(unit(path, text_field="title"), target_bytes=1))
    with pytest.raises(ValueError, match=r"type='int64'.*no text"):
        list(readers.parts(unit(path), target_bytes=1))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"rows\.parquet: not a Parquet file"):
        list(readers.parts(unit(path), target_bytes=1))


def test_a_damaged_page_of_a_parquet_file_stops_the_work(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path, {"text": [f"row {i * i}" for i in range(5000)]}, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.parquet: cut off or damaged"):
        read(unit(path, end=1))


def array_record(path, records):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_records_are_text_or_rows(tmp_path):
    path = tmp_path / "a.array_record"
    array_record(path, [b'{"text": "one"}', b"{}", b"\xff"])
    rows = read(unit(path, end=3))
    assert texts(rows) == ["one"]
    assert rejections(rows) == [("missing_field", "a.array_record: record 2"), ("not_utf8", "a.array_record: record 3")]
    assert texts(read(unit(path, end=3, text_field=""))) == ['{"text": "one"}', "{}"]


def test_parts_of_array_records_are_all_of_them(tmp_path):
    path = tmp_path / "a.array_record"
    array_record(path, [f"record {i}".encode() for i in range(150)])
    parts = list(readers.parts(unit(path, text_field=""), target_bytes=path.stat().st_size // 7))
    assert len(parts) == 8
    assert texts([row for part in parts for row in read(part)]) == [f"record {i}" for i in range(150)]
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="not an ArrayRecord file"):
        list(readers.parts(unit(path), target_bytes=1))


def test_a_dataset_of_the_hub_is_read_by_shards(tmp_path):
    pytest.importorskip("datasets")
    for name in "ab":
        rows = [json.dumps({"text": f"{name} {i}"}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    dataset = readers.open_hugging_face(str(tmp_path))
    units = [Unit("s", f"hf:x#{i}", str(tmp_path), "hf", 0, "text", i, dataset.num_shards) for i in range(2)]
    assert [texts(read(unit)) for unit in units] == [[f"{name} {i}" for i in range(3)] for name in "ab"]
    with pytest.raises(ValueError, match="hf:/none/such: cannot be opened"):
        readers.open_hugging_face("/none/such")


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"pyarrow is not installed; pip install 'dsv3-jax\[data\]'"):
        read(unit(path))


def test_many_broken_rows_stop_the_work_and_are_named():
    examples = [Rejected("broken_row", "a.jsonl:7", 5, "Expecting value")]
    allowed = {"num_rows": 1000, "num_broken": 10, "examples": examples, "max_broken_share": 0.01}
    readers.require_mostly_whole("web", **allowed)
    with pytest.raises(ValueError, match=r"source 'web' broken rows=11.*a\.jsonl:7: broken_row \(Expecting value\)"):
        readers.require_mostly_whole("web", **allowed | {"num_broken": 11})
