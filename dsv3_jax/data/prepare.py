"""Turns text into a prepared corpus: documents, duplicates, tokenizer, tokens, manifest, data card.

Work goes on in `<directory>.partial`, in stages over shards, and what is made of them is renamed to `<directory>` at
the end. Whatever stops the work, a killed process included, `<directory>` is either whole or not there; the next run
with the same arguments continues at the first shard that is missing. The bytes of a corpus depend on its arguments and
sources alone: not on the number of workers, nor on the runner, nor on how often it was stopped.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import require
from dsv3_jax.data import prepared, shards
from dsv3_jax.data.assembly import OnProgress, assemble
from dsv3_jax.data.preparation import Preparation
from dsv3_jax.data.runner import Runner
from dsv3_jax.data.tokenizer import Tokenizer

ARGUMENTS = "arguments.json"  # in a partial directory: those of the corpus that is being made there


def prepare(
    preparation: Preparation, directory: str | pathlib.Path, *, runner: Runner, on_progress: OnProgress
) -> bool:
    """Prepares a corpus in a directory, all or nothing; continues what an earlier run left unfinished.

    Args:
      preparation: what to prepare.
      directory: where; must not exist, be empty, or hold a corpus prepared with the same arguments.
      runner: works on the shards.
      on_progress: called with what is done after every shard.

    Returns:
      False if the directory already holds this corpus (its sources are not looked at again), else True.

    Raises:
      ValueError: the directory holds something else, another process prepares it, an earlier run left a part of another
        corpus, the sources changed since, or they make no corpus.
      OSError: a named source cannot be read, or writing failed (a full disk); names the path.
    """
    directory = pathlib.Path(directory)
    given_tokenizer = Tokenizer.load(preparation.tokenizer) if preparation.tokenizer else None
    if given_tokenizer and preparation.fim_rate > 0:
        given_tokenizer.fim_token_ids  # noqa: B018  raises before any work if it has none
    arguments = _arguments(preparation, given_tokenizer)
    partial = directory.with_name(directory.name + ".partial")
    if _is_prepared(directory, arguments) and not (partial / ARGUMENTS).exists():
        return False
    with _claimed(partial, directory):
        is_prepared = _is_prepared(directory, arguments)  # by another process, meanwhile
        if not is_prepared:
            _require_same_preparation(partial, arguments)
            try:
                assemble(preparation, arguments, given_tokenizer, partial, runner, on_progress)
                shards.sync(partial / "corpus")
                (partial / "corpus").rename(directory)
            except BaseException:
                if not any((partial / "collected").glob("*.npz")):
                    shutil.rmtree(partial)  # nothing is lost, and other arguments may come
                raise
        shutil.rmtree(partial)
    return not is_prepared


def _arguments(preparation: Preparation, given_tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Gives what a manifest records: the arguments as JSON holds them, recipe and given tokenizer by their hashes."""
    arguments = json.loads(json.dumps(dataclasses.asdict(preparation)))
    del arguments["max_broken_share"]  # it stops a run or lets it pass, and leaves no trace in the corpus
    if preparation.recipe:
        digest = hashlib.sha256(pathlib.Path(preparation.recipe).read_bytes()).hexdigest()
        arguments["recipe"] = {"path": preparation.recipe, "sha256": digest}
    if given_tokenizer:
        arguments |= {"tokenizer": given_tokenizer.sha256, "vocab_size": given_tokenizer.vocab_size}
    return arguments


def _is_prepared(directory: pathlib.Path, arguments: dict[str, Any]) -> bool:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    existing = prepared.open_corpus(directory).manifest["arguments"]
    _require_equal(existing, arguments, f"{directory}: holds a corpus", "name another directory or remove this one")
    return True


def _require_equal(existing: dict[str, Any], asked: dict[str, Any], what: str, fix: str) -> None:
    changes = [
        f"{name}={existing.get(name)!r} (asked: {asked.get(name)!r})"
        for name in asked | existing
        if existing.get(name) != asked.get(name)
    ]
    if changes:
        raise ValueError(f"output={what} with {', '.join(changes)}; {fix}")


@contextlib.contextmanager
def _claimed(partial: pathlib.Path, directory: pathlib.Path) -> Iterator[None]:
    """Makes `<directory>.partial` this process's own, and clears what a killed one was writing."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
            is_ours = partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor))
        except BlockingIOError:
            is_ours = False
        require(is_ours, "output", str(directory), "is being prepared by another process; wait, or name another")
        for leftover in partial.rglob("*.tmp"):
            leftover.unlink()
        yield
    finally:
        os.close(descriptor)


def _require_same_preparation(partial: pathlib.Path, arguments: dict[str, Any]) -> None:
    path = partial / ARGUMENTS
    recorded = {"version": prepared.VERSION, **arguments}
    if path.exists():
        fix = f"use those arguments to continue, or remove {partial} to begin anew"
        _require_equal(shards.read_json(path), recorded, f"{partial}: holds an unfinished corpus", fix)
    else:
        require(not any(partial.iterdir()), "output", str(partial), "is not an unfinished corpus; remove it")
        shards.write_json(path, recorded)
