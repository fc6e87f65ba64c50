"""FIM and split token boundaries change the order and the grain of tokens, never the text; both are measured."""

import itertools
import math
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import WORDS
from tokenizers import normalizers

from dsv3_jax.data import tokenizer as tokenizer_module
from dsv3_jax.data.encoding import EncodingStatistics, encode_document
from dsv3_jax.data.fim import fill_in_the_middle
from dsv3_jax.data.token_boundaries import boundary_parts
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

ENDINGS = (".\n", ".\n\n", ");\n", "):\n    ", " {\n", "。\n", "!\r\n", "\n", " ")


def make_documents(count: int, words: int) -> dict[str, str]:
    generator = random.Random(1)
    return {
        f"document {index}": "".join(
            generator.choice(WORDS) + generator.choice(ENDINGS) for _ in range(generator.randint(1, words))
        )
        for index in range(count)
    }


@pytest.fixture(scope="module")
def documents():
    return make_documents(1500, 24)


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents.values(), 500)


def encode(tokenizer, documents, *, seed=3, fim_rate=0.0, boundary_split_share=0.0):
    statistics, encoded = EncodingStatistics(), {}
    for document_id, text in documents.items():
        encoded[document_id], counts = encode_document(
            tokenizer,
            text,
            document_id=document_id,
            seed=seed,
            fim_rate=fim_rate,
            boundary_split_share=boundary_split_share,
        )
        statistics += counts
    return encoded, statistics


def lies_in_binomial_bounds(count: int, trials: int, rate: float) -> bool:
    return abs(count - trials * rate) <= 4.5 * math.sqrt(trials * rate * (1 - rate))  # one in 150,000 lies outside


def spelled(tokenizer, token: str) -> int:
    """Looks a token up in the vocabulary that is written to disk."""
    return tokenizer_module.tokenizers.Tokenizer.from_str(tokenizer._definition).token_to_id(token)


def split_at(values: list[int], separator: int) -> tuple[list[int], list[int]]:
    assert values.count(separator) == 1
    place = values.index(separator)
    return values[:place], values[place + 1 :]


@pytest.mark.parametrize("boundary_split_share", [0.0, 0.5])
def test_every_fim_document_of_a_token_stream_reassembles_to_its_text(tokenizer, documents, boundary_split_share):
    encoded, statistics = encode(tokenizer, documents, fim_rate=0.1, boundary_split_share=boundary_split_share)
    stream = np.concatenate(list(encoded.values())).tolist()
    bos, eos = spelled(tokenizer, "<｜begin▁of▁sentence｜>"), spelled(tokenizer, "<｜end▁of▁sentence｜>")
    begin, hole, end = (spelled(tokenizer, f"<｜fim▁{name}｜>") for name in ("begin", "hole", "end"))

    spans = {"prefix": [], "middle": [], "suffix": []}
    texts = []
    while stream:
        assert stream[0] == bos
        body, stream = stream[1 : stream.index(eos)], stream[stream.index(eos) + 1 :]
        if body[:1] == [begin]:
            prefix, rest = split_at(body[1:], hole)
            suffix, middle = split_at(rest, end)
            for name, ids in zip(spans, (prefix, middle, suffix), strict=True):
                text = tokenizer.decode_bytes(ids).decode("utf-8")  # strict: no cut lies inside a character
                spans[name].append(text)
            body = [*prefix, *middle, *suffix]
        assert not {bos, begin, hole, end} & set(body)
        texts.append(tokenizer.decode_bytes(body).decode("utf-8"))
    assert texts == list(documents.values())

    cut = len(spans["middle"])
    assert lies_in_binomial_bounds(cut, len(documents), 0.1)
    assert all(spans["middle"])
    lengths = {name: sum(len(text) for text in pieces) for name, pieces in spans.items()}
    assert (statistics.fim_documents, statistics.documents) == (cut, len(documents))
    assert statistics.fim_prefix_characters == lengths["prefix"]
    assert statistics.fim_middle_characters == lengths["middle"]
    assert statistics.fim_suffix_characters == lengths["suffix"]
    assert statistics.tokens == sum(len(ids) for ids in encoded.values())
    assert statistics.utf8_bytes == sum(len(text.encode()) for text in documents.values())


def test_every_pair_of_cuts_is_equally_likely():
    counts = {pair: 0 for pair in itertools.combinations(range(5), 2)}
    draws = 4000
    for index in range(draws):
        pieces = fill_in_the_middle("aé🎉d", seed_bytes=str(index).encode(), rate=1)
        begin = len(pieces.prefix)
        counts[begin, begin + len(pieces.middle)] += 1
    assert all(lies_in_binomial_bounds(count, draws, 1 / len(counts)) for count in counts.values()), counts


@given(st.text(), st.binary(max_size=8), st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None)
def test_pieces_make_the_text(text, seed_bytes, rate):
    pieces = fill_in_the_middle(text, seed_bytes=seed_bytes, rate=rate)
    if pieces is None:
        assert rate < 1 or not text
    else:
        assert rate > 0 and pieces.middle
        assert pieces.prefix + pieces.middle + pieces.suffix == text


def joined_tokens(tokenizer) -> dict[int, tuple[str, str]]:
    """Finds the tokens that join punctuation with line breaks, character by character."""
    found = {}
    for token_id in range(tokenizer.vocab_size):
        try:
            text = tokenizer.token_bytes[token_id].decode("utf-8")
        except UnicodeDecodeError:
            continue
        head = "".join(itertools.takewhile(lambda character: character not in "\r\n", text))
        breaks = text[len(head) :]
        marks = head[1:] if head[:1] == " " else head
        is_punctuation = marks and all(unicodedata.category(mark).startswith(("P", "S")) for mark in marks)
        if is_punctuation and breaks and set(breaks) <= {"\r", "\n"}:
            found[token_id] = (head, breaks)
    return found


