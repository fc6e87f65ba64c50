"""From a document's text to the tokens that training reads: FIM, BPE, split token boundaries (§4.1).

What happens to a document is a pure function of (seed, document id, text): neither its neighbours nor the number of
workers change it.
"""

import dataclasses
import hashlib

import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data.fim import fill_in_the_middle
from dsv3_jax.data.token_boundaries import boundary_parts, split_boundary_tokens
from dsv3_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodingStatistics:
    """Counts what was encoded and how; `+` adds the counts of two sets of documents."""

    documents: int = 0
    utf8_bytes: int = 0  # of the text
    tokens: int = 0  # bos, eos and the FIM tokens included
    fim_documents: int = 0  # documents cut in three
    fim_prefix_characters: int = 0
    fim_middle_characters: int = 0
    fim_suffix_characters: int = 0
    boundary_tokens: int = 0  # tokens that joined punctuation with line breaks before any was split
    boundary_splits: int = 0  # those that were split

    def __add__(self, other: "EncodingStatistics") -> "EncodingStatistics":
        names = [field.name for field in dataclasses.fields(self)]
        return EncodingStatistics(**{name: getattr(self, name) + getattr(other, name) for name in names})


def encode_document(
    tokenizer: Tokenizer,
    text: str,
    *,
    document_id: str,
    seed: int,
    fim_rate: float,
    boundary_split_share: float,
) -> tuple[np.ndarray, EncodingStatistics]:
    """Encodes a whole document.

    Args:
      tokenizer: a byte-level BPE; with FIM tokens unless fim_rate is 0.
      text: the document.
      document_id: names the document; with the seed it decides what is drawn.
      seed: seed of the corpus.
      fim_rate: probability that the document takes the form `<bos> <fim_begin> prefix <fim_hole> suffix <fim_end>
        middle <eos>` instead of `<bos> text <eos>`. Encode held-out documents with 0, so that they score as text.
      boundary_split_share: probability that a token joining punctuation with line breaks is split. 0 for held-out text.

    Returns:
      The tokens, int64 [n], and what was done.

    Raises:
      ValueError: a rate lies outside [0, 1], the tokenizer lacks FIM tokens, the text holds a lone surrogate, or the
        tokens do not stand for exactly the text's bytes (a tokenizer that normalizes text).
    """
    seed_bytes = hashlib.blake2b(f"{seed}\0{document_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    pieces = fill_in_the_middle(text, seed_bytes=seed_bytes, rate=fim_rate)
    if pieces is None:
        ids, text_in_order = tokenizer.encode_document(text), text
    else:
        begin, hole, end = tokenizer.fim_token_ids
        prefix, suffix, middle = (tokenizer.encode(piece) for piece in (pieces.prefix, pieces.suffix, pieces.middle))
        ids = [tokenizer.bos_token_id, begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_token_id]
        text_in_order = pieces.prefix + pieces.suffix + pieces.middle
    ids, num_joined, num_split = split_boundary_tokens(
        np.array(ids, np.int64), parts=boundary_parts(tokenizer), share=boundary_split_share, seed_bytes=seed_bytes
    )
    data = text_in_order.encode()
    require(tokenizer.decode_bytes(ids.tolist()) == data, "tokenizer", tokenizer.sha256[:12],
            f"changes the text of document {document_id!r}; use a byte-level BPE without a normalizer")  # fmt: skip
    statistics = EncodingStatistics(
        documents=1,
        utf8_bytes=len(data),
        tokens=len(ids),
        fim_documents=int(pieces is not None),
        fim_prefix_characters=0 if pieces is None else len(pieces.prefix),
        fim_middle_characters=0 if pieces is None else len(pieces.middle),
        fim_suffix_characters=0 if pieces is None else len(pieces.suffix),
        boundary_tokens=num_joined,
        boundary_splits=num_split,
    )
    return ids, statistics
