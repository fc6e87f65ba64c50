"""Trains a byte-level BPE tokenizer in DeepSeek-V3's form, or inspects one.

    python launch/tokenizer.py train --recipe=recipe.toml --vocab_size=131072 --output=tokenizers/mine
    python launch/tokenizer.py inspect tokenizers/mine --recipe=recipe.toml --peer=tokenizers/other

`train` keeps a sample of every source in memory, in proportion to its weight, chosen by the seed and the documents'
names; memory grows to about ten times --sample_bytes. `inspect` prints bytes per token of every source, beside peers on
the same text, after it has checked that each document comes back byte for byte; it draws its documents independently
of those that `train` draws. Without --recipe and --source the text is the Python standard library and the installed
packages.
"""

import json
import pathlib

import rich.console
import rich.progress
import rich.table
from absl import flags

from dsv3_jax import config_flags
from dsv3_jax.config import require
from dsv3_jax.data import sources, text_sample, tokenizer_report
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

RECIPE = flags.DEFINE_string("recipe", None, "TOML file of [[source]] tables")
SOURCE = flags.DEFINE_multi_string("source", [sources.INSTALLED], "file, directory or glob; may be repeated")
OUTPUT = flags.DEFINE_string("output", None, "train: directory of the new tokenizer")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 131072, "train: tokens in all, control tokens included")
SAMPLE_BYTES = flags.DEFINE_integer("sample_bytes", 300_000_000, "text to train on or to inspect on, UTF-8 bytes "
                                    "of all sources together", lower_bound=1)  # fmt: skip
MAX_DOCUMENT_BYTES = flags.DEFINE_integer("max_document_bytes", 1_000_000, "larger documents are left out, bytes")
SEED = flags.DEFINE_integer("seed", 0, "chooses the documents of the sample")
PEER = flags.DEFINE_multi_string("peer", [], "inspect: directory with another tokenizer.json, or its name on the "
                                 "Hugging Face hub; may be repeated")  # fmt: skip
LONGEST = flags.DEFINE_integer("longest", 20, "inspect: how many of the longest tokens to print", lower_bound=0)
JSON = flags.DEFINE_string("json", None, "inspect: file that gets the figures")

CONSOLE = rich.console.Console()
CONSOLE.width = max(CONSOLE.width, 120)  # narrower, figures would be cut off


def main(arguments: list[str]) -> None:
    command, directories = (arguments[0], arguments[1:]) if arguments else (None, [])
    if command == "train":
        require(not directories, "train", directories, "takes no arguments; name the directory with --output")
        train()
    else:
        require(command == "inspect", "command", command, "say train or inspect")
        require(len(directories) == 1, "inspect", directories, "name the directory of one tokenizer")
        inspect(directories[0])


def train() -> None:
    require(OUTPUT.value, "--output", OUTPUT.value, "name the directory of the new tokenizer")
    output = pathlib.Path(OUTPUT.value)
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    require(is_free, "--output", str(output), "exists; name another directory or remove it")
    chosen = chosen_sources()
    samples = read_samples(chosen, text_sample.weighted_budgets(chosen, SAMPLE_BYTES.value), SEED.value)
    texts = (text for sample in samples.values() for text in sample.texts())
    tokenizer = train_tokenizer(texts, VOCAB_SIZE.value, show_progress=CONSOLE.is_terminal)
    partial = output.with_name(output.name + ".partial")
    tokenizer.save(partial)
    partial.rename(output)
    if tokenizer.vocab_size < VOCAB_SIZE.value:
        CONSOLE.print(f"the text holds no more than {tokenizer.vocab_size:,} of {VOCAB_SIZE.value:,} tokens")
    CONSOLE.print(f"wrote {output}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")


def inspect(directory: str) -> None:
    tokenizer = Tokenizer.load(directory)
    peers = {place: tokenizer_report.load_peer(place) for place in PEER.value}
    require(directory not in peers, "--peer", directory, "is the tokenizer itself; name another")
    chosen = chosen_sources()
    budgets = [SAMPLE_BYTES.value // len(chosen)] * len(chosen)
    samples = read_samples(chosen, budgets, SEED.value + 1)
    vocabulary, compressions = tokenizer_report.inspect(
        tokenizer, samples, name=directory, peers=peers, num_longest=LONGEST.value
    )
    columns = ("source", "language", "documents", "bytes", *(f"bytes/token {name}" for name in (directory, *peers)))
    table = rich.table.Table(*columns, title="every document comes back byte for byte")
    for column in table.columns:
        column.overflow = "fold"
    languages = {source.name: source.language for source in chosen}
    for source, compression in compressions.items():
        figures = (f"{value:.3f}" for value in compression.bytes_per_token.values())
        table.add_row(source, languages[source], f"{compression.documents:,}", f"{compression.utf8_bytes:,}", *figures)
    CONSOLE.print(table)
    CONSOLE.print(f"{vocabulary.size:,} tokens; {vocabulary.num_boundary_tokens:,} join punctuation with line breaks; "
                  f"{vocabulary.num_unused:,} are not needed for this text")  # fmt: skip
    CONSOLE.print("special: " + "  ".join(f"{i} {token}" for token, i in vocabulary.special_tokens.items()))
    CONSOLE.print("longest: " + "  ".join(map(repr, vocabulary.longest_tokens)), markup=False)
    if JSON.value:
        figures = {"vocabulary": vars(vocabulary), "sources": {name: vars(c) for name, c in compressions.items()}}
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")


def chosen_sources() -> tuple[sources.Source, ...]:
    require(RECIPE.value is None or not flags.FLAGS["source"].present, "--source", SOURCE.value,
            "stands beside --recipe; name one of them")  # fmt: skip
    return sources.load_recipe(RECIPE.value) if RECIPE.value else (sources.source_of_paths(SOURCE.value),)


def read_samples(
    chosen: tuple[sources.Source, ...], budgets: list[int], seed: int
) -> dict[str, text_sample.TextSample]:
    """Reads a sample of every source and shows how far it is."""
    columns = (rich.progress.TextColumn("reading {task.description:<16}"), rich.progress.BarColumn(),
               rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn(),
               rich.progress.TimeElapsedColumn())  # fmt: skip
    with rich.progress.Progress(*columns, console=CONSOLE) as progress:
        tasks = {source.name: progress.add_task(source.name, total=None) for source in chosen}
        samples = text_sample.sample_sources(
            chosen,
            max_bytes=budgets,
            max_document_bytes=MAX_DOCUMENT_BYTES.value,
            seed=seed,
            on_progress=lambda name, done, total: progress.update(tasks[name], completed=done, total=total),
        )
    for name, sample in samples.items():
        CONSOLE.print(f"{name}: {sample.num_documents:,} of {sample.num_offered:,} documents, "
                      f"{sample.num_bytes:,} bytes", highlight=False)  # fmt: skip
    return samples


if __name__ == "__main__":
    config_flags.run(main, takes_arguments=True)
