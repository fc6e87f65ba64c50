"""All stages of a preparation in their order: from sources to a whole corpus in `<partial>/corpus`.

Below the partial directory, collected/ holds shards of documents, selection.npz what becomes of each document, encoded/
shards of tokens, merged/ the accounts of the token files. What is there is not made again.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsv3_jax.config import require
from dsv3_jax.data import card, prepared, readers, selection, shards, sources, stages
from dsv3_jax.data.preparation import Preparation
from dsv3_jax.data.readers import Rejected
from dsv3_jax.data.runner import Runner
from dsv3_jax.data.sources import Source
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

SHARD_BYTES = 4_000_000  # of files that make a shard; a larger file is a shard of its own
MIN_ROWS_TO_JUDGE = 1000  # fewer rows do not tell before their source ends whether too many are broken

OnProgress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)


def assemble(
    preparation: Preparation,
    arguments: dict[str, Any],
    tokenizer: Tokenizer | None,
    partial: pathlib.Path,
    runner: Runner,
    on_progress: OnProgress,
) -> None:
    """Does all the stages and leaves a whole corpus in partial/corpus."""
    corpus = partial / "corpus"
    for name in ("collected", "encoded", "merged", "corpus/tokens"):
        (partial / name).mkdir(parents=True, exist_ok=True)
    collected = _collect(preparation, partial, runner, on_progress)
    chosen = _select(preparation, collected, partial, on_progress)
    tokenizer = _make_tokenizer(preparation, tokenizer, chosen, partial, on_progress)
    encoded = _encode(preparation, chosen, partial, runner, on_progress)
    accounts = _merge(preparation, tokenizer, encoded, partial, runner, on_progress)
    manifest = {
        "format": prepared.FORMAT,
        "version": prepared.VERSION,
        "arguments": arguments,
        "tokenizer": prepared.tokenizer_account(tokenizer),
        "sources": {
            source.name: _source_account(source, collected, chosen.removed[source.name], accounts[source.name])
            for source in preparation.sources
        },
    }
    card.write_card(corpus, manifest)
    manifest["files"] = {
        path.relative_to(corpus).as_posix(): path.stat().st_size
        for path in sorted(corpus.rglob("*"))
        if path.is_file() and path.name != prepared.MANIFEST
    }
    shards.write_json(corpus / prepared.MANIFEST, manifest)


def _collect(
    preparation: Preparation, partial: pathlib.Path, runner: Runner, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """Gathers all documents in shards; returns the shards' reports in order, with the shard's path in "shard"."""
    done_path = partial / "collected.json"
    if not done_path.exists():
        units = {source.name: sources.list_units(source) for source in preparation.sources}
        _require_same_units(partial / "units.json", units)
        collected = []
        total_bytes = sum(unit.num_bytes for of_source in units.values() for unit in of_source)
        counter = _Counter("collecting", total_bytes, on_progress)
        for source in preparation.sources:
            collected += _collect_source(preparation, source, units[source.name], partial, runner, counter)
        counter.finish()
        shards.write_json(done_path, collected)
    return shards.read_json(done_path)


def _require_same_units(path: pathlib.Path, units: dict[str, tuple[readers.Unit, ...]]) -> None:
    """Records the files to collect, or raises a ValueError that names one that changed since they were recorded."""
    listed = [
        [unit.source, unit.name, unit.begin, unit.end, unit.num_bytes, _time_of_change(unit)]
        for of_source in units.values()
        for unit in of_source
    ]
    if path.exists():
        recorded = shards.read_json(path)
        changed = next((new for old, new in zip(recorded, listed) if old != new), None)
        is_same = changed is None and len(recorded) == len(listed)
        named = changed[1] if changed else f"{len(recorded)} units, then {len(listed)}"
        require(
            is_same, "sources", named, f"changed since this preparation began; remove {path.parent} and start again"
        )
    else:
        shards.write_json(path, listed)


def _time_of_change(unit: readers.Unit) -> int:
    """Returns when a unit's file was written, in ns; 0 for what is no file."""
    try:
        return os.stat(unit.path).st_mtime_ns
    except OSError:
        return 0  # a dataset of a hub, or a file that the collection will report as unreadable


