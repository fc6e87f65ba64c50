"""What becomes of a document: duplicates go, the first stays, and the split depends on the text alone."""

import hashlib
import itertools
import random

import numpy as np
import pytest
from small_text import source

from dsv3_jax.data import selection, sources, stages
from dsv3_jax.data.selection import HELDOUT, REMOVED, TRAIN


def select(tmp_path, texts, *, max_bytes=0, heldout_fraction=0.0, weights=None, min_similarity=0.0):
    """Selects from source -> shards -> texts; gives source -> text -> what becomes of each of its copies."""
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    shards, given = [], []
    for name, of_source in texts.items():
        given.append(source(name, root / name, weight=weights[name] if weights else 1.0))
        for number, of_shard in enumerate(of_source):
            directory = root / name / f"{number:03}"
            directory.mkdir(parents=True)
            units = []
            for index, text in enumerate(of_shard):
                path = directory / f"{index:04}.txt"
                path.write_text(text)
                units += sources.list_units(source(name, path))
            shards.append(root / f"{name}-{number}")
            stages.collect(stages.CollectTask(shards[-1], name, tuple(units), 10**6, has_signatures=True))
    chosen = selection.select(
        given,
        [shard.name.split("-")[0] for shard in shards],
        shards,
        max_bytes=max_bytes,
        min_similarity=min_similarity,
        heldout_fraction=heldout_fraction,
    )
    selection.save(root / "selection.npz", chosen)
    assert_equal(selection.load(root / "selection.npz", root), chosen)
    codes = iter(np.concatenate(chosen.dispositions).tolist())
    fates = {name: [(text, next(codes)) for text in itertools.chain(*of_source)] for name, of_source in texts.items()}
    return fates, chosen


def assert_equal(loaded, chosen):
    for one, other in zip(loaded.dispositions, chosen.dispositions, strict=True):
        np.testing.assert_array_equal(one, other)
    for field in ("shards", "sources", "train_bytes", "kept_bytes", "removed"):
        assert getattr(loaded, field) == getattr(chosen, field)


def many_texts(num, prefix=""):
    return [f"{prefix}document number {number} of the many documents" for number in range(num)]


def test_the_first_of_equal_documents_stays_across_shards_and_sources(tmp_path):
    once, twice, thrice = (f"{word} appears in this corpus so often" for word in ("once", "twice", "thrice"))
    fates, chosen = select(tmp_path, {"b": [[twice, thrice], [thrice, once]], "a": [[thrice], [twice]]})
    assert fates == {
        "b": [(twice, TRAIN), (thrice, TRAIN), (thrice, REMOVED), (once, TRAIN)],
        "a": [(thrice, REMOVED), (twice, REMOVED)],
    }
    assert chosen.removed["b"]["exact_duplicate"]["documents"] == 1
    assert chosen.removed["a"]["exact_duplicate"] == {
        "documents": 2,
        "utf8_bytes": len(thrice) + len(twice),
        "examples": [["a: 0000.txt", "b: 0001.txt"], ["a: 0000.txt", "b: 0000.txt"]],
    }
    assert chosen.train_bytes == {"b": len(once + twice + thrice), "a": 0}
    assert chosen.kept_bytes == len(once + twice + thrice)


def test_near_duplicates_go_if_asked(tmp_path):
    words = [f"word{number}" for number in random.Random(0).sample(range(10**6), 300)]
    original, edited = " ".join(words), " ".join([*words[:150], "changed", *words[150:]])
    fates, chosen = select(tmp_path, {"a": [[original], [edited]]}, min_similarity=0.8)
    assert fates == {"a": [(original, TRAIN), (edited, REMOVED)]}
    assert chosen.removed["a"]["near_duplicate"]["documents"] == 1
    fates, chosen = select(tmp_path, {"a": [[original], [edited]]})
    assert fates == {"a": [(original, TRAIN), (edited, TRAIN)]} and chosen.removed == {"a": {}}


def test_the_split_of_a_document_depends_on_its_text_alone(tmp_path):
    texts = many_texts(400)
    fates, _ = select(tmp_path, {"a": [texts[:150], texts[150:]]}, heldout_fraction=0.1)
    heldout = {text for text, fate in fates["a"] if fate == HELDOUT}
    by_hash = {text: int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 for text in texts}
    assert heldout == {text for text, place in by_hash.items() if place < 0.1} and 20 < len(heldout) < 60
    some, _ = select(tmp_path, {"b": [texts[::-2]], "a": [many_texts(50, "other ")]}, heldout_fraction=0.1)
    assert {text for text, fate in some["b"] if fate == HELDOUT} == heldout & set(texts[::-2])


def test_every_source_of_two_documents_has_both_splits(tmp_path):
    texts = {name: [many_texts(num, name)] for name, num in (("a", 30), ("b", 2), ("c", 1))}
    for heldout_fraction in (1e-9, 0.999999):
        fates, _ = select(tmp_path, texts, heldout_fraction=heldout_fraction)
        counts = {name: [fate for _, fate in of_source].count(HELDOUT) for name, of_source in fates.items()}
        assert counts == {"a": 1 if heldout_fraction < 0.5 else 29, "b": 1, "c": 0}


def test_a_budget_is_shared_by_weight_and_cuts_each_source_in_order(tmp_path):
    size = len(many_texts(1)[0])
    texts = {"a": [many_texts(4), many_texts(9)[4:]], "b": [many_texts(9, "b")]}
    fates, chosen = select(tmp_path, texts, max_bytes=8 * size + 8, weights={"a": 3.0, "b": 1.0})
    assert [fate for _, fate in fates["a"]] == [TRAIN] * 6 + [REMOVED] * 3
    assert [fate for _, fate in fates["b"]] == [TRAIN] * 2 + [REMOVED] * 7
    assert chosen.removed["a"]["over_budget"] == {"documents": 3, "utf8_bytes": 3 * size, "examples": []}


def test_the_tokenizer_s_sample_is_shared_by_weight(tmp_path):
    texts = {"a": [many_texts(300)], "b": [many_texts(300, "b")], "c": [many_texts(3, "c")]}
    _, chosen = select(tmp_path, texts, weights={"a": 3.0, "b": 1.0, "c": 1.0})
    given = [source(name, tmp_path, weight=weight) for name, weight in (("a", 3.0), ("b", 1.0), ("c", 1.0))]
    shares = selection.sampling_shares(given, chosen, 10_000)
    sample = list(stages.sample_texts(chosen, shares))
    num_bytes = {name: sum(len(t) for t in sample if t in texts[name][0]) for name in texts}
    assert 4_500 < num_bytes["a"] < 7_500 and 1_200 < num_bytes["b"] < 2_900
    assert num_bytes["c"] == sum(map(len, texts["c"][0]))  # less than its share: all of it
    assert sample == list(stages.sample_texts(chosen, shares))


def test_a_corpus_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of them is left to train on"):
        select(tmp_path, {"a": [[" "]]})
