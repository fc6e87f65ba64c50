"""Splits a share of the tokens that join punctuation with line breaks (§4.1).

The tokenizer has tokens such as `.\\n\\n`. A prompt that ends in `.` without its line break is tokenized in a way that
training would never show: the token-boundary bias. A share of these tokens is therefore replaced by the tokens of the
punctuation alone and the tokens of the line breaks alone. The text stays the same, byte for byte.
"""

import dataclasses
import functools
import hashlib
import unicodedata

import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class BoundaryParts:
    """What the tokens of a vocabulary that join punctuation with line breaks are made of.

    Token t is replaced by parts[start_of_token[t] : start_of_token[t] + length_of_token[t]].
    """

    parts: np.ndarray  # int64 [all parts]
    start_of_token: np.ndarray  # int64 [vocab_size]
    length_of_token: np.ndarray  # int64 [vocab_size]; 0 for a token that is not joined


def split_boundary_tokens(
    ids: np.ndarray, *, parts: BoundaryParts, share: float, seed_bytes: bytes
) -> tuple[np.ndarray, int, int]:
    """Splits a share of the joined tokens of a document; a pure function of its arguments.

    Args:
      ids: tokens, int64 [n].
      parts: the `boundary_parts` of their tokenizer.
      share: probability that a joined token is split, in [0, 1].
      seed_bytes: what is drawn depends on these bytes alone; give every document its own.

    Returns:
      The tokens, int64 [n or more]; how many joined tokens were there; how many of them were split.

    Raises:
      ValueError: share lies outside [0, 1].
    """
    require(0 <= share <= 1, "boundary_split_share", share, "must lie in [0, 1]")
    joined = np.flatnonzero(parts.length_of_token[ids])
    draws = _uniform(seed_bytes, len(joined))
    chosen = joined[draws < share]
    if not len(chosen):
        return ids, len(joined), 0
    lengths = np.ones_like(ids)
    lengths[chosen] = parts.length_of_token[ids[chosen]]
    result = np.repeat(ids, lengths)
    place_of_id = np.cumsum(lengths) - lengths
    result[_ranges(place_of_id[chosen], lengths[chosen])] = parts.parts[
        _ranges(parts.start_of_token[ids[chosen]], lengths[chosen])
    ]
    return result, len(joined), len(chosen)


@functools.lru_cache(maxsize=2)
def boundary_parts(tokenizer: Tokenizer) -> BoundaryParts:
    """Finds the tokens that join punctuation or symbols (at least one, a space before them allowed) with line breaks.

    Raises:
      ValueError: the parts do not stand for the bytes of their token (a tokenizer that normalizes text).
    """
    parts, starts, lengths = [], [], []
    for token_id, token in enumerate(tokenizer.token_bytes):
        punctuation = token.rstrip(b"\r\n")
        ids = []
        if len(punctuation) < len(token) and _is_punctuation(punctuation):
            breaks = token[len(punctuation) :]
            ids = [*tokenizer.encode(punctuation.decode()), *tokenizer.encode(breaks.decode())]
            require(tokenizer.decode_bytes(ids) == token, "tokenizer", tokenizer.sha256[:12],
                    f"changes the text of token {token_id}; use a byte-level BPE without a normalizer")  # fmt: skip
        starts.append(len(parts))
        lengths.append(len(ids))
        parts += ids
    return BoundaryParts(np.array(parts, np.int64), np.array(starts, np.int64), np.array(lengths, np.int64))


def _is_punctuation(token: bytes) -> bool:
    """Says whether a token is punctuation and symbols; one that holds a part of a character is not."""
    try:
        text = token.decode("utf-8").removeprefix(" ")
    except UnicodeDecodeError:
        return False
    return bool(text) and all(unicodedata.category(character)[0] in "PS" for character in text)


def _uniform(seed_bytes: bytes, count: int) -> np.ndarray:
    """Draws float64 [count] in [0, 1) from raw Philox output, which no library version changes."""
    key = int.from_bytes(hashlib.blake2b(seed_bytes, digest_size=16, person=b"boundaries").digest(), "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates the ranges [start, start + length)."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])