def _collect_source(
    preparation: Preparation,
    source: Source,
    units: tuple[readers.Unit, ...],
    partial: pathlib.Path,
    runner: Runner,
    counter: "_Counter",
) -> list[dict[str, Any]]:
    """Collects a source until its share of the bytes is reached; returns its reports."""
    tasks = [
        stages.CollectTask(
            shard=partial / "collected" / f"{source.name}-{number:06}",
            source=source.name,
            units=part,
            max_document_bytes=preparation.max_document_bytes,
            has_signatures=preparation.min_similarity > 0,
        )
        for number, part in enumerate(_parts(units))
    ]
    budget = selection.byte_budget(preparation.sources, source, preparation.max_bytes)
    reports, num_bytes, rows = [], 0, _Rows(source.name, preparation.max_broken_share)
    with contextlib.closing(runner.map(stages.collect, tasks)) as results:
        for task, report in zip(tasks, results):
            reports.append(report | {"shard": task.shard.name})
            num_bytes += report["utf8_bytes"]
            counter.add(sum(unit.num_bytes for unit in task.units))
            rows.add(report)
            if num_bytes >= budget:
                break
    rows.judge()
    return reports


class _Rows:
    """Counts a source's rows and raises a ValueError as soon as it is plain that too many are broken."""

    def __init__(self, source: str, max_broken_share: float):
        self._source = source
        self._max_broken_share = max_broken_share
        self._num_rows = 0
        self._num_broken = 0
        self._examples = []

    def add(self, report: dict[str, Any]) -> None:
        self._num_rows += report["rows"]
        for reason, account in report["rejected"].items():
            if reason in readers.BROKEN:
                self._num_broken += account["documents"]
                self._examples += [Rejected(reason, where, 0, detail) for where, detail in account["examples"]]
                del self._examples[stages.EXAMPLES :]
        if self._num_rows >= MIN_ROWS_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        readers.require_mostly_whole(
            self._source,
            num_rows=self._num_rows,
            num_broken=self._num_broken,
            examples=self._examples,
            max_broken_share=self._max_broken_share,
        )


def _parts(units: tuple[readers.Unit, ...]) -> Iterator[tuple[readers.Unit, ...]]:
    """Groups units into shards of about `SHARD_BYTES`."""
    part, num_bytes = [], 0
    for unit in units:
        part.append(unit)
        num_bytes += unit.num_bytes
        if num_bytes >= SHARD_BYTES or unit.format == "hf":  # which tells no size
            yield tuple(part)
            part, num_bytes = [], 0
    if part:
        yield tuple(part)


def _select(
    preparation: Preparation, collected: list[dict[str, Any]], partial: pathlib.Path, on_progress: OnProgress
) -> selection.Selection:
    """Decides what becomes of every document, once for all shards."""
    path = partial / "selection.npz"
    if not path.exists():
        counter = _Counter("deduplicating", sum(report["utf8_bytes"] for report in collected), on_progress)
        chosen = selection.select(
            preparation.sources,
            [report["source"] for report in collected],
            [partial / "collected" / report["shard"] for report in collected],
            max_bytes=preparation.max_bytes,
            min_similarity=preparation.min_similarity,
            heldout_fraction=preparation.heldout_fraction,
        )
        counter.add(sum(report["utf8_bytes"] for report in collected))
        selection.save(path, chosen)
    return selection.load(path, partial / "collected")


def _make_tokenizer(
    preparation: Preparation,
    given: Tokenizer | None,
    chosen: selection.Selection,
    partial: pathlib.Path,
    on_progress: OnProgress,
) -> Tokenizer:
    """Puts the tokenizer into the corpus: the given one, or one trained on a sample of the training documents."""
    directory = partial / "corpus" / prepared.TOKENIZER
    if not directory.exists():
        tokenizer = given
        if given is None:
            shares = selection.sampling_shares(preparation.sources, chosen, preparation.tokenizer_bytes)
            sample_bytes = round(sum(share * chosen.train_bytes[source] for source, share in shares.items()))
            counter = _Counter("training the tokenizer", sample_bytes, on_progress)
            texts = stages.sample_texts(chosen, shares)
            tokenizer = train_tokenizer(counter.each(texts), preparation.vocab_size)
            counter.finish()
        temporary = partial / "tokenizer"
        with shards.naming(directory):
            tokenizer.save(temporary)
            shards.sync(temporary)
            temporary.rename(directory)
    tokenizer = Tokenizer.load(directory)
    with shards.written_whole(partial / "corpus" / prepared.TOKEN_BYTES) as file:
        np.save(file, tokenizer.num_bytes_of_token)
    return tokenizer


