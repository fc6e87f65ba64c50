"""Which documents repeat which, against sets that are compared exactly."""

import hashlib
import re

import numpy as np
import pytest

from dsv3_jax.data import deduplication as dedup

WORDS = ["alpha", "Beta", "gamma", "DELTA", "epsilon", "zeta", "übung", "тест", "wörter", "x1", "y2", "zz"]


def random_text(rng, num_words):
    return " ".join(f"{rng.choice(WORDS)}{rng.integers(1000)}" for _ in range(num_words))


def edited(rng, text, share):
    """Replaces a run of words."""
    words = text.split()
    count = int(len(words) * share)
    start = rng.integers(0, len(words) - count + 1)
    return " ".join([*words[:start], *random_text(rng, max(count, 1)).split()[:count], *words[start + count :]])


def exact_similarity(text, other):
    """Jaccard similarity of the sets of runs of five words: the definition, written down."""
    sets = []
    for t in (text, other):
        words = re.findall(r"[\u3000-\ud7ff]|[^\W_\u3000-\ud7ff]+", t.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def arrays(texts):
    hashes = [hashlib.sha256(text.encode()).digest()[: dedup.EXACT_HASH_BYTES] for text in texts]
    hashes = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(texts), -1)
    return hashes, np.stack([dedup.signature(text) for text in texts])


def find(texts, *, min_similarity=0.8, cuts=()):
    hashes, signatures = arrays(texts)
    return dedup.find_duplicates(np.split(hashes, cuts), np.split(signatures, cuts), min_similarity=min_similarity)


def test_signatures_estimate_the_similarity_of_texts():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(0)
    errors = []
    for share in np.linspace(0, 0.6, 60):
        text = random_text(rng, 400)
        other = edited(rng, text, share)
        errors.append(dedup.similarity(dedup.signature(text), dedup.signature(other)) - exact_similarity(text, other))
    # Of 128 places each agrees with the probability of the similarity: a standard deviation of at most 0.044.
    assert np.abs(errors).max() < 4.5 * 0.044
    assert abs(np.mean(errors)) < 4 * 0.044 / np.sqrt(60)


def test_case_space_and_punctuation_do_not_matter_but_words_and_their_order_do():
    pytest.importorskip("rensa")
    words = [f"word{i}" for i in range(50)]
    base = dedup.signature(" ".join(words))
    np.testing.assert_array_equal(dedup.signature(",\n ".join(words).upper() + "!"), base)
    assert dedup.similarity(dedup.signature(" ".join(reversed(words))), base) < 0.1
    assert dedup.similarity(dedup.signature(" ".join(words).replace("word", "wird")), base) < 0.1


def test_each_character_of_a_script_without_spaces_is_a_word():
    pytest.importorskip("rensa")
    text = "".join(chr(0x4E00 + i * 37) for i in range(200))
    changed = text[:100] + "的" + text[101:]
    estimate = dedup.similarity(dedup.signature(text), dedup.signature(changed))
    assert abs(estimate - exact_similarity(text, changed)) < 0.13
    assert exact_similarity(text, changed) == pytest.approx(191 / 201)
    assert dedup.similarity(dedup.signature(text), dedup.signature(text[::-1])) < 0.1


def test_long_texts_are_hashed_in_pieces(monkeypatch):
    pytest.importorskip("rensa")
    text = random_text(np.random.default_rng(1), 2000)
    whole = dedup.signature(text)
    monkeypatch.setattr(dedup, "_BYTES_AT_ONCE", 4096)
    dedup._powers.cache_clear()
    try:
        assert dedup.similarity(dedup.signature(text), whole) > 0.95  # a word on a border counts as two
    finally:
        dedup._powers.cache_clear()


