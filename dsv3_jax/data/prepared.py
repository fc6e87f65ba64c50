"""A prepared corpus on disk: token files per source, tokenizer and the manifest that accounts for every token.

- manifest.json: what is here and where it came from; its presence in a directory means that all is whole.
- tokenizer/: tokenizer.json, tokenizer_config.json.
- tokens/SOURCE.train.npy: tokens of a source's training documents, flat uint16 or uint32: bos text eos bos text eos ...
- tokens/SOURCE.train.offsets.npy: where each of them begins, and where the last one ends, int64 [documents + 1].
- tokens/SOURCE.heldout.npy, tokens/SOURCE.heldout.offsets.npy: the same for the held-out documents.
- token_bytes.npy: bytes of text that each token id stands for, int32 [vocabulary].
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.data.tokenizer import Tokenizer

FORMAT = "dsv3_jax prepared corpus"
VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKEN_BYTES = "token_bytes.npy"
SPLITS = ("train", "heldout")
FOR_PEOPLE = (".md", ".png")  # the data card and its plots: a corpus may be copied without them

_MANIFEST_FIELDS = {"arguments", "tokenizer", "sources", "files"}
_SOURCE_FIELDS = {"weight", "kind", "language", "licence", "splits"}
_SPLIT_FIELDS = {"file", "offsets_file", "dtype", "documents", "utf8_bytes", "tokens", "sha256"}


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """The tokens of one source of a prepared corpus, opened for reading.

    Every method takes a split: "train" or "heldout".
    """

    name: str
    directory: pathlib.Path  # of the corpus
    account: dict[str, Any]  # what the manifest says of the source

    @property
    def weight(self) -> float:
        """Share of the training windows, relative to those of the other sources, unless a run says otherwise."""
        return self.account["weight"]

    def num_tokens(self, split: str) -> int:
        """Counts the tokens, bos and eos of every document included."""
        return self.account["splits"][split]["tokens"]

    def num_bytes(self, split: str) -> int:
        """Counts the UTF-8 bytes of the text."""
        return self.account["splits"][split]["utf8_bytes"]

    def num_documents(self, split: str) -> int:
        """Counts the documents."""
        return self.account["splits"][split]["documents"]

    def tokens(self, split: str) -> np.ndarray:
        """Maps the tokens into memory: uint16 or uint32 [num_tokens], read-only."""
        return self._load(split, "file")

    def document_offsets(self, split: str) -> np.ndarray:
        """Maps int64 [num_documents + 1] into memory; document i is tokens[offsets[i] : offsets[i + 1]]."""
        return self._load(split, "offsets_file")

    def _load(self, split: str, field: str) -> np.ndarray:
        path = self.directory / self.account["splits"][split][field]
        # A file of no elements cannot be mapped.
        return np.load(path, mmap_mode="r" if self.num_tokens(split) else None)


class Corpus:
    """A prepared corpus, opened for reading. Build it with `open_corpus`.

    Attributes:
      directory: where it is.
      manifest: its manifest.json, a dict.
      sources: name -> `PreparedSource`, in the manifest's order.
    """

    def __init__(self, directory: pathlib.Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.sources = {name: PreparedSource(name, directory, account) for name, account in manifest["sources"].items()}

    @property
    def vocab_size(self) -> int:
        """Largest token id of the tokenizer + 1."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def bos_token_id(self) -> int:
        """The id that opens every document."""
        return self.manifest["tokenizer"]["bos_token_id"]

    def num_tokens(self, split: str) -> int:
        """Counts the tokens of "train" or "heldout" in all sources, bos and eos of every document included."""
        return sum(source.num_tokens(split) for source in self.sources.values())

    def num_bytes(self, split: str) -> int:
        """Counts the UTF-8 bytes of the text of "train" or "heldout" in all sources."""
        return sum(source.num_bytes(split) for source in self.sources.values())

    def num_documents(self, split: str) -> int:
        """Counts the documents of "train" or "heldout" in all sources."""
        return sum(source.num_documents(split) for source in self.sources.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the tokenizer and of every source's name, weight and tokens; the same wherever the corpus lies."""
        sources = {
            name: {field: source.account[field] for field in ("weight", "splits")}
            for name, source in self.sources.items()
        }
        identity = {"sources": sources, "tokenizer": self.manifest["tokenizer"]}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

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
      ValueError: no such directory, no manifest or a foreign one, a file besides the data card and its plots that is
        missing, has another size than the manifest says, or (tokenizer) another content.
    """
    directory = pathlib.Path(directory)
    fix = "prepare one with launch/prepare_data.py"
    require(directory.is_dir(), "data.corpus", str(directory), f"is no directory; {fix}")
    path = directory / MANIFEST
    require(path.is_file(), "data.corpus", str(directory), f"has no {MANIFEST}; {fix}")
    manifest = read_manifest(path)
    for name, num_bytes in manifest["files"].items():
        file = directory / name
        if file.suffix in FOR_PEOPLE:
            continue
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
    _require_fields(manifest, _MANIFEST_FIELDS, str(path))
    require(bool(manifest["sources"]), f"{path} sources", manifest["sources"], "is empty; prepare the corpus again")
    for name, source in manifest["sources"].items():
        _require_fields(source, _SOURCE_FIELDS, f"{path} sources.{name}")
        _require_fields(source["splits"], set(SPLITS), f"{path} sources.{name}.splits")
        for split in SPLITS:
            _require_fields(source["splits"][split], _SPLIT_FIELDS, f"{path} sources.{name}.splits.{split}")
    return manifest


def tokens_file(source: str, split: str) -> str:
    """Names the token file of a source and split, below the corpus's directory."""
    return f"tokens/{source}.{split}.npy"


def offsets_file(source: str, split: str) -> str:
    """Names the file of a source and split that says where its documents begin, below the corpus's directory."""
    return f"tokens/{source}.{split}.offsets.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    """Gives the narrowest little-endian type that token files use for a vocabulary: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_corpus(
    directory: pathlib.Path,
    tokenizer: Tokenizer,
    documents: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    *,
    weights: Mapping[str, float],
) -> Corpus:
    """Writes a corpus of documents that are in memory already, and opens it.

    Args:
      directory: must not exist.
      tokenizer: what encoded the documents.
      documents: source -> split -> token ids of each document, bos and eos included; an absent split is empty.
      weights: source -> its weight in training.
    """
    dtype, num_bytes_of_token = token_dtype(tokenizer.vocab_size), tokenizer.num_bytes_of_token
    (directory / "tokens").mkdir(parents=True)
    tokenizer.save(directory / TOKENIZER)
    np.save(directory / TOKEN_BYTES, num_bytes_of_token)
    sources = {}
    for name, splits in documents.items():
        account = {"weight": weights[name], "kind": "", "language": "", "licence": "", "splits": {}}
        for split in SPLITS:
            ids = splits.get(split, [])
            tokens = np.concatenate([np.zeros(0, dtype), *ids]).astype(dtype)
            np.save(directory / tokens_file(name, split), tokens)
            offsets = np.cumsum([0, *map(len, ids)], dtype="<i8")
            np.save(directory / offsets_file(name, split), offsets)
            account["splits"][split] = {
                "file": tokens_file(name, split),
                "offsets_file": offsets_file(name, split),
                "dtype": dtype.name,
                "documents": len(ids),
                "utf8_bytes": int(num_bytes_of_token[tokens].sum()),
                "tokens": len(tokens),
                "sha256": hashlib.sha256((directory / tokens_file(name, split)).read_bytes()).hexdigest(),
            }
        sources[name] = account
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "arguments": {},
        "tokenizer": tokenizer_account(tokenizer),
        "sources": sources,
        "files": {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return open_corpus(directory)


def tokenizer_account(tokenizer: Tokenizer) -> dict[str, Any]:
    """Gives what a manifest says of the tokenizer."""
    return {
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _require_fields(account: Any, fields: set[str], what: str) -> None:
    is_object = isinstance(account, dict)
    missing = sorted(fields - account.keys()) if is_object else sorted(fields)
    require(not missing, f"{what} lacks", missing, "remove the directory and prepare it again")
