"""Sources of text: what a recipe names, and the units of work that its files make.

A recipe is a TOML file of `[[source]]` tables:

    [[source]]
    name = "english"                         # names its token files
    paths = ["english", "more/*.jsonl.zst"]  # files, directories, globs, installed, hf:NAME[:CONFIG[:SPLIT]]
    weight = 0.3                             # share of the training windows, relative to the other sources
    kind = "text"                            # code, text, math, ...
    language = "en"
    text_field = "text"                      # of rows; "" if the record itself is the text
    licence = "GPL-2.0-or-later"

Units come in the order of their names' hashes, and the paths of a source take turns: a byte budget then cuts all of a
source alike, and neighbours in the packed corpus are unrelated.
"""

import collections
import dataclasses
import fnmatch
import glob
import hashlib
import itertools
import math
import os
import pathlib
import re
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence

from dsv3_jax.config import require
from dsv3_jax.data import readers
from dsv3_jax.data.readers import Unit

INSTALLED = "installed"  # the text that every machine has: the standard library and the installed packages
HUGGING_FACE = "hf:"
UNIT_BYTES = 32_000_000  # larger files of rows become several units where their format allows, bytes

PROSE_SUFFIXES = (".adoc", ".md", ".org", ".pod", ".rst", ".tex", ".txt")
CODE_SUFFIXES = (
    ".agda", ".c", ".cc", ".clj", ".coffee", ".cpp", ".cs", ".css", ".cu", ".d", ".dart", ".el", ".erl", ".ex", ".f90",
    ".fs", ".g", ".go", ".h", ".hpp", ".hrl", ".hs", ".java", ".jl", ".js", ".kt", ".lean", ".lisp", ".lua", ".m",
    ".ml", ".mli", ".mm", ".php", ".pl", ".pm", ".proto", ".ps1", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".scala",
    ".scm", ".sh", ".sql", ".swift", ".tcl", ".ts", ".tsx", ".v", ".vhd", ".vim", ".zig",
)  # fmt: skip
SUFFIXES_IN_DIRECTORIES = (*PROSE_SUFFIXES, *CODE_SUFFIXES, *readers.FORMAT_OF_SUFFIX)
SUFFIXES_IN_INSTALLED = (".py", ".md", ".rst", ".txt")
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")  # the same few texts in every package
SKIPPED_DIRECTORIES = ("__pycache__", ".*")
SKIPPED_IN_INSTALLED = (*SKIPPED_DIRECTORIES, "test", "tests", "site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True)
class Source:
    """Text of one kind, mixed into training by its weight."""

    name: str  # lower case letters, digits, - and _
    paths: tuple[str, ...]  # files, directories, globs, `installed`, hf:NAME[:CONFIG[:SPLIT]]
    weight: float  # share of the training windows, relative to the other sources
    kind: str  # code, text, math, ...
    language: str  # of people or of programming; "mixed" for many
    text_field: str = "text"  # field of a row that holds its text
    licence: str = ""

    def __post_init__(self):
        field = f"source {self.name!r}"
        require(re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name), "source name", self.name,
                "names files: use lower case letters, digits, - and _")  # fmt: skip
        require(self.paths, f"{field} paths", list(self.paths), f"name files, directories, globs, or {INSTALLED!r}")
        require(all(self.paths), f"{field} paths", list(self.paths), "one of them is empty; remove it")
        require(math.isfinite(self.weight) and self.weight >= 0, f"{field} weight", self.weight,
                "must be 0 or more")  # fmt: skip
        require(self.kind, f"{field} kind", self.kind, "must not be empty; say code, text, math, ...")
        require(self.language, f"{field} language", self.language, "must not be empty; say en, python, mixed, ...")


def load_recipe(path: str | pathlib.Path) -> tuple[Source, ...]:
    """Reads the sources of a TOML recipe. Relative paths in it start at the recipe's directory.

    Raises:
      ValueError: no such file, no TOML, or a table that makes no source; names file, table, field, value and fix.
    """
    path = pathlib.Path(path)
    require(path.is_file(), "recipe", str(path), "is no file; name a TOML file with [[source]] tables")
    try:
        recipe = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not TOML ({error}); correct it") from error
    tables = recipe.pop("source", None)
    require(not recipe, f"recipe {path} keys", sorted(recipe), "are unknown; only [[source]] tables belong here")
    require(isinstance(tables, list) and tables, f"recipe {path} source", tables, "write one [[source]] table or more")
    sources = tuple(_source_of_table(table, f"recipe {path}, source {i}", path) for i, table in enumerate(tables, 1))
    require_usable(sources)
    return sources


def source_of_paths(paths: Sequence[str]) -> Source:
    """Makes one source of files, directories and globs named without a recipe."""
    is_installed = tuple(paths) == (INSTALLED,)
    return Source(
        name=INSTALLED if is_installed else "given",
        paths=tuple(paths),
        weight=1.0,
        kind="code" if is_installed else "text",
        language="python" if is_installed else "mixed",
        licence="as the packages installed here" if is_installed else "",
    )


def require_usable(sources: Sequence[Source]) -> None:
    """Raises a ValueError unless there are sources, each with its own name, and their weights can be shares."""
    require(sources, "sources", [], f"name files, directories, globs, or {INSTALLED!r}")
    repeated = [name for name, count in collections.Counter(source.name for source in sources).items() if count > 1]
    require(not repeated, "source names", repeated, "are given more than once; rename all but one")
    total = sum(source.weight for source in sources)
    require(total > 0, "weights", [source.weight for source in sources],
            "sum to 0: nothing would be trained on; give one source a weight above 0")  # fmt: skip


