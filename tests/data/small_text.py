"""Generated text files and the arguments that prepare them."""

import pathlib
import random

from dsv3_jax.data import prepare
from dsv3_jax.data.preparation import Preparation
from dsv3_jax.data.runner import SerialRunner
from dsv3_jax.data.sources import Source, source_of_paths

WORDS = (
    *("the", "model", "reads", "tokens", "and", "learns", "def", "return", "self", "import", "12345", "==", ";", "->"),
    *("π", "λ", "日本語", "テスト", "naïve", "🎉"),
)


def write_documents(directory: pathlib.Path, num_documents: int, words_per_document: int, seed: int = 0) -> None:
    """Writes text files of random words, some of them not ASCII; the same at every call."""
    generator = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(num_documents):
        words = generator.choices(WORDS, k=generator.randint(20, 2 * words_per_document))
        lines = [generator.choice([" ", "\n", "\n\n    "]) + word for word in words]
        (directory / f"document_{index}.txt").write_text(f"{index}" + "".join(lines), "utf-8")


def source(name: str, *paths: pathlib.Path, weight: float = 1.0) -> Source:
    """Gives a source of files."""
    return Source(name, tuple(str(path) for path in paths), weight, kind="text", language="mixed", licence="CC0")


def preparation(*sources: Source | pathlib.Path, **changes) -> Preparation:
    """Gives the arguments of a small preparation of sources, or of one path."""
    arguments = {
        "sources": tuple(s if isinstance(s, Source) else source_of_paths([str(s)]) for s in sources),
        "recipe": "",
        "max_bytes": 0,
        "max_document_bytes": 10**6,
        "max_broken_share": 0.0,
        "min_similarity": 0.8,
        "heldout_fraction": 0.2,
        "tokenizer": "",
        "vocab_size": 400,
        "tokenizer_bytes": 10**6,
        "fim_rate": 0.3,
        "boundary_split_share": 0.5,
        "seed": 0,
    } | changes
    return Preparation(**arguments)


def prepared_in(directory: pathlib.Path, *sources: Source | pathlib.Path, **changes) -> bool:
    """Prepares a small corpus in this process."""
    return prepare.prepare(preparation(*sources, **changes), directory, runner=SerialRunner(), on_progress=no_progress)


def no_progress(stage: str, done_bytes: int, total_bytes: int) -> None:
    """Shows nothing."""


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Reads every file of a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
