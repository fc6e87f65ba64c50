"""What becomes of every document: removed, trained on, or held out. Decided once, with all documents in view."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data import deduplication, shards
from dsv3_jax.data.sources import Source

REMOVED, TRAIN, HELDOUT = 0, 1, 2
EXAMPLES = 5  # removed duplicates that a source's report names


@dataclasses.dataclass(frozen=True)
class Selection:
    """What becomes of the documents of all shards, in the order of the shards."""

    shards: list[pathlib.Path]  # of documents, without suffix
    sources: list[str]  # of each shard
    dispositions: list[np.ndarray]  # of each shard, int8 [documents]: REMOVED, TRAIN or HELDOUT
    train_bytes: dict[str, int]  # of each source, UTF-8
    kept_bytes: int  # of all sources and splits, UTF-8
    removed: dict[str, dict[str, Any]]  # source -> reason -> documents, utf8_bytes, examples


def byte_budget(sources: Sequence[Source], source: Source, max_bytes: int) -> float:
    """Gives a source's share, by weight, of max_bytes; 0 stands for no limit."""
    return max_bytes * source.weight / sum(s.weight for s in sources) if max_bytes else float("inf")


def sampling_shares(sources: Sequence[Source], chosen: Selection, num_bytes: int) -> dict[str, float]:
    """Gives for each source the share of its training documents that makes its part, by weight, of num_bytes."""
    return {
        source.name: min(1.0, byte_budget(sources, source, num_bytes) / max(1, chosen.train_bytes[source.name]))
        for source in sources
    }


def select(
    sources: Sequence[Source],
    source_of_shard: Sequence[str],
    paths: Sequence[pathlib.Path],
    *,
    max_bytes: int,
    min_similarity: float,
    heldout_fraction: float,
) -> Selection:
    """Decides what becomes of every document.

    In the order of the shards, documents beyond a source's budget are removed, then exact and near duplicates of
    earlier ones. Of what is left, those are held out whose hash lies below heldout_fraction of its range: a document's
    split depends on its text alone. But every source of two documents or more holds out the lowest and trains on the
    highest.

    Args:
      sources: in order.
      source_of_shard: name of each shard's source.
      paths: shards of documents, without suffix.
      max_bytes: UTF-8 bytes of all documents, shared among the sources by weight; 0: no limit.
      min_similarity: estimated Jaccard similarity from which on documents are near duplicates; 0: exact ones only.
      heldout_fraction: share of the documents to hold out.

    Raises:
      ValueError: no document is left to train on, or none to hold out although some should be.
    """
    table = _Documents.read(sources, source_of_shard, paths)
    dispositions = np.full(len(table.sizes), TRAIN, np.int8)
    dispositions[~_is_in_budget(sources, table, max_bytes)] = REMOVED
    removed = {source.name: {} for source in sources}
    _account(removed, sources, table, "over_budget", np.flatnonzero(dispositions == REMOVED))
    candidates = np.flatnonzero(dispositions == TRAIN)
    num_candidates = [int(np.sum(codes == TRAIN)) for codes in np.split(dispositions, table.starts[1:-1])]
    duplicates = _find_duplicates(paths, num_candidates, min_similarity)
    for reason, is_reason in (("exact_duplicate", duplicates.is_exact), ("near_duplicate", ~duplicates.is_exact)):
        documents, repeats = candidates[duplicates.removed[is_reason]], candidates[duplicates.repeats[is_reason]]
        dispositions[documents] = REMOVED
        _account(removed, sources, table, reason, documents)
        _name_examples(removed, sources, table, reason, documents, repeats, paths)
    for number in range(len(sources)):
        _hold_out(dispositions, table.digests, np.flatnonzero((table.sources == number) & (dispositions == TRAIN)),
                  heldout_fraction)  # fmt: skip
    _require_both_splits(dispositions, heldout_fraction)
    is_train = dispositions == TRAIN
    return Selection(
        shards=list(paths),
        sources=list(source_of_shard),
        dispositions=np.split(dispositions, table.starts[1:-1]),
        train_bytes={
            source.name: int(table.sizes[is_train & (table.sources == number)].sum())
            for number, source in enumerate(sources)
        },
        kept_bytes=int(table.sizes[dispositions != REMOVED].sum()),
        removed=removed,
    )


def save(path: pathlib.Path, chosen: Selection) -> None:
    """Writes a selection to an .npz, whole or not at all."""
    values = {
        "shards": [shard.name for shard in chosen.shards],
        "sources": chosen.sources,
        "train_bytes": chosen.train_bytes,
        "kept_bytes": chosen.kept_bytes,
        "removed": chosen.removed,
    }
    lengths = np.array([len(codes) for codes in chosen.dispositions], np.int64)
    dispositions = np.concatenate([np.zeros(0, np.int8), *chosen.dispositions])
    shards.write_index(path, {"dispositions": dispositions, "lengths": lengths}, values)


