"""What there is to know about a tokenizer: how far it compresses each source, beside others; its longest tokens."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tokenizers

from dsv3_jax.config import require
from dsv3_jax.data.text_sample import TextSample
from dsv3_jax.data.token_boundaries import boundary_parts
from dsv3_jax.data.tokenizer import Tokenizer

BATCH_DOCUMENTS = 256

CountTokens = Callable[[list[str]], int]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's tokens are."""

    size: int
    special_tokens: dict[str, int]  # token -> id
    longest_tokens: list[str]  # the longest in bytes first
    num_boundary_tokens: int  # tokens that join punctuation with line breaks
    num_unused: int  # tokens of text that the samples never need


@dataclasses.dataclass(frozen=True)
class Compression:
    """Bytes of text per token on a sample, of one tokenizer and its peers."""

    documents: int
    utf8_bytes: int
    bytes_per_token: dict[str, float]  # by the name of the tokenizer; the first is the one that is inspected


def inspect(
    tokenizer: Tokenizer, samples: dict[str, TextSample], *, name: str, peers: dict[str, CountTokens], num_longest: int
) -> tuple[Vocabulary, dict[str, Compression]]:
    """Encodes samples, checks that every document comes back byte for byte, and counts.

    Args:
      tokenizer: what to inspect.
      samples: samples of text by the names of their sources; those without documents are left out.
      name: what to call the tokenizer.
      peers: how many tokens other tokenizers need for texts, by their names.
      num_longest: how many of the longest tokens to give.

    Raises:
      ValueError: a document does not come back.
    """
    used = np.zeros(tokenizer.vocab_size, bool)
    compressions = {}
    for source, sample in samples.items():
        if not sample.num_documents:
            continue
        counts = dict.fromkeys((name, *peers), 0)
        for texts in _batches(sample.texts()):
            for text in texts:
                ids = tokenizer.encode(text)
                require(tokenizer.decode_bytes(ids) == text.encode(), "tokenizer", name,
                        f"does not give back a document of source {source!r} that begins with {text[:60]!r}; "
                        "use a byte-level BPE without a normalizer")  # fmt: skip
                used[ids] = True
                counts[name] += len(ids)
            for peer, count_tokens in peers.items():
                counts[peer] += count_tokens(texts)
        compressions[source] = Compression(
            sample.num_documents,
            sample.num_bytes,
            {tokenizer_name: sample.num_bytes / max(1, count) for tokenizer_name, count in counts.items()},
        )
    special_tokens = tokenizer.special_tokens()
    is_text = np.ones(tokenizer.vocab_size, bool)
    is_text[list(special_tokens.values())] = False
    by_length = np.argsort(-np.where(is_text, tokenizer.num_bytes_of_token, 0), kind="stable")
    vocabulary = Vocabulary(
        size=tokenizer.vocab_size,
        special_tokens=special_tokens,
        longest_tokens=[tokenizer.decode([token_id]) for token_id in by_length[:num_longest]],
        num_boundary_tokens=int(np.count_nonzero(boundary_parts(tokenizer).length_of_token)),
        num_unused=int(np.count_nonzero(is_text & ~used)),
    )
    return vocabulary, compressions


def load_peer(place: str) -> CountTokens:
    """Loads any Hugging Face tokenizer, to count the tokens that it needs for texts.

    Args:
      place: directory with a tokenizer.json, the file itself, or a name on the Hugging Face hub.

    Raises:
      ValueError: there is no tokenizer.
    """
    path = pathlib.Path(place)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file():
            backend = tokenizers.Tokenizer.from_file(str(path))
        else:
            backend = tokenizers.Tokenizer.from_pretrained(place)
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"--peer={place}: no tokenizer ({error}); name a directory with a tokenizer.json") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def count_tokens(texts: list[str]) -> int:
        return sum(len(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    return count_tokens


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