def _encode(
    preparation: Preparation,
    chosen: selection.Selection,
    partial: pathlib.Path,
    runner: Runner,
    on_progress: OnProgress,
) -> dict[str, list[pathlib.Path]]:
    """Encodes what was chosen; returns the shards of tokens of every source."""
    counter = _Counter("encoding", chosen.kept_bytes, on_progress)
    encoded = {source.name: [] for source in preparation.sources}
    tasks = []
    for documents, source, dispositions in zip(chosen.shards, chosen.sources, chosen.dispositions):
        encoded[source].append(partial / "encoded" / documents.name)
        tasks.append(
            stages.EncodeTask(
                source=source,
                documents=documents,
                shard=encoded[source][-1],
                dispositions=dispositions,
                tokenizer=partial / "corpus" / prepared.TOKENIZER,
                seed=preparation.seed,
                fim_rate=preparation.fim_rate,
                boundary_split_share=preparation.boundary_split_share,
            )
        )
    for num_bytes in runner.map(stages.encode, tasks):
        counter.add(num_bytes)
    counter.finish()
    return encoded


def _merge(
    preparation: Preparation,
    tokenizer: Tokenizer,
    encoded: dict[str, list[pathlib.Path]],
    partial: pathlib.Path,
    runner: Runner,
    on_progress: OnProgress,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Writes the token files; returns source -> split -> account."""
    tasks = [
        stages.MergeTask(
            corpus=partial / "corpus",
            account=partial / "merged" / f"{source.name}.{split}.json",
            source=source.name,
            split=split,
            shards=tuple(encoded[source.name]),
            dtype=prepared.token_dtype(tokenizer.vocab_size),
        )
        for source in preparation.sources
        for split in prepared.SPLITS
    ]
    token_bytes = sum(path.with_suffix(".tokens").stat().st_size for paths in encoded.values() for path in paths)
    counter = _Counter("merging", token_bytes, on_progress)
    accounts = {source.name: {} for source in preparation.sources}
    for task, account in zip(tasks, runner.map(stages.merge, tasks)):
        accounts[task.source][task.split] = account
        counter.add(account["tokens"] * task.dtype.itemsize)
    counter.finish()
    return accounts


def _source_account(
    source: Source, collected: list[dict[str, Any]], chosen: dict[str, Any], splits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Gives what the manifest says of a source."""
    own = [shard for shard in collected if shard["source"] == source.name]
    removed = {}
    for shard in own:
        for reason, account in shard["rejected"].items():
            total = removed.setdefault(reason, {"documents": 0, "utf8_bytes": 0, "examples": []})
            total["documents"] += account["documents"]
            total["utf8_bytes"] += account["utf8_bytes"]
            total["examples"] += account["examples"][: stages.EXAMPLES - len(total["examples"])]
    return {
        "weight": source.weight,
        "kind": source.kind,
        "language": source.language,
        "licence": source.licence,
        "collected": {name: sum(shard[name] for shard in own) for name in ("rows", "documents", "utf8_bytes")},
        "removed": removed | chosen,
        "splits": splits,
    }


class _Counter:
    """Adds up the bytes that a stage has done and reports them."""

    def __init__(self, stage: str, total_bytes: int, on_progress: OnProgress):
        self._stage = stage
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0
        on_progress(stage, 0, total_bytes)

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._on_progress(self._stage, self._done_bytes, self._total_bytes)

    def each(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            self.add(len(text.encode()))
            yield text

    def finish(self) -> None:
        """Reports the end: a stage may need less than was there (a budget of bytes)."""
        self._on_progress(self._stage, self._done_bytes, self._done_bytes)