def test_split_tokens_become_the_tokens_of_their_punctuation_and_of_their_line_breaks(tokenizer):
    parts = boundary_parts(tokenizer)
    joined = joined_tokens(tokenizer)
    assert len(joined) >= 5
    assert set(np.flatnonzero(parts.length_of_token)) == joined.keys()
    for token_id, (punctuation, breaks) in joined.items():
        start = parts.start_of_token[token_id]
        own = parts.parts[start : start + parts.length_of_token[token_id]].tolist()
        assert own == tokenizer.encode(punctuation) + tokenizer.encode(breaks)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_joined_tokens_is_split_and_no_byte_changes(tokenizer, documents, share):
    encoded, statistics = encode(tokenizer, documents, boundary_split_share=share)
    joined = joined_tokens(tokenizer)
    num_joined = num_split = 0
    for document_id, text in documents.items():
        plain, ids = tokenizer.encode_document(text), encoded[document_id].tolist()
        assert tokenizer.decode_bytes(ids) == text.encode()
        for token in plain:  # align the two: every token is itself or its parts
            parts = [token]
            if token in joined:
                num_joined += 1
                if ids[:1] != [token]:
                    num_split += 1
                    parts = [part for piece in joined[token] for part in tokenizer.encode(piece)]
            assert ids[: len(parts)] == parts
            ids = ids[len(parts) :]
        assert not ids
    assert (statistics.boundary_tokens, statistics.boundary_splits) == (num_joined, num_split)
    assert lies_in_binomial_bounds(num_split, num_joined, share)


def test_a_document_is_encoded_alike_whatever_its_neighbours_and_otherwise_under_another_seed(tokenizer, documents):
    rates = {"fim_rate": 0.5, "boundary_split_share": 0.5}
    few = dict(itertools.islice(documents.items(), 40))
    forward, _ = encode(tokenizer, few, **rates)
    backward, _ = encode(tokenizer, dict(reversed(few.items())), **rates)
    assert all(np.array_equal(forward[name], backward[name]) for name in few)
    other_seed, _ = encode(tokenizer, few, seed=4, **rates)
    assert any(not np.array_equal(forward[name], other_seed[name]) for name in few)
    text = "same text.\n" * 8
    twins, _ = encode(tokenizer, {f"twin {index}": text for index in range(8)}, **rates)
    assert len({tuple(ids) for ids in twins.values()}) > 1


def test_the_draws_of_a_document_are_pinned(tokenizer):
    # A corpus prepared by another version of the libraries must come out the same.
    pieces = fill_in_the_middle("0123456789", seed_bytes=b"document", rate=1)
    assert (pieces.prefix, pieces.middle) == ("0123", "45")
    text = ".\n" * 20
    ids, _ = encode_document(tokenizer, text, document_id="a", seed=0, fim_rate=0, boundary_split_share=0.5)
    (joined,) = tokenizer.encode(".\n")
    assert "".join("j" if token == joined else "s" for token in ids[1:-1] if token != tokenizer.encode("\n")[0]) == (
        "sjjsjjjjsssjjjsjssjj"
    )


@pytest.mark.parametrize("text", ["", "x", "\0", "\r\n", "<｜fim▁hole｜>.\n", "🏳️‍🌈"])
@pytest.mark.parametrize("document_id", ["", "é/\0\udcff"])
def test_odd_documents_keep_their_text(tokenizer, text, document_id):
    ids, statistics = encode_document(
        tokenizer, text, document_id=document_id, seed=-1, fim_rate=1, boundary_split_share=1
    )
    assert sorted(tokenizer.decode_bytes(ids)) == sorted(text.encode())
    assert (statistics.fim_documents, statistics.utf8_bytes) == (int(bool(text)), len(text.encode()))
    assert ids.tolist().count(spelled(tokenizer, "<｜fim▁hole｜>")) == statistics.fim_documents


def test_unusable_input_is_refused_by_name(tokenizer, tmp_path):
    arguments = {"document_id": "d", "seed": 0, "fim_rate": 0, "boundary_split_share": 0}
    with pytest.raises(ValueError, match=r"fim_rate=1\.5"):
        encode_document(tokenizer, "text", **arguments | {"fim_rate": 1.5})
    with pytest.raises(ValueError, match="boundary_split_share=-1"):
        encode_document(tokenizer, "text", **arguments | {"boundary_split_share": -1})
    with pytest.raises(ValueError, match="surrogate at character 1"):
        encode_document(tokenizer, "a\ud800", **arguments)

    backend = tokenizer_module.tokenizers.Tokenizer.from_str(tokenizer._definition)
    backend.normalizer = normalizers.Lowercase()
    changing = Tokenizer(backend.to_str(), tokenizer._config, source="changing")
    encode_document(changing, "lower", **arguments)
    with pytest.raises(ValueError, match="changes the text of document 'd'; use a byte-level BPE without"):
        encode_document(changing, "Upper", **arguments)

    definition = tokenizer._definition.replace("<｜fim▁hole｜>", "<｜another｜>")
    without_fim = Tokenizer(definition, tokenizer._config, source="without")
    encode_document(without_fim, "text", **arguments)
    with pytest.raises(ValueError, match=r"fim_rate.*lacks one of.*fim▁hole.*launch/tokenizer\.py"):
        encode_document(without_fim, "text", **arguments | {"fim_rate": 1})
