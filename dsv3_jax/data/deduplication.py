"""Exact and near duplicates of documents: what to compare, and which documents go.

A document is the set of its runs of five words; words are runs of letters and digits, and each character of a script
without spaces. MinHash (rensa) makes a fixed-size signature of the set: the share of equal places in two signatures
estimates the Jaccard similarity of their documents. Documents that agree in one band of their signatures are compared
(locality-sensitive hashing), and of those that are similar enough the first stays.

Measured on 8,000 documents of packages (54 MB; 1,122 have an exact similarity of 0.8 or more to an earlier one): rensa
makes 380 MB/s into signatures on one core (with hashing the words 37), and of these documents 96 % are found (of those
from 0.85 on 99.9 %), 94 % of what is removed is at 0.8 or more and all but one at 0.75; datasketch makes 14 MB/s and
finds 91 % (98 %).
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.config import require

EXACT_HASH_BYTES = 16  # of any good hash of the text: among 10**12 documents no two collide
SIGNATURE_LENGTH = 128  # the estimate's standard deviation at similarity 0.8 is 0.035
ROWS_PER_BAND = 6  # 21 bands: documents of similarity 0.8 share one with probability 0.998, of 0.5 with 0.28
SHINGLE_WORDS = 5
MIN_WORDS = 20  # a shorter document has too few shingles: only its exact copies are found

MAX_KEPT_PER_BUCKET = 100  # documents that agree in a band, are unlike each other, and are compared with the others

_NO_SIGNATURE = np.iinfo(np.uint32).max
_SEED = 42
_BYTES_AT_ONCE = 1 << 20  # hashed at a time: each takes about 40 bytes of memory; a word on the border counts as two


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Documents to remove, in ascending order, each with an earlier document that it repeats."""

    removed: np.ndarray  # int64 [R], numbers of documents
    repeats: np.ndarray  # int64 [R]; may itself have been removed as the near duplicate of a third
    is_exact: np.ndarray  # bool [R]


