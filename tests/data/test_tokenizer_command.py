"""`launch/tokenizer.py` trains on a bounded sample that order does not change, and reports what encoding gives."""

import json
import pathlib
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import text_sample, tokenizer_report
from dsv3_jax.data.sources import Source
from dsv3_jax.data.text_sample import TextSample, sample_sources, weighted_budgets
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tokenizer.py"
RECIPE = """
[[source]]
name = "prose"
paths = ["prose"]
weight = 3
kind = "text"
language = "en"

[[source]]
name = "code"
paths = ["rows.jsonl"]
weight = 1
kind = "code"
language = "python"
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    (directory / "prose").mkdir()
    generator = random.Random(0)
    for index in range(40):
        words = generator.choices(["the", "cat", "naïve", "日本", "sat.\n", "on\n\n", "mats"], k=60)
        (directory / "prose" / f"{index}.txt").write_text(" ".join(words), "utf-8")
    (directory / "prose" / "unfit.txt").write_text("\0 is no text")
    rows = [
        {"text": f'def f{index}(x):\n    return x + {index}\n\n\nprint(f{index}(2), "and more")  # calls\n'}
        for index in range(100)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.toml").write_text(RECIPE)
    return directory


def run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def read_rows(directory, **changes) -> dict[str, TextSample]:
    source = Source("rows", (str(directory / "rows.jsonl"),), weight=1, kind="code", language="python", **changes)
    arguments = {"max_bytes": [500], "max_document_bytes": 10**6, "seed": 0, "on_progress": lambda *_: None}
    return sample_sources([source], **arguments)


@given(
    documents=st.dictionaries(st.text(max_size=3), st.text(max_size=12), max_size=30),
    max_bytes=st.integers(1, 80),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_a_sample_holds_the_same_documents_in_any_order_of_arrival(documents, max_bytes, order):
    samples = [TextSample(max_bytes=max_bytes, seed=5) for _ in range(2)]
    shuffled = list(documents.items())
    order.shuffle(shuffled)
    for sample, items in zip(samples, (documents.items(), shuffled)):
        for document_id, text in items:
            sample.add(document_id, text)
            assert sample.num_bytes == sum(len(text.encode()) for text in sample.texts()) <= max_bytes
        assert sample.num_offered == len(documents)
    assert list(samples[0].texts()) == list(samples[1].texts())
    if sum(len(text.encode()) for text in documents.values()) <= max_bytes:
        assert sorted(samples[0].texts()) == sorted(documents.values())


def test_every_document_has_the_same_chance_and_seeds_differ():
    kept = [0] * 20
    for seed in range(400):
        sample = TextSample(max_bytes=5, seed=seed)
        for index in range(20):
            sample.add(str(index), chr(ord("a") + index))
        for text in sample.texts():
            kept[ord(text) - ord("a")] += 1
    assert sum(kept) == 400 * 5
    assert all(60 <= count <= 140 for count in kept), kept  # 100 expected, standard deviation 8.7


def test_budgets_follow_the_weights():
    chosen = [Source(str(w), ("x",), weight=w, kind="text", language="en") for w in (3, 0, 1)]
    assert weighted_budgets(chosen, 100) == [75, 0, 25]


def test_a_source_with_too_many_broken_rows_stops_the_sample(directory, tmp_path):
    assert read_rows(directory)["rows"].num_offered == 100
    with pytest.raises(ValueError, match=r"source 'rows' broken rows=100.*rows\.jsonl:1: missing_field"):
        read_rows(directory, text_field="content")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one two" * 100}) + "\n")
    with pytest.raises(ValueError, match="no document that fits into 500 bytes"):
        read_rows(tmp_path)
    assert 0 < text_sample.MAX_BROKEN_SHARE < 0.5


def test_train_and_inspect(directory, tmp_path):
    recipe = f"--recipe={directory / 'recipe.toml'}"
    result = run("train", recipe, "--vocab_size=350", "--sample_bytes=8000", f"--output={tmp_path / 'ours'}")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}
    tokenizer = Tokenizer.load(tmp_path / "ours")
    assert tokenizer.vocab_size == 350

    again = run("train", recipe, "--vocab_size=350", "--sample_bytes=8000", f"--output={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert Tokenizer.load(tmp_path / "again").sha256 == tokenizer.sha256
    refused = run("train", recipe, f"--output={tmp_path / 'ours'}")
    assert (refused.returncode, "exists" in refused.stderr) == (1, True)

    peer = train_tokenizer(["abc"], 300)
    peer.save(tmp_path / "peer")
    figures = tmp_path / "figures.json"
    result = run("inspect", tmp_path / "ours", recipe, f"--peer={tmp_path / 'peer'}", f"--json={figures}")
    assert result.returncode == 0, result.stderr
    record = json.loads(figures.read_text("utf-8"))
    texts = {
        "prose": [(directory / "prose" / f"{index}.txt").read_text("utf-8") for index in range(40)],
        "code": [json.loads(line)["text"] for line in (directory / "rows.jsonl").open()],
    }
    for name, documents in texts.items():
        row = record["sources"][name]
        num_bytes = sum(len(text.encode()) for text in documents)
        assert (row["documents"], row["utf8_bytes"]) == (len(documents), num_bytes)
        for directory_name, one in (("ours", tokenizer), ("peer", peer)):
            num_tokens = sum(len(one.encode(text)) for text in documents)
            assert row["bytes_per_token"][str(tmp_path / directory_name)] == pytest.approx(num_bytes / num_tokens)
    used = {token for documents in texts.values() for text in documents for token in tokenizer.encode(text)}
    vocabulary = record["vocabulary"]
    assert vocabulary["num_unused"] == 350 - 18 - len(used)
    assert len(vocabulary["special_tokens"]) == 18
    assert len(vocabulary["longest_tokens"][0].encode()) == max(map(len, tokenizer.token_bytes))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "command=None: say train or inspect"),
        (["train"], "--output=None"),
        (["train", "--output=x", "--vocab_size=100"], "vocab_size=100: must be at least 274"),
        (["inspect", "/nowhere"], "has no tokenizer.json"),
    ],
)
def test_what_cannot_be_done_is_said(directory, arguments, message):
    result = run(*arguments, f"--source={directory / 'prose'}")
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_peer_that_is_none_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"--peer={tmp_path}: no tokenizer"):
        tokenizer_report.load_peer(str(tmp_path))
