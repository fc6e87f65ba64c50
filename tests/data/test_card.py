"""The data card says what the manifest says, and its plots can be drawn for any corpus."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from small_text import prepared_in, source, write_documents

from dsv3_jax.data import open_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    for number, name in enumerate(("long", "short")):
        write_documents(root / name, num_documents=30, words_per_document=80 - 60 * number, seed=number)
    (root / "long" / "copy.txt").write_text((root / "long" / "document_1.txt").read_text())
    (root / "long" / "empty.txt").touch()
    (root / "single.txt").write_text("a single document, with enough letters to stay")
    sources = [source(name, root / name, weight=weight) for name, weight in (("long", 3.0), ("short", 1.0))]
    prepared_in(root / "corpus", *sources, source("single", root / "single.txt", weight=0.0))
    return open_corpus(root / "corpus")


def rows_of(text: str, heading: str) -> dict[str, dict[str, str]]:
    """Reads the first markdown table below a heading: first cell -> column -> cell."""
    table = re.search(r"(\|.*\n)+", text[text.index(heading) :])[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_tables_hold_the_counts_of_the_token_files(corpus):
    text = (corpus.directory / "DATA_CARD.md").read_text()
    rows = rows_of(text, "## Sources")
    assert list(rows) == ["long", "short", "single"]
    for name, prepared in corpus.sources.items():
        row = rows[name]
        lengths = np.diff(prepared.document_offsets("train"))
        assert row["documents"] == str(len(lengths)) and row["median tokens"] == str(int(np.median(lengths)))
        assert row["tokens"] == f"{len(prepared.tokens('train')):,}"
        assert float(row["bytes / token"]) == pytest.approx(prepared.num_bytes("train") / lengths.sum(), abs=0.005)
        assert f"\n- {name}: CC0\n" in text
    assert [row["weight"] for row in rows.values()] == ["75.0%", "25.0%", "0.0%"]
    left_out = rows_of(text, "## What was left out")["long"]
    assert (left_out["found"], left_out["kept"], left_out["empty"], left_out["exact_duplicate"]) == (
        "32",
        "30",
        "1",
        "1",
    )
    encoded = rows_of(text, "## How it is encoded")
    statistics = corpus.manifest["sources"]["long"]["splits"]["train"]["statistics"]
    assert encoded["long"]["fill in the middle"] == f"{statistics['fim_documents'] / statistics['documents']:.1%}"


def test_it_says_how_to_make_the_corpus_again(corpus):
    text = (corpus.directory / "DATA_CARD.md").read_text()
    assert "--fim_rate=0.3" in text and "--vocab_size=400" in text
    for name, prepared in corpus.sources.items():
        assert f"| {name} | `{prepared.account['splits']['train']['sha256']}` |" in text
    assert corpus.tokenizer.sha256 in text


def test_every_plot_it_shows_is_there(corpus):
    text = (corpus.directory / "DATA_CARD.md").read_text()
    names = re.findall(r"!\[.*\]\((.*)\)", text)
    assert names == ["shares.png", "document_lengths.png", "bytes_per_token.png", "removed.png"]
    for name in names:
        pixels = np.asarray(Image.open(corpus.directory / name).convert("RGB"))
        assert pixels.shape[1] == 880 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_a_corpus_opens_without_its_card_and_plots(corpus, tmp_path):
    shutil.copytree(corpus.directory, tmp_path / "copied", ignore=shutil.ignore_patterns("*.png", "*.md"))
    assert open_corpus(tmp_path / "copied").manifest == corpus.manifest
