"""The stages of a preparation that work on one shard: pure functions from files to files, run on any worker.

Each leaves alone what is whole already, so that a preparation that was stopped continues where it was.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax.data import cleaning, deduplication, prepared, readers, shards
from dsv3_jax.data.encoding import EncodingStatistics, encode_document
from dsv3_jax.data.readers import RawDocument, Rejected, Unit
from dsv3_jax.data.selection import HELDOUT, REMOVED, TRAIN, Selection
from dsv3_jax.data.tokenizer import Tokenizer

EXAMPLES = 3  # rejections of each reason that a shard's report names

SPLIT_CODES = {"train": TRAIN, "heldout": HELDOUT}


@dataclasses.dataclass(frozen=True)
class CollectTask:
    """Units to gather into one shard of documents."""

    shard: pathlib.Path  # without suffix
    source: str
    units: tuple[Unit, ...]
    max_document_bytes: int
    has_signatures: bool  # for the search of near duplicates


def collect(task: CollectTask) -> dict[str, Any]:
    """Reads, cleans, hashes and signs the documents of units.

    Writes SHARD.text, SHARD.signatures.npy (uint32 [n, length]; [n, 0] without them) and SHARD.npz: sizes int64 [n],
    digests uint8 [n, 32] (SHA-256 of the text), ids, report.

    Returns:
      The report: documents and utf8_bytes kept, rows seen, and for each reason of rejection its documents, utf8_bytes
      and some examples.
    """
    if shards.index(task.shard).exists():
        return shards.read_index(shards.index(task.shard), "report")[0]
    ids, sizes, digests, signatures = [], [], [], []
    rejected = {}
    with shards.written_whole(task.shard.with_suffix(".text")) as file:
        for document in _cleaned(task):
            if isinstance(document, Rejected):
                _count_rejected(rejected, document)
                continue
            data = document.text.encode()
            file.write(data)
            ids.append(document.id)
            sizes.append(len(data))
            digests.append(hashlib.sha256(data).digest())
            if task.has_signatures:
                signatures.append(deduplication.signature(document.text))
    report = {
        "source": task.source,
        "rows": len(ids) + sum(account["documents"] for account in rejected.values()),
        "documents": len(ids),
        "utf8_bytes": sum(sizes),
        "rejected": rejected,
    }
    arrays = {
        "sizes": np.array(sizes, np.int64),
        "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, hashlib.sha256().digest_size),
    }
    with shards.written_whole(shards.signatures(task.shard)) as file:
        width = deduplication.SIGNATURE_LENGTH if task.has_signatures else 0
        np.save(file, np.array(signatures, np.uint32).reshape(len(ids), width))
    shards.write_index(shards.index(task.shard), arrays, {"ids": ids, "report": report})
    return report


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """A shard of documents to encode."""

    source: str
    documents: pathlib.Path  # shard of documents, without suffix
    shard: pathlib.Path  # shard of tokens, without suffix
    dispositions: np.ndarray  # int8 [documents]: removed, train or held out
    tokenizer: pathlib.Path  # directory
    seed: int
    fim_rate: float
    boundary_split_share: float


def encode(task: EncodeTask) -> int:
    """Encodes the documents of a shard that are kept; held-out ones as plain text.

    Writes SHARD.tokens (flat uint16 or uint32: bos text eos bos text eos ...) and SHARD.npz: lengths int64 [kept] in
    tokens, dispositions int8 [kept], digests uint8 [kept, 32], statistics of each split.

    Returns:
      UTF-8 bytes that were encoded.
    """
    if not shards.index(task.shard).exists():
        tokenizer = _tokenizer(task.tokenizer)
        dtype = prepared.token_dtype(tokenizer.vocab_size)
        ids, digests = shards.read_index(shards.index(task.documents), "ids", "digests")
        kept = task.dispositions != REMOVED
        lengths = []
        statistics = {name: EncodingStatistics() for name in SPLIT_CODES}
        with shards.written_whole(task.shard.with_suffix(".tokens")) as file:
            for text, document_id, disposition in zip(_texts(task.documents, kept), itertools.compress(ids, kept),
                                                      task.dispositions[kept]):  # fmt: skip
                split = "train" if disposition == TRAIN else "heldout"
                tokens, counts = encode_document(
                    tokenizer,
                    text,
                    document_id=f"{task.source}:{document_id}",  # sources may hold files of the same name
                    seed=task.seed,
                    fim_rate=task.fim_rate if split == "train" else 0.0,
                    boundary_split_share=task.boundary_split_share if split == "train" else 0.0,
                )
                file.write(tokens.astype(dtype).tobytes())
                lengths.append(len(tokens))
                statistics[split] += counts
        arrays = {
            "lengths": np.array(lengths, np.int64),
            "dispositions": task.dispositions[kept],
            "digests": digests[kept],
        }
        values = {"statistics": {name: dataclasses.asdict(counts) for name, counts in statistics.items()}}
        shards.write_index(shards.index(task.shard), arrays, values)
    statistics = shards.read_index(shards.index(task.shard), "statistics")[0]
    return sum(counts["utf8_bytes"] for counts in statistics.values())


@dataclasses.dataclass(frozen=True)
class MergeTask:
    """Shards of tokens to make into the token file of one source and split."""

    corpus: pathlib.Path  # directory of the corpus
    account: pathlib.Path  # JSON file to write last
    source: str
    split: str
    shards: tuple[pathlib.Path, ...]  # of the source, in their order, without suffix
    dtype: np.dtype


def merge(task: MergeTask) -> dict[str, Any]:
    """Writes the tokens of a source and split as one .npy, and the offsets of its documents.

    Documents stand in the order of the hashes of their texts: neighbours are unrelated, and neither the shards nor the
    order of the files shows.

    Returns:
      What the manifest says of them, and the statistics of their encoding.
    """
    if task.account.exists():
        return shards.read_json(task.account)
    where, lengths, statistics = _documents_in_order(task)
    tokens_path = task.corpus / prepared.tokens_file(task.source, task.split)
    offsets_path = task.corpus / prepared.offsets_file(task.source, task.split)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    with shards.written_whole(tokens_path) as file, shards.RandomReader() as reader:
        header = {"descr": task.dtype.str, "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        for shard, start, length in zip(*where.tolist(), lengths.tolist()):
            size = task.dtype.itemsize
            path = task.shards[shard].with_suffix(".tokens")
            file.write(reader.read(path, start * size, length * size))
    with tokens_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with shards.written_whole(offsets_path) as file:
        np.save(file, offsets)
    account = {
        "file": prepared.tokens_file(task.source, task.split),
        "offsets_file": prepared.offsets_file(task.source, task.split),
        "dtype": task.dtype.name,
        "documents": len(lengths),
        "utf8_bytes": statistics.utf8_bytes,
        "tokens": int(offsets[-1]),
        "sha256": digest,
        "statistics": dataclasses.asdict(statistics),
    }
    shards.write_json(task.account, account)
    return account


def sample_texts(chosen: Selection, shares: dict[str, float]) -> Iterator[str]:
    """Gives a sample of the training documents, chosen by the hashes of their texts.

    Args:
      chosen: which documents are for training.
      shares: source -> share of its training documents to give, in [0, 1].
    """
    for shard, source, dispositions in zip(chosen.shards, chosen.sources, chosen.dispositions):
        (digests,) = shards.read_index(shards.index(shard), "digests")
        # Not the bytes that choose the held-out documents.
        is_drawn = shards.leading_integers(digests, begin=8) < shares[source] * 2.0**64
        yield from _texts(shard, (dispositions == TRAIN) & is_drawn)


def _cleaned(task: CollectTask) -> Iterator[RawDocument | Rejected]:
    for unit in task.units:
        for document in readers.read_unit(unit, max_document_bytes=task.max_document_bytes):
            yield document if isinstance(document, Rejected) else _clean(document)


def _clean(document: RawDocument) -> RawDocument | Rejected:
    result = cleaning.clean(document.text)
    if isinstance(result, cleaning.Unfit):
        return Rejected(result.reason, document.id, len(document.text.encode()))
    return RawDocument(document.id, result)


def _count_rejected(rejected: dict[str, dict], document: Rejected) -> None:
    account = rejected.setdefault(document.reason, {"documents": 0, "utf8_bytes": 0, "examples": []})
    account["documents"] += 1
    account["utf8_bytes"] += document.num_bytes
    if len(account["examples"]) < EXAMPLES:
        account["examples"].append([document.where, document.detail])


def _texts(documents: pathlib.Path, is_wanted: np.ndarray) -> Iterator[str]:
    (sizes,) = shards.read_index(shards.index(documents), "sizes")
    pieces = shards.read_slices(documents.with_suffix(".text"), sizes)
    return (piece.decode() for piece in itertools.compress(pieces, is_wanted))


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: pathlib.Path) -> Tokenizer:
    return Tokenizer.load(directory)


def _documents_in_order(task: MergeTask) -> tuple[np.ndarray, np.ndarray, EncodingStatistics]:
    """Returns where the documents of a split lie, int64 [2, n] (shard, first token), their lengths, and statistics."""
    code = SPLIT_CODES[task.split]
    places, lengths, keys = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, ">u8")]
    statistics = EncodingStatistics()
    for number, shard in enumerate(task.shards):
        of_shard = shards.read_index(shards.index(shard), "lengths", "dispositions", "digests", "statistics")
        shard_lengths, dispositions, digests, counts = of_shard
        starts = np.cumsum(shard_lengths) - shard_lengths
        is_chosen = dispositions == code
        places.append(np.stack([np.full(is_chosen.sum(), number, np.int64), starts[is_chosen]]))
        lengths.append(shard_lengths[is_chosen])
        keys.append(shards.leading_integers(digests[is_chosen]))
        statistics += EncodingStatistics(**counts[task.split])
    order = np.argsort(np.concatenate(keys), kind="stable")
    return np.concatenate(places, axis=1)[:, order], np.concatenate(lengths)[order], statistics
