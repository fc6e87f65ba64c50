"""The text in a package file: which files of it, decoded, rid of markup, and under which licence."""

import collections
import dataclasses
import fnmatch
import gzip
import json
import pathlib
import re
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from dsv3_jax.config import require
from dsv3_jax.data import markup

MAX_TEXT_BYTES = 400_000  # longer texts (dictionaries, databases of proofs) are cut between lines, UTF-8 bytes
MIN_TEXT_CHARACTERS = 200  # shorter texts are stubs
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "COPYRIGHT*")


@dataclasses.dataclass(frozen=True)
class Package:
    """One package of a registry and which of its files are taken."""

    registry: str  # debian or pypi
    name: str
    version: str
    sha256: str  # of the .deb or .whl file
    include: tuple[str, ...]  # patterns of paths in the package; * matches / too
    source: str = ""  # name of the source its text goes to
    language_pattern: str = ""  # or: what finds the language in a path, as its first group
    exclude: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What one package gave."""

    package: Package
    licence: str
    documents: dict[str, int]  # source -> documents
    utf8_bytes: dict[str, int]  # source -> bytes of text
    num_undecodable: int  # files whose encoding is not known


def write_text(
    package: Package, archive: pathlib.Path, directory: pathlib.Path, source_of_language: dict[str, str]
) -> Gathered:
    """Writes the text of a package to <directory>/<source>/<package>.jsonl, unless that is done.

    The account of it, <directory>/licences/<package>.json, is written last, beside the texts of its licences.

    Raises:
      ValueError: the package gives no text, or a path's language has no source.
    """
    account = directory / "licences" / f"{package.name}-{package.sha256[:16]}.json"
    described = json.loads(json.dumps(dataclasses.asdict(package)))
    if account.exists():
        done = json.loads(account.read_text("utf-8"))
        if done["package"] == described:
            return Gathered(**done | {"package": package})
    rows, num_undecodable = _RowFiles(directory, package.name), 0
    for path, data in _chosen_files(package, archive):
        text = _text_of(path, data)
        if text is None:
            num_undecodable += 1
            continue
        source = package.source or _source_of(path, package, source_of_language)
        for part, piece in enumerate(split_long(text, MAX_TEXT_BYTES)):
            if len(piece) >= MIN_TEXT_CHARACTERS:
                rows.write(source, piece, f"{path}#{part}" if part else path)
    require(rows.documents, f"package {package.name} include", list(package.include), "matches no file of text")
    rows.close()
    licence, licence_text = read_licence(package, archive)
    account.parent.mkdir(parents=True, exist_ok=True)
    account.with_suffix(".txt").write_text(licence_text, "utf-8")
    gathered = Gathered(package, licence, dict(rows.documents), dict(rows.utf8_bytes), num_undecodable)
    arriving = account.with_suffix(".arriving")
    arriving.write_text(json.dumps(dataclasses.asdict(gathered)), "utf-8")
    arriving.replace(account)
    return gathered


class _RowFiles:
    """Writes rows to one file per source; they have their names when they are closed."""

    def __init__(self, directory: pathlib.Path, name: str):
        self._directory = directory
        self._name = name
        self._files = {}
        self.documents = collections.Counter()
        self.utf8_bytes = collections.Counter()

    def write(self, source: str, text: str, path: str) -> None:
        if source not in self._files:
            (self._directory / source).mkdir(parents=True, exist_ok=True)
            arriving = self._directory / source / f"{self._name}.jsonl.arriving"
            self._files[source] = arriving.open("w", encoding="utf-8")
        self._files[source].write(json.dumps({"text": text, "path": path}, ensure_ascii=False) + "\n")
        self.documents[source] += 1
        self.utf8_bytes[source] += len(text.encode())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
            pathlib.Path(file.name).replace(file.name.removesuffix(".arriving"))


def files_of(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Gives path and content of every file in a .deb or .whl file.

    Raises:
      ValueError: the file is no such package.
    """
    if archive.suffix == ".whl":
        try:
            with zipfile.ZipFile(archive) as wheel:
                for entry in wheel.infolist():
                    if not entry.is_dir():
                        yield entry.filename, wheel.read(entry)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{archive}: not a wheel ({error}); remove it and gather again") from error
        return
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for entry in tar:
                    if entry.isfile():
                        yield entry.name.removeprefix("./"), tar.extractfile(entry).read()
        except tarfile.TarError as error:
            said = process.stderr.read().decode(errors="replace").strip()
            raise ValueError(
                f"{archive}: not a Debian package ({said or error}); remove it and gather again"
            ) from error


