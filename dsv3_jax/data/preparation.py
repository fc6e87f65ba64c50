"""What makes a corpus: every argument of a preparation, validated when built."""

import dataclasses

from dsv3_jax.config import require
from dsv3_jax.data import sources
from dsv3_jax.data.sources import Source
from dsv3_jax.data.tokenizer import MIN_VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What makes a corpus; recorded in the manifest."""

    sources: tuple[Source, ...]
    recipe: str  # file that the sources were read from; empty: none
    max_bytes: int  # UTF-8 bytes of text in all, shared among the sources by weight; 0: no limit
    max_document_bytes: int  # larger documents are left out
    max_broken_share: float  # share of a source's files and rows that may be broken
    min_similarity: float  # estimated Jaccard similarity of near duplicates, which are removed; 0: only exact ones are
    heldout_fraction: float  # share of the documents kept from training, chosen by the hash of their text
    tokenizer: str  # directory of the tokenizer to use; empty: train one on the training documents
    vocab_size: int  # tokens of the tokenizer to train; unused when one is given
    tokenizer_bytes: int  # UTF-8 bytes of text to train it on, shared among the sources by weight
    fim_rate: float  # share of the training documents to encode for filling in the middle (§4.1)
    boundary_split_share: float  # share of the tokens joining punctuation and line breaks to split (§4.1)
    seed: int  # of what is drawn: FIM, boundaries

    def __post_init__(self):
        sources.require_usable(self.sources)
        require(self.max_bytes >= 0, "max_bytes", self.max_bytes, "must not be negative")
        require(self.max_document_bytes > 0, "max_document_bytes", self.max_document_bytes, "must be greater than 0")
        require(self.tokenizer_bytes > 0, "tokenizer_bytes", self.tokenizer_bytes, "must be greater than 0")
        require(self.vocab_size >= MIN_VOCAB_SIZE, "vocab_size", self.vocab_size, f"must be at least {MIN_VOCAB_SIZE}")
        require(0 <= self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "must lie in [0, 1)")
        for name in ("max_broken_share", "min_similarity", "fim_rate", "boundary_split_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie in [0, 1]")
