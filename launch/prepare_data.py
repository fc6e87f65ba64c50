"""Prepares a corpus: text -> documents, duplicates removed -> tokenizer, token files, manifest, data card.

    python launch/prepare_data.py --output=corpora/python --max_bytes=10000000
    python launch/prepare_data.py --output=corpora/books --source='books/**/*.txt' --source=notes.md --vocab_size=32768
    python launch/prepare_data.py --output=corpora/mixed --recipe=mixed.toml --workers=16

Without --source or --recipe the text is what every machine has: the Python standard library and installed packages.
Stopped at any moment, it leaves no corpus that is not whole; the same command continues. Run again on a finished
corpus, it does nothing.
"""

import datetime
import os

from absl import flags
from rich import console as rich_console
from rich import progress as rich_progress

from dsv3_jax import config_flags
from dsv3_jax.data import open_corpus, prepare, runner, sources
from dsv3_jax.data.card import CARD
from dsv3_jax.data.preparation import Preparation

_OUTPUT = flags.DEFINE_string("output", None, "directory of the prepared corpus", required=True)
_RECIPE = flags.DEFINE_string("recipe", "", "TOML file of [[source]] tables: name, paths, weight, kind, language, ...")
_SOURCE = flags.DEFINE_multi_string(
    "source", [], f"file, directory, glob, {sources.INSTALLED} (the standard library and installed packages) or "
    f"{sources.HUGGING_FACE}NAME:CONFIG:SPLIT, where there is no recipe; may be repeated")  # fmt: skip
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 0, "UTF-8 bytes of text in all, shared by weight; 0: no limit")
_MAX_DOCUMENT_BYTES = flags.DEFINE_integer("max_document_bytes", 1_000_000, "larger documents are left out, bytes")
_MAX_BROKEN_SHARE = flags.DEFINE_float("max_broken_share", 0.01, "share of a source's files and rows that may break")
_MIN_SIMILARITY = flags.DEFINE_float(
    "min_similarity", 0.8, "estimated Jaccard similarity from which on two documents are near duplicates and the later "
    "one is removed; 0: only exact duplicates are")  # fmt: skip
_HELDOUT_FRACTION = flags.DEFINE_float("heldout_fraction", 0.02, "share of the documents kept from training")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "directory of a tokenizer to use instead of training one")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "tokens of the tokenizer to train")
_TOKENIZER_BYTES = flags.DEFINE_integer(
    "tokenizer_bytes", 100_000_000, "UTF-8 bytes of text to train it on, shared by weight; needs 10 times the memory"
)
_FIM_RATE = flags.DEFINE_float("fim_rate", 0.1, "share of the training documents encoded for filling in the middle")
_BOUNDARY_SPLIT_SHARE = flags.DEFINE_float(
    "boundary_split_share", 0.1, "share of the tokens joining punctuation and line breaks that training text splits"
)
_SEED = flags.DEFINE_integer("seed", 0, "decides which documents and tokens those are")
_RUNNER = flags.DEFINE_enum("runner", "local", runner.RUNNERS, "processes of this machine, or tasks of a Ray cluster")
_WORKERS = flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "shards worked on at a time")
_RAY_ADDRESS = flags.DEFINE_string("ray_address", "", "Ray cluster to join; empty: one is started here")


def main() -> None:
    console = rich_console.Console()
    with (
        runner.open_runner(_RUNNER.value, num_workers=_WORKERS.value, ray_address=_RAY_ADDRESS.value) as workers,
        rich_progress.Progress(*_columns(), console=console) as progress,
    ):
        tasks = {}

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], completed=done_bytes, total=total_bytes)

        is_new = prepare.prepare(_preparation(), _OUTPUT.value, runner=workers, on_progress=show)
    if not is_new:
        console.print(f"{_OUTPUT.value} is already prepared with these arguments; nothing to do.")
    _print_summary(console)


def _preparation() -> Preparation:
    if _RECIPE.value and _SOURCE.value:
        raise ValueError(f"source={_SOURCE.value}: the recipe {_RECIPE.value} names the sources; give one of the two")
    paths = _SOURCE.value or [sources.INSTALLED]
    return Preparation(
        sources=sources.load_recipe(_RECIPE.value) if _RECIPE.value else (sources.source_of_paths(paths),),
        recipe=_RECIPE.value,
        max_bytes=_MAX_BYTES.value,
        max_document_bytes=_MAX_DOCUMENT_BYTES.value,
        max_broken_share=_MAX_BROKEN_SHARE.value,
        min_similarity=_MIN_SIMILARITY.value,
        heldout_fraction=_HELDOUT_FRACTION.value,
        tokenizer=_TOKENIZER.value,
        vocab_size=_VOCAB_SIZE.value,
        tokenizer_bytes=_TOKENIZER_BYTES.value,
        fim_rate=_FIM_RATE.value,
        boundary_split_share=_BOUNDARY_SPLIT_SHARE.value,
        seed=_SEED.value,
    )


def _columns() -> tuple[rich_progress.ProgressColumn, ...]:
    return (
        rich_progress.TextColumn("{task.description:<22}"),
        rich_progress.BarColumn(20),
        rich_progress.DownloadColumn(),
        _Speed(),
        rich_progress.TimeElapsedColumn(),
        _TimeLeft(),
    )


class _Speed(rich_progress.ProgressColumn):
    """Shows MB/s since the stage began: shards end in bursts, and a speed of the last moments would jump."""

    def render(self, task: rich_progress.Task) -> str:
        seconds = task.finished_time if task.finished else task.elapsed
        return f"{task.completed / seconds / 1e6:6.2f} MB/s" if seconds and task.completed else ""


class _TimeLeft(rich_progress.ProgressColumn):
    """Shows how long a stage will take at its speed so far."""

    def render(self, task: rich_progress.Task) -> str:
        if task.finished or not task.completed:
            return ""
        return f"{datetime.timedelta(seconds=round(task.elapsed * task.remaining / task.completed))} left"


def _print_summary(console: rich_console.Console) -> None:
    corpus = open_corpus(_OUTPUT.value)
    for split in ("train", "heldout"):
        console.print(f"{split:8} {corpus.num_documents(split):>8,} documents {corpus.num_bytes(split):>14,} bytes "
                      f"{corpus.num_tokens(split):>13,} tokens", highlight=False)  # fmt: skip
    removed = {}
    for source in corpus.manifest["sources"].values():
        for reason, account in source["removed"].items():
            removed[reason] = removed.get(reason, 0) + account["documents"]
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(removed.items()))
    console.print(f"vocabulary {corpus.vocab_size:,}; left out: {listed or 'nothing'}", highlight=False, soft_wrap=True)
    console.print(f"data card: {_OUTPUT.value}/{CARD}", highlight=False)


if __name__ == "__main__":
    config_flags.run(main)