def test_the_first_of_equal_or_similar_documents_stays():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(2)
    one, two = random_text(rng, 300), random_text(rng, 300)
    near_one, far_from_one = edited(rng, one, 0.02), edited(rng, one, 0.4)
    texts = [one, "short text", two, near_one, "short text", one, far_from_one, "short texts"]
    found = find(texts, cuts=(2, 2, 5))  # an empty shard among them
    assert found.removed.tolist() == [3, 4, 5]
    assert found.repeats.tolist() == [0, 1, 0]
    assert found.is_exact.tolist() == [False, True, True]
    exact_only = find(texts, min_similarity=None)
    assert exact_only.removed.tolist() == [4, 5]


def test_no_pair_is_false_and_nearly_every_pair_is_found():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(3)
    originals = [random_text(rng, 200) for _ in range(100)]
    shares = rng.uniform(0, 0.3, 100)
    texts = originals + [edited(rng, text, share) for text, share in zip(originals, shares)]
    found = find(texts, min_similarity=0.8)
    exact = np.array([exact_similarity(texts[i], texts[100 + i]) for i in range(100)])
    removed = dict(zip(found.removed.tolist(), found.repeats.tolist()))
    assert all(removed[number] == number - 100 for number in removed)
    is_removed = np.array([100 + i in removed for i in range(100)])
    # The estimate is off by 0.035 in standard deviation, and a band is missed with probability 0.002.
    assert is_removed[exact > 0.91].all()
    assert not is_removed[exact < 0.69].any()
    assert (exact > 0.91).sum() > 5 < (exact < 0.69).sum()


def test_the_result_does_not_depend_on_the_shards():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(4)
    originals = [random_text(rng, 100) for _ in range(20)]
    texts = [edited(rng, originals[rng.integers(20)], rng.uniform(0, 0.06)) for _ in range(100)]
    whole = find(texts)
    assert 20 < len(whole.removed) < 100
    for cuts in ((50,), (1, 2, 3), tuple(range(1, 100))):
        parts = find(texts, cuts=cuts)
        for field in ("removed", "repeats", "is_exact"):
            np.testing.assert_array_equal(getattr(parts, field), getattr(whole, field))


def test_every_removed_document_leads_to_one_that_stays():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(5)
    texts = [random_text(rng, 200)]
    for _ in range(30):  # a chain: each is like the one before, the last unlike the first
        texts.append(edited(rng, texts[-1], 0.05))
    found = find(texts)
    assert np.all(found.repeats < found.removed)
    repeats = dict(zip(found.removed.tolist(), found.repeats.tolist()))
    signatures = arrays(texts)[1]
    for number, other in repeats.items():
        assert dedup.similarity(signatures[number], signatures[other]) >= 0.8
    kept = set(range(31)) - repeats.keys()
    assert kept >= {0}
    assert len(kept) > 1  # what has drifted away from the first is a document of its own


def test_large_buckets_of_unlike_documents_are_bounded(monkeypatch):
    calls = []
    monkeypatch.setattr(dedup, "MAX_KEPT_PER_BUCKET", 3)
    monkeypatch.setattr(dedup, "similarity", lambda a, b: calls.append(len(a)) or np.zeros(len(a)))
    signatures = np.zeros((50, dedup.SIGNATURE_LENGTH), np.uint32)
    signatures[:, dedup.ROWS_PER_BAND :] = np.arange(50)[:, None]  # they agree in the first band alone
    hashes = np.repeat(np.arange(50, dtype=np.uint8)[:, None], 16, axis=1)
    found = dedup.find_duplicates([hashes], [signatures], min_similarity=0.8)
    assert calls == [49, 48, 47]
    assert len(found.removed) == 0


def test_no_documents_and_bad_settings():
    hashes, signatures = np.zeros((0, 16), np.uint8), np.zeros((0, dedup.SIGNATURE_LENGTH), np.uint32)
    assert len(dedup.find_duplicates([hashes], [signatures], min_similarity=0.8).removed) == 0
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="min_similarity"):
            dedup.find_duplicates([hashes], [signatures], min_similarity=value)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ValueError, match="rensa is not installed; pip install"):
        dedup.signature(random_text(np.random.default_rng(0), 100))