def list_units(source: Source) -> tuple[Unit, ...]:
    """Lists the units of a source, in an order that depends on nothing but their names.

    Raises:
      ValueError: a path that matches nothing, a Parquet or ArrayRecord file that is none or lacks the text field, or
        a library is missing.
      OSError: a directory, or a file that was named itself, cannot be read.
    """
    by_path = []
    for path in source.paths:
        if path == INSTALLED:
            by_path += _installed_files(source)
        elif path.startswith(HUGGING_FACE):
            by_path.append(_hugging_face_units(source, path))
        else:
            by_path.append(_given_files(source, path))
    for units in by_path:
        units.sort(key=lambda unit: (hashlib.sha256(unit.name.encode("utf-8", "surrogateescape")).digest(), unit.path))
    turns = itertools.zip_longest(*by_path)
    files = _with_own_names(unit for turn in turns for unit in turn if unit is not None)
    return tuple(part for file in files for part in readers.parts(file, target_bytes=UNIT_BYTES))


def _source_of_table(table: object, place: str, recipe: pathlib.Path) -> Source:
    require(isinstance(table, dict), place, table, "must be a table")
    fields = {field.name: field for field in dataclasses.fields(Source)}
    unknown = sorted(table.keys() - fields.keys())
    require(not unknown, f"{place} fields", unknown, f"are unknown; there are {', '.join(fields)}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in table]
    require(not missing, f"{place} fields", missing, "are missing; add them")
    for name, value in table.items():
        if name == "paths":
            is_valid, wanted = isinstance(value, list) and all(isinstance(p, str) for p in value), "a list of strings"
        elif name == "weight":
            is_valid, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
        else:
            is_valid, wanted = isinstance(value, str), "a string"
        require(is_valid, f"{place} {name}", value, f"must be {wanted}")
    paths = tuple(_below(recipe.parent, path) for path in table["paths"])
    try:
        return Source(**table | {"paths": paths, "weight": float(table["weight"])})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _below(directory: pathlib.Path, path: str) -> str:
    is_no_path = path == INSTALLED or path.startswith(HUGGING_FACE) or not path
    return path if is_no_path else str(directory / path)


def _installed_files(source: Source) -> list[list[Unit]]:
    roots = {name: pathlib.Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    if roots["platlib"] == roots["purelib"]:
        del roots["platlib"]
    return [
        [
            _file(source, f"{INSTALLED}/{name}/{path.relative_to(root).as_posix()}", path, is_named=False)
            for path in _walk(root, SKIPPED_IN_INSTALLED)
            if _is_prose_or_code(path)
        ]
        for name, root in roots.items()
    ]


def _is_prose_or_code(path: pathlib.Path) -> bool:
    if path.parent.suffix in (".dist-info", ".egg-info") or path.parent.parent.suffix == ".dist-info":
        return path.name in ("METADATA", "PKG-INFO")  # they hold the package's README
    return path.suffix in SUFFIXES_IN_INSTALLED and not _matches(path.name.upper(), LICENCES)


def _given_files(source: Source, given: str) -> list[Unit]:
    path = pathlib.Path(given)
    place = f"source {source.name!r} path"
    if path.is_dir():
        root = path
        found = [p for p in _walk(path, SKIPPED_DIRECTORIES) if p.name.lower().endswith(SUFFIXES_IN_DIRECTORIES)]
        require(found, place, given, "has no file of text, code or rows that is known by its suffix; "
                "give a glob for other kinds")  # fmt: skip
    elif path.exists() or path.is_symlink():
        return [_file(source, path.name, path, is_named=True)]
    else:
        root = _root_of_glob(path)
        found = [pathlib.Path(p) for p in glob.glob(given, recursive=True) if pathlib.Path(p).is_file()]
        require(found, place, given, "matches no file; check the path")
    prefix = root.resolve().name
    return [_file(source, f"{prefix}/{p.relative_to(root).as_posix()}", p, is_named=False) for p in found]


def _root_of_glob(pattern: pathlib.Path) -> pathlib.Path:
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    return pathlib.Path(*parts)


def _file(source: Source, name: str, path: pathlib.Path, *, is_named: bool) -> Unit:
    try:
        num_bytes = path.stat().st_size
    except OSError:
        if is_named:
            raise
        num_bytes = 0  # counted as unreadable when it is read
    format = readers.format_of(path.name)
    return Unit(source.name, name, str(path), format, num_bytes, source.text_field, is_named=is_named)


def _walk(root: pathlib.Path, skipped_directories: Sequence[str]) -> Iterator[pathlib.Path]:
    for directory, subdirectories, files in os.walk(root, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if not _matches(name, skipped_directories)]
        yield from (pathlib.Path(directory, name) for name in files)


def _raise(error: OSError) -> None:
    raise error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _with_own_names(units: Iterator[Unit]) -> Iterator[Unit]:
    """Numbers the names that several files share, so that every document has an id of its own."""
    seen = collections.Counter()
    for unit in units:
        seen[unit.name] += 1
        number = seen[unit.name]
        yield unit if number == 1 else dataclasses.replace(unit, name=f"{unit.name}~{number}")


def _hugging_face_units(source: Source, path: str) -> list[Unit]:
    name = path.removeprefix(HUGGING_FACE)
    dataset = readers.open_hugging_face(name)
    num_shards = dataset.num_shards
    return [
        Unit(source.name, f"{path}#{shard}", name, "hf", 0, source.text_field, shard, num_shards, is_named=True)
        for shard in range(num_shards)
    ]