def signature(text: str) -> np.ndarray:
    """Computes the MinHash signature of a text: uint32 [SIGNATURE_LENGTH].

    Raises:
      ValueError: rensa is not installed.
    """
    data = np.frombuffer(text.lower().encode("utf-8"), np.uint8)
    words = [_word_hashes(data[i : i + _BYTES_AT_ONCE]) for i in range(0, max(len(data), 1), _BYTES_AT_ONCE)]
    words = np.concatenate(words)
    if len(words) < MIN_WORDS:
        return np.full(SIGNATURE_LENGTH, _NO_SIGNATURE, np.uint32)
    shingles = _run_hashes(words)
    minhash = _rensa().RMinHash
    matrix = minhash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], SIGNATURE_LENGTH, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def similarity(signature: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimates the Jaccard similarity of documents by their signatures, over the last axis."""
    return (signature == other).mean(axis=-1)


def find_duplicates(
    exact_hashes: Sequence[np.ndarray], signatures: Sequence[np.ndarray], *, min_similarity: float | None
) -> Duplicates:
    """Finds the documents that repeat an earlier one.

    Documents are numbered through all shards in their order. Memory takes about 80 bytes per document; the signatures
    are read from where they are (map their files).

    Args:
      exact_hashes: per shard, uint8 [documents, EXACT_HASH_BYTES]; equal for equal texts alone.
      signatures: per shard, uint32 [documents, SIGNATURE_LENGTH].
      min_similarity: estimated Jaccard similarity from which on two documents are near duplicates; None: exact only.

    Raises:
      ValueError: min_similarity is not in (0, 1].
    """
    require(min_similarity is None or 0 < min_similarity <= 1, "min_similarity", min_similarity,
            "must lie in (0, 1]")  # fmt: skip
    repeats = _exact_repeats(exact_hashes)  # -1: none
    is_exact = repeats >= 0
    if min_similarity is not None:
        rows = _Rows(signatures)
        has_signature = np.concatenate([shard.min(axis=1) != _NO_SIGNATURE for shard in signatures])
        for band in range(SIGNATURE_LENGTH // ROWS_PER_BAND):
            candidates = np.flatnonzero((repeats < 0) & has_signature)
            for bucket in _buckets(_band_keys(signatures, band)[candidates], candidates):
                _mark_repeats(bucket, rows, min_similarity, repeats)
    removed = np.flatnonzero(repeats >= 0)
    return Duplicates(removed, repeats[removed], is_exact[removed])


def _rensa() -> types.ModuleType:
    try:
        import rensa
    except ImportError as error:
        raise ValueError("rensa is not installed; pip install 'dsv3-jax[data]', or keep near duplicates") from error
    return rensa


def _word_hashes(data: np.ndarray) -> np.ndarray:
    """Hashes every word of UTF-8 bytes, of at most _BYTES_AT_ONCE of them: uint64 [words]."""
    in_word = _IN_WORD[data]
    starts_word = in_word.copy()
    starts_word[1:] &= ~in_word[:-1]
    starts_word |= _IS_WORD_BY_ITSELF[data]
    starts = np.flatnonzero(starts_word)
    if not len(starts):
        return np.zeros(0, np.uint64)
    powers, inverse_powers = _powers()
    values = _BYTE_VALUES[data] * powers[: len(data)]  # 0 outside words
    return np.add.reduceat(values, starts) * inverse_powers[starts]  # the same wherever the word stands


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Computes the powers of an odd number and of its inverse modulo 2**64."""
    base, modulus = 0x9E3779B97F4A7C15, 2**64
    return tuple(np.cumprod(np.full(_BYTES_AT_ONCE, factor, np.uint64)) for factor in (base, pow(base, -1, modulus)))


def _run_hashes(words: np.ndarray) -> np.ndarray:
    """Hashes every run of SHINGLE_WORDS words: uint64 [runs]."""
    num_runs = len(words) - SHINGLE_WORDS + 1
    runs = np.zeros(num_runs, np.uint64)
    for place in range(SHINGLE_WORDS):
        runs += words[place : place + num_runs] * _PLACE_VALUES[place]
    return _mixed(runs)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Makes every bit depend on every bit (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _exact_repeats(exact_hashes: Sequence[np.ndarray]) -> np.ndarray:
    """Gives for every document the first with the same hash, or -1 for that one: int64 [documents]."""
    hashes = np.concatenate([np.ascontiguousarray(shard).view("<u8").reshape(-1, 2) for shard in exact_hashes])
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in the order of the documents
    repeats = np.full(len(order), -1, np.int64)
    if len(order):
        is_first = np.append(True, np.any(hashes[order[1:]] != hashes[order[:-1]], axis=1))
        firsts = order[is_first][np.cumsum(is_first) - 1]
        repeats[order[~is_first]] = firsts[~is_first]
    return repeats


def _band_keys(signatures: Sequence[np.ndarray], band: int) -> np.ndarray:
    columns = slice(band * ROWS_PER_BAND, (band + 1) * ROWS_PER_BAND)
    return np.concatenate([_mixed(shard[:, columns] @ _PLACE_VALUES[:ROWS_PER_BAND]) for shard in signatures])


def _buckets(keys: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Gives the groups of two or more documents with equal keys, ascending in each group."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.append(True, keys[order[1:]] != keys[order[:-1]])) if len(order) else order
    sizes = np.diff(starts, append=len(order))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
        yield documents[order[start : start + size]]


def _mark_repeats(bucket: np.ndarray, rows: "_Rows", min_similarity: float, repeats: np.ndarray) -> None:
    """Writes into `repeats` what the documents of a bucket repeat; those like no earlier one of it are left alone."""
    signatures = rows[bucket]
    for _ in range(MAX_KEPT_PER_BUCKET):
        is_similar = similarity(signatures[1:], signatures[0]) >= min_similarity
        repeats[bucket[1:][is_similar]] = bucket[0]
        bucket, signatures = bucket[1:][~is_similar], signatures[1:][~is_similar]
        if len(bucket) < 2:
            break


class _Rows:
    """Rows of several arrays under one numbering."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self._ends, numbers, side="right")
        starts = np.concatenate([[0], self._ends])
        return np.stack([self._shards[shard][number - starts[shard]] for shard, number in zip(shards, numbers)])


def _byte_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tells of every byte of UTF-8 whether it belongs to a word, whether it opens one, and its value."""
    byte = np.arange(256)
    is_alphanumeric = np.array([chr(b).isalnum() and b < 128 for b in byte])
    in_word = is_alphanumeric | (byte >= 0x80)
    is_word_by_itself = (byte >= 0xE3) & (byte <= 0xED)  # U+3000 to U+DFFF: Chinese, Japanese, Korean
    values = _mixed(byte.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    return in_word, is_word_by_itself, np.where(in_word, values, np.uint64(0))


_IN_WORD, _IS_WORD_BY_ITSELF, _BYTE_VALUES = _byte_tables()
_PLACE_VALUES = _mixed(np.arange(1, 9, dtype=np.uint64)) | np.uint64(1)  # odd: nothing is lost modulo 2**64