def split_long(text: str, max_bytes: int) -> Iterator[str]:
    """Cuts a text into pieces of at most max_bytes of UTF-8: at an empty line where there is one, else at a line's end.

    A single longer line stays whole.
    """
    piece, num_bytes, blank = [], 0, 0  # blank: lines of the piece up to its last empty one
    for line in text.splitlines(keepends=True):
        size = len(line.encode())
        if piece and num_bytes + size > max_bytes:
            cut = blank if 2 * blank > len(piece) else len(piece)
            yield "".join(piece[:cut])
            piece = piece[cut:]
            num_bytes, blank = sum(len(kept.encode()) for kept in piece), 0
        piece.append(line)
        num_bytes += size
        if line.isspace():
            blank = len(piece)
    if piece:
        yield "".join(piece)


def read_licence(package: Package, archive: pathlib.Path) -> tuple[str, str]:
    """Gives the short names of a package's licences, and its licence files."""
    names, texts = [], []
    for path, data in files_of(archive):
        name = pathlib.PurePosixPath(path).name
        text = data.decode("utf-8", errors="replace")
        if path == f"usr/share/doc/{package.name}/copyright":
            names += re.findall(r"^License:[ \t]*(\S.*?)\s*$", text, re.M)
            texts.append(text)
        elif path.endswith(".dist-info/METADATA"):
            names += _licences_of_metadata(text)
        elif ".dist-info/" in path and any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in _LICENCE_FILES):
            texts.append(f"{path}\n\n{text}")
    short = ", ".join(dict.fromkeys(" ".join(name.split()) for name in names if len(name) <= 40))
    return short or f"as {package.name}", "\n\n".join(texts)


def _licences_of_metadata(text: str) -> list[str]:
    header = text.split("\n\n", 1)[0]
    names = re.findall(r"^License-Expression: (.*)$", header, re.M)
    names = names or re.findall(r"^Classifier: License :: (?:OSI Approved :: )?(.*)$", header, re.M)
    return names or re.findall(r"^License: (.*)$", header, re.M)


def _chosen_files(package: Package, archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    for path, data in files_of(archive):
        is_included = any(fnmatch.fnmatchcase(path, pattern) for pattern in package.include)
        if is_included and not any(fnmatch.fnmatchcase(path, pattern) for pattern in package.exclude):
            yield path, data


def _text_of(path: str, data: bytes) -> str | None:
    """Decodes a file and takes its markup away; None if its encoding is not known or it is no text."""
    if path.endswith((".gz", ".dz")):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error):
            return None
    text = markup.decode(data)
    if text is None or "\0" in text:
        return None
    return markup.html_to_text(text) if markup.is_markup(data) else text


def _source_of(path: str, package: Package, source_of_language: dict[str, str]) -> str:
    found = re.search(package.language_pattern, path)
    require(found, f"package {package.name} language_pattern", package.language_pattern, f"finds no language in {path}")
    code = found.group(1)
    language = "en" if code == "C" else re.split("[-_@]", code)[0]
    source = source_of_language.get(language) or source_of_language.get("mixed")
    require(source, f"package {package.name} language", language, 'has no source; add one whose language is "mixed"')
    return source
