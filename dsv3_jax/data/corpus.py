"""Documents: which text files make a corpus, in which order, and what was left out.

Sources take turns and each offers its files in the order of their names' hashes: a byte budget then cuts all sources
alike, and neighbours in the packed corpus are unrelated. Exact duplicates are dropped by the hash of their text.
"""

import dataclasses
import fnmatch
import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence

from dsv3_jax.config import require

INSTALLED = "installed"  # the source that every machine has: the standard library and the installed packages
TEXT_SUFFIXES = (".py", ".md", ".rst", ".txt")
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")  # the same few texts in every package
SKIPPED_DIRECTORIES = ("__pycache__", ".*")
SKIPPED_IN_PACKAGES = (*SKIPPED_DIRECTORIES, "test", "tests", "site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text file that belongs to the corpus."""

    name: str  # source and path below it; the same on every machine
    path: pathlib.Path
    source: str
    sha256: str  # of its bytes
    num_bytes: int

    def read(self) -> str:
        """Reads the text.

        Raises:
          ValueError: the file is not what it was when it was selected.
        """
        data = self.path.read_bytes()
        require(hashlib.sha256(data).hexdigest() == self.sha256, "document", str(self.path),
                "changed while the corpus was being prepared; start again")  # fmt: skip
        return data.decode("utf-8")


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a corpus consists of, in its order, and how many files were left out for which reason."""

    documents: list[Document]
    skipped: dict[str, int]  # reason -> files: duplicate, empty, not_utf8, over_budget, too_large, unreadable

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.documents)


def select(
    sources: Sequence[str],
    *,
    max_bytes: int | None,
    max_document_bytes: int,
    on_document: Callable[[Document], None],
) -> Selection:
    """Chooses the documents of a corpus; reads every candidate once and keeps none in memory.

    Args:
      sources: `installed`, files, directories (their .py, .md, .rst and .txt files) or globs (every file matched).
      max_bytes: UTF-8 bytes of all documents together; the first document beyond ends the corpus. None: no limit.
      max_document_bytes: larger files are left out.
      on_document: called with every document chosen.

    Raises:
      ValueError: a source that matches no file, or no document is left.
      OSError: a directory, or a file that was named itself, cannot be read. A file that was found is counted instead.
    """
    documents, seen = [], set()
    skipped = dict.fromkeys(("duplicate", "empty", "not_utf8", "over_budget", "too_large", "unreadable"), 0)
    budget_left = float("inf") if max_bytes is None else max_bytes
    candidates = list(_candidates(sources))
    for position, candidate in enumerate(candidates):
        data, reason = _read_candidate(candidate, max_document_bytes)
        digest = "" if data is None else hashlib.sha256(data).hexdigest()
        if reason or digest in seen:
            skipped[reason or "duplicate"] += 1
            continue
        if len(data) > budget_left:
            skipped["over_budget"] = len(candidates) - position
            break
        seen.add(digest)
        budget_left -= len(data)
        document = Document(candidate.name, candidate.path, candidate.source, digest, len(data))
        documents.append(document)
        on_document(document)
    require(documents, "sources", list(sources), f"no document is left; skipped: {skipped}")
    return Selection(documents, skipped)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    path: pathlib.Path
    source: str
    is_named: bool  # the user named this very file


def _candidates(sources: Sequence[str]) -> Iterator[_Candidate]:
    require(sources, "sources", list(sources), f"name files, directories, globs, or {INSTALLED!r}")
    by_source = []
    for source in sources:
        by_source += _installed() if source == INSTALLED else [_given(source)]
    for candidates in by_source:
        candidates.sort(key=lambda candidate: (hashlib.sha256(candidate.name.encode()).digest(), str(candidate.path)))
    turns = itertools.zip_longest(*by_source)
    return (candidate for turn in turns for candidate in turn if candidate is not None)


def _installed() -> list[list[_Candidate]]:
    roots = {name: pathlib.Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    if roots["platlib"] == roots["purelib"]:
        del roots["platlib"]
    return [
        [
            _Candidate(f"{name}/{path.relative_to(root).as_posix()}", path, f"{INSTALLED}/{name}", is_named=False)
            for path in _walk(root, SKIPPED_IN_PACKAGES)
            if _is_prose_or_code(path)
        ]
        for name, root in roots.items()
    ]


def _given(source: str) -> list[_Candidate]:
    path = pathlib.Path(source)
    if path.is_dir():
        found = [p for p in _walk(path, SKIPPED_DIRECTORIES) if p.suffix in TEXT_SUFFIXES]
        require(found, "source", source, f"has no {', '.join(TEXT_SUFFIXES)} file; give a glob for other kinds")
        names = [f"{path.resolve().name}/{p.relative_to(path).as_posix()}" for p in found]
    elif path.exists() or path.is_symlink():
        found, names = [path], [path.name]
    else:
        found = [pathlib.Path(p) for p in glob.glob(source, recursive=True) if pathlib.Path(p).is_file()]
        require(found, "source", source, "matches no file; check the path")
        names = [p.as_posix() for p in found]
    is_named = found == [path]
    return [_Candidate(name, p, source, is_named) for name, p in zip(names, found)]


def _walk(root: pathlib.Path, skipped_directories: Sequence[str]) -> Iterator[pathlib.Path]:
    for directory, subdirectories, files in os.walk(root, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if not _matches(name, skipped_directories)]
        yield from (pathlib.Path(directory, name) for name in files)


def _raise(error: OSError) -> None:
    raise error


def _is_prose_or_code(path: pathlib.Path) -> bool:
    if path.parent.suffix in (".dist-info", ".egg-info") or path.parent.parent.suffix == ".dist-info":
        return path.name in ("METADATA", "PKG-INFO")  # they hold the package's README
    return path.suffix in TEXT_SUFFIXES and not _matches(path.name.upper(), LICENCES)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read_candidate(candidate: _Candidate, max_document_bytes: int) -> tuple[bytes | None, str]:
    """Returns the bytes of a document, or None and the reason why it is none."""
    try:
        if candidate.path.stat().st_size > max_document_bytes:
            return None, "too_large"
        data = candidate.path.read_bytes()
    except OSError:
        if candidate.is_named:
            raise
        return None, "unreadable"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not_utf8"
    if "\0" in text:  # UTF-16 and binary files pass as UTF-8
        return None, "not_utf8"
    return (data, "") if text.strip() else (None, "empty")
