"""Generated text files and the arguments that prepare them."""

import pathlib
import random

from dsv3_jax.data import prepare

WORDS = (
    *("the", "model", "reads", "tokens", "and", "learns", "def", "return", "self", "import", "12345", "==", ";", "->"),
    *("π", "λ", "日本語", "テスト", "naïve", "🎉"),
)


def write_documents(directory: pathlib.Path, num_documents: int, words_per_document: int) -> None:
    """Writes text files of random words, some of them not ASCII; the same at every call."""
    generator = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(num_documents):
        words = generator.choices(WORDS, k=generator.randint(1, 2 * words_per_document))
        lines = [generator.choice([" ", "\n", "\n\n    "]) + word for word in words]
        (directory / f"document_{index}.txt").write_text(f"{index}" + "".join(lines), "utf-8")


def preparation(**changes) -> prepare.Preparation:
    """Gives the arguments of a small preparation; `sources` is required."""
    arguments = {
        "max_bytes": 0,
        "max_document_bytes": 10**6,
        "vocab_size": 350,
        "tokenizer": "",
        "heldout_fraction": 0.2,
    } | changes
    return prepare.Preparation(**arguments)


def no_progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    """Shows nothing."""
