"""Prepares a corpus: text files -> tokenizer, token files, manifest.

    python launch/prepare_data.py --output=corpora/python --max_bytes=10000000
    python launch/prepare_data.py --output=corpora/books --source='books/**/*.txt' --source=notes.md --vocab_size=32768

Without --source the text is what every machine has: the Python standard library and the installed packages.
Stopped at any moment, it leaves no corpus that is not whole. Run again on a finished corpus, it does nothing.
"""

from absl import flags
from rich import console as rich_console
from rich import progress as rich_progress

from dsv3_jax import config_flags
from dsv3_jax.data import corpus, open_corpus, prepare

_OUTPUT = flags.DEFINE_string("output", None, "directory of the prepared corpus", required=True)
_SOURCE = flags.DEFINE_multi_string(
    "source", [corpus.INSTALLED], f"file, directory ({' '.join(corpus.TEXT_SUFFIXES)} in it), glob, or "
    f"{corpus.INSTALLED}: the standard library and installed packages; may be repeated")  # fmt: skip
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 0, "UTF-8 bytes of text in all; 0: no limit")
_MAX_DOCUMENT_BYTES = flags.DEFINE_integer("max_document_bytes", 1_000_000, "larger files are left out, bytes")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "tokens of the tokenizer to train")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "directory of a tokenizer to use instead of training one")
_HELDOUT_FRACTION = flags.DEFINE_float("heldout_fraction", 0.02, "share of the documents kept from training")


def main() -> None:
    preparation = prepare.Preparation(
        sources=tuple(_SOURCE.value),
        max_bytes=_MAX_BYTES.value,
        max_document_bytes=_MAX_DOCUMENT_BYTES.value,
        vocab_size=_VOCAB_SIZE.value,
        tokenizer=_TOKENIZER.value,
        heldout_fraction=_HELDOUT_FRACTION.value,
    )
    console = rich_console.Console()
    columns = (
        rich_progress.TextColumn("{task.description:<24}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as progress:
        tasks = {}

        def show(stage: str, done_bytes: int, total_bytes: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], completed=done_bytes, total=total_bytes)

        is_new = prepare.prepare(preparation, _OUTPUT.value, on_progress=show)
    prepared = open_corpus(_OUTPUT.value)
    if not is_new:
        console.print(f"{_OUTPUT.value} is already prepared with these arguments; nothing to do.")
    for split in ("train", "heldout"):
        console.print(f"{split:8} {prepared.num_documents(split):>8,} documents {prepared.num_bytes(split):>14,} bytes "
                      f"{prepared.num_tokens(split):>13,} tokens", highlight=False)  # fmt: skip
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in prepared.manifest["skipped"].items() if count)
    console.print(f"vocabulary {prepared.vocab_size:,}; files left out: {skipped or 'none'}", highlight=False)


if __name__ == "__main__":
    config_flags.run(main)