def load(path: pathlib.Path, directory: pathlib.Path) -> Selection:
    """Reads a selection of the shards of documents in a directory."""
    names, sources, dispositions, lengths, train_bytes, kept_bytes, removed = shards.read_index(
        path, "shards", "sources", "dispositions", "lengths", "train_bytes", "kept_bytes", "removed"
    )
    return Selection(
        shards=[directory / name for name in names],
        sources=sources,
        dispositions=np.split(dispositions, np.cumsum(lengths)[:-1]),
        train_bytes=train_bytes,
        kept_bytes=kept_bytes,
        removed=removed,
    )


@dataclasses.dataclass(frozen=True)
class _Documents:
    """What is known of every document: 48 bytes each."""

    sizes: np.ndarray  # int64 [n], UTF-8 bytes
    digests: np.ndarray  # big-endian uint64 [n]: the first bytes of the hash of the text
    sources: np.ndarray  # int64 [n]: number of the source
    starts: np.ndarray  # int64 [shards + 1]: first document of each shard

    @classmethod
    def read(
        cls, sources: Sequence[Source], source_of_shard: Sequence[str], paths: Sequence[pathlib.Path]
    ) -> "_Documents":
        numbers = {source.name: number for number, source in enumerate(sources)}
        sizes, digests = [np.zeros(0, np.int64)], [np.zeros(0, ">u8")]
        for path in paths:
            shard_sizes, shard_digests = shards.read_index(shards.index(path), "sizes", "digests")
            sizes.append(shard_sizes)
            digests.append(shards.leading_integers(shard_digests))
        lengths = [len(shard) for shard in sizes[1:]]
        return cls(
            sizes=np.concatenate(sizes),
            digests=np.concatenate(digests),
            sources=np.repeat(np.array([numbers[name] for name in source_of_shard], np.int64), lengths),
            starts=np.cumsum([0, *lengths]),
        )


def _is_in_budget(sources: Sequence[Source], table: _Documents, max_bytes: int) -> np.ndarray:
    is_in_budget = np.zeros(len(table.sizes), bool)
    for number, source in enumerate(sources):
        own = table.sources == number
        is_in_budget[own] = np.cumsum(table.sizes[own]) <= byte_budget(sources, source, max_bytes)
    return is_in_budget


def _find_duplicates(
    paths: Sequence[pathlib.Path], num_candidates: Sequence[int], min_similarity: float
) -> deduplication.Duplicates:
    """Finds the duplicates among the first documents of each shard; their numbers count those alone."""
    digests = [shards.read_index(shards.index(path), "digests")[0] for path in paths]
    signatures = [shards.map_array(shards.signatures(path)) for path in paths]
    return deduplication.find_duplicates(
        [own[:number, : deduplication.EXACT_HASH_BYTES] for own, number in zip(digests, num_candidates)],
        [own[:number] for own, number in zip(signatures, num_candidates)],
        min_similarity=min_similarity or None,
    )


def _account(
    removed: dict[str, dict], sources: Sequence[Source], table: _Documents, reason: str, documents: np.ndarray
) -> None:
    for number, source in enumerate(sources):
        own = documents[table.sources[documents] == number]
        if len(own):
            removed[source.name][reason] = {
                "documents": len(own),
                "utf8_bytes": int(table.sizes[own].sum()),
                "examples": [],
            }


def _name_examples(
    removed: dict[str, dict],
    sources: Sequence[Source],
    table: _Documents,
    reason: str,
    documents: np.ndarray,
    repeats: np.ndarray,
    paths: Sequence[pathlib.Path],
) -> None:
    """Adds to the accounts a few pairs of names: of a removed document, and of the one that it repeats."""
    for number, source in enumerate(sources):
        own = np.flatnonzero(table.sources[documents] == number)[:EXAMPLES]
        for document, repeated in zip(documents[own], repeats[own]):
            names = [_name_of(number, sources, table, paths) for number in (document, repeated)]
            removed[source.name][reason]["examples"].append(names)


def _name_of(document: int, sources: Sequence[Source], table: _Documents, paths: Sequence[pathlib.Path]) -> str:
    shard = int(np.searchsorted(table.starts, document, side="right")) - 1
    (ids,) = shards.read_index(shards.index(paths[shard]), "ids")
    return f"{sources[table.sources[document]].name}: {ids[document - table.starts[shard]]}"


def _hold_out(dispositions: np.ndarray, digests: np.ndarray, kept: np.ndarray, heldout_fraction: float) -> None:
    """Marks the held-out documents among those that a source keeps."""
    if heldout_fraction == 0 or len(kept) < 2:
        return
    hashes = digests[kept]
    is_heldout = hashes < heldout_fraction * 2.0**64
    is_heldout[np.argmin(hashes)] = True
    is_heldout[np.argmax(hashes)] = False
    dispositions[kept[is_heldout]] = HELDOUT


def _require_both_splits(dispositions: np.ndarray, heldout_fraction: float) -> None:
    num_train, num_heldout = (int(np.sum(dispositions == code)) for code in (TRAIN, HELDOUT))
    require(num_train > 0, "sources", f"{len(dispositions)} documents", "none of them is left to train on; add text")
    require(num_heldout > 0 or heldout_fraction == 0, "heldout_fraction", heldout_fraction,
            f"leaves none of {num_train} document(s) to hold out; add documents, or set it to 0 for a corpus without a "
            "held-out part")  # fmt: skip
