"""A prepared corpus on disk: token files, tokenizer and the manifest that accounts for every document, byte and token.

- manifest.json: what is here and where it came from; its presence in a directory means that all is whole.
- tokenizer/: tokenizer.json, tokenizer_config.json.
- train.npy: tokens of the training documents, flat uint16 or uint32: bos text eos bos text eos ...
- heldout.npy: the same for the held-out documents.
- token_bytes.npy: bytes of text that each token id stands for, int32 [vocabulary].
"""

import functools
import json
import pathlib
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.data.tokenizer import Tokenizer

FORMAT = "dsv3_jax prepared corpus"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKEN_BYTES = "token_bytes.npy"


class Corpus:
    """A prepared corpus, opened for reading. Build it with `open_corpus`.

    Attributes:
      directory: where it is.
      manifest: its manifest.json, a dict.
    """

    def __init__(self, directory: pathlib.Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest

    @property
    def vocab_size(self) -> int:
        """Largest token id of the tokenizer + 1."""
        return self.manifest["tokenizer"]["vocab_size"]

    def num_tokens(self, split: str) -> int:
        """Counts the tokens of "train" or "heldout", bos and eos of every document included."""
        return self.manifest["splits"][split]["tokens"]

    def num_bytes(self, split: str) -> int:
        """Counts the UTF-8 bytes of the text of "train" or "heldout"."""
        return self.manifest["splits"][split]["utf8_bytes"]

    def tokens(self, split: str) -> np.ndarray:
        """Maps the tokens of "train" or "heldout" into memory: uint16 or uint32 [num_tokens], read-only."""
        path = self.directory / f"{split}.npy"
        # A file of no elements cannot be mapped.
        return np.load(path, mmap_mode="r" if self.num_tokens(split) else None)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory / TOKENIZER)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token id stands for, int32 [vocab_size]; 0 for special tokens."""
        return np.load(self.directory / TOKEN_BYTES)

    def require_fits(self, model_config: ModelConfig) -> None:
        """Raises a ValueError unless the model has a row for every token id and the same bos and eos ids."""
        self.tokenizer.require_fits(model_config)


def open_corpus(directory: str | pathlib.Path) -> Corpus:
    """Opens a directory that launch/prepare_data.py wrote.

    Raises:
      ValueError: no such directory, no manifest or a foreign one, a file that is missing, has another size than the
        manifest says, or (tokenizer) another content.
    """
    directory = pathlib.Path(directory)
    fix = "prepare one with launch/prepare_data.py"
    require(directory.is_dir(), "data.corpus", str(directory), f"is no directory; {fix}")
    path = directory / MANIFEST
    require(path.is_file(), "data.corpus", str(directory), f"has no {MANIFEST}; {fix}")
    manifest = read_manifest(path)
    for name, num_bytes in manifest["files"].items():
        file = directory / name
        require(file.is_file(), "data.corpus", str(file), "is missing; remove the directory and prepare it again")
        require(file.stat().st_size == num_bytes, "data.corpus", str(file), f"has {file.stat().st_size} bytes, the "
                f"manifest says {num_bytes}; remove the directory and prepare it again")  # fmt: skip
    corpus = Corpus(directory, manifest)
    require(corpus.tokenizer.sha256 == manifest["tokenizer"]["sha256"], "data.corpus", str(directory / TOKENIZER),
            "is not the tokenizer that made the tokens; remove the directory and prepare it again")  # fmt: skip
    return corpus


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest.json.

    Raises:
      ValueError: it is not JSON, not ours, of another version, or incomplete.
    """
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); remove the directory and prepare it again") from error
    own_format = manifest.get("format") if isinstance(manifest, dict) else None
    require(own_format == FORMAT, f"{path} format", own_format, f"is not {FORMAT!r}; name a prepared corpus")
    require(manifest.get("version") == VERSION, f"{path} version", manifest.get("version"),
            f"this code reads version {VERSION}; prepare the corpus again")  # fmt: skip
    expected = {"arguments", "tokenizer", "splits", "files", "sources", "skipped"}
    missing = sorted(expected - manifest.keys())
    require(not missing, f"{path} lacks", missing, "remove the directory and prepare it again")
    return manifest
