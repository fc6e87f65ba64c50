"""Text out of software packages: Debian's and PyPI's carry manuals, sources and proofs in many languages.

A list of packages (configs/corpora/) pins every one by version and SHA-256. Gathering downloads them with the
registries' own clients, apt-get and pip, takes their text, and writes rows that a recipe of sources names, with the
licences beside them. The text stays with its licences: what is published is the list.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence

from dsv3_jax.config import require
from dsv3_jax.data import package_text
from dsv3_jax.data.package_text import Gathered, Package

SUFFIXES = {"debian": ".deb", "pypi": ".whl"}
REGISTRIES = tuple(SUFFIXES)
DEBIAN_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"  # of package debian-archive-keyring


@dataclasses.dataclass(frozen=True)
class PackageList:
    """What a list of packages says."""

    mirror: str  # of Debian
    suite: str
    sources: dict[str, dict]  # name -> weight, kind, language
    packages: tuple[Package, ...]


def load_package_list(path: str | pathlib.Path) -> PackageList:
    """Reads a list of packages.

    Raises:
      ValueError: no such file, no TOML, or an entry that is wrong; names it.
    """
    path = pathlib.Path(path)
    require(path.is_file(), "packages", str(path), "is no file; name a list such as configs/corpora/packages.toml")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"packages {path}: not TOML ({error}); correct it") from error
    missing = sorted({"debian", "source", "package"} - table.keys())
    require(not missing, f"packages {path} tables", missing, "are missing")
    sources = {source["name"]: source for source in table["source"]}
    fields = {field.name: field for field in dataclasses.fields(Package)}
    packages = []
    for entry in table["package"]:
        place = f"packages {path}, {entry.get('name', 'a package without a name')}"
        unknown = sorted(entry.keys() - fields.keys())
        require(not unknown, f"{place} fields", unknown, f"are unknown; there are {', '.join(fields)}")
        lacking = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in entry]
        require(not lacking, f"{place} fields", lacking, "are missing")
        package = Package(**{n: tuple(v) if isinstance(v, list) else v for n, v in entry.items()})
        require(package.registry in REGISTRIES, f"{place} registry", package.registry, f"is none of {REGISTRIES}")
        require(bool(package.source) != bool(package.language_pattern), f"{place} source", package.source,
                "give either source or language_pattern")  # fmt: skip
        require(not package.source or package.source in sources, f"{place} source", package.source,
                f"is none of {', '.join(sources)}")  # fmt: skip
        packages.append(package)
    return PackageList(table["debian"]["mirror"], table["debian"]["suite"], sources, tuple(packages))


def gather(
    package_list: PackageList,
    directory: str | pathlib.Path,
    *,
    registries: Sequence[str],
    num_workers: int,
    on_package: Callable[[Gathered], None],
) -> list[Gathered]:
    """Downloads packages and writes their text, one file of rows per package and source, and recipe.toml at the end.

    Files that are whole are not made again: what was stopped goes on where it was.

    Args:
      package_list: what to gather.
      directory: where to write to: <source>/<package>.jsonl, recipe.toml, packages.json, licences/, downloads/.
      registries: which of REGISTRIES to gather from.
      num_workers: processes that take text out of packages.
      on_package: called with every package that is done.

    Raises:
      ValueError: a client is missing, or a package cannot be had or is not what the list pins; names it.
    """
    directory = pathlib.Path(directory)
    packages = [package for package in package_list.packages if package.registry in registries]
    require(packages, "registries", list(registries), f"choose none of the packages; there are {', '.join(REGISTRIES)}")
    source_of_language = {source["language"]: name for name, source in package_list.sources.items()}
    archives = download(packages, directory / "downloads", package_list)
    done = {}
    with concurrent.futures.ProcessPoolExecutor(num_workers) as pool:
        futures = [
            pool.submit(package_text.write_text, package, archives[package], directory, source_of_language)
            for package in packages
        ]
        for future in concurrent.futures.as_completed(futures):
            gathered = future.result()
            done[gathered.package] = gathered
            on_package(gathered)
    results = [done[package] for package in packages]
    _write_recipe(directory, package_list, results)
    return results


def download(
    packages: Sequence[Package], directory: pathlib.Path, package_list: PackageList
) -> dict[Package, pathlib.Path]:
    """Downloads the packages that are not there yet, and returns the file of each.

    Raises:
      ValueError: a client is missing or says no, or a package is not what the list pins; names it.
    """
    files = {
        package: directory / f"{package.name}-{package.sha256[:16]}{SUFFIXES[package.registry]}" for package in packages
    }
    for registry in REGISTRIES:
        arriving = directory / f"{registry}.arriving"
        arriving.mkdir(parents=True, exist_ok=True)
        _take_what_arrived(arriving, files)
        missing = [package for package in packages if package.registry == registry and not files[package].exists()]
        if missing:
            if registry == "debian":
                command = [*_apt_get(directory, package_list), "download", *(f"{p.name}={p.version}" for p in missing)]
            else:
                command = [*_pip(), "download", "--no-deps", "--ignore-requires-python", "--only-binary=:all:",
                           "--quiet", *(f"{p.name}=={p.version}" for p in missing)]  # fmt: skip
            _run(command, arriving, f"{len(missing)} packages of {registry}")
            _take_what_arrived(arriving, files)
        wrong = [f"{package.name} {package.version}" for package in missing if not files[package].exists()]
        require(not wrong, f"packages of {registry}", wrong, f"have another sha256 than the list pins; {arriving} "
                "holds what the registry gave; correct the list")  # fmt: skip
    return files


def _take_what_arrived(arriving: pathlib.Path, files: dict[Package, pathlib.Path]) -> None:
    """Moves the files that have a pinned hash to their places."""
    place = {package.sha256: path for package, path in files.items()}
    for arrived in arriving.iterdir():
        if arrived.suffix in SUFFIXES.values():
            with arrived.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest in place:
                arrived.rename(place[digest])


def _apt_get(directory: pathlib.Path, package_list: PackageList) -> list[str]:
    """Gives apt-get with lists of its own: any Debian or Ubuntu gets the pinned versions, and needs no root."""
    require(shutil.which("apt-get") and shutil.which("dpkg-deb"), "apt-get", None,
            "is not on this machine; gather from --registry=pypi alone")  # fmt: skip
    state = (directory / "apt").resolve()
    sources = state / "sources.list"
    line = f"deb [signed-by={DEBIAN_KEYS}] {package_list.mirror} {package_list.suite} main\n"
    options = {
        "Dir::State": state,
        "Dir::State::status": "/dev/null",
        "Dir::Cache": state / "cache",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    if not sources.exists() or sources.read_text() != line:
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        unread = state / "sources.list.arriving"
        unread.write_text(line)
        listing = [option.replace(str(sources), str(unread)) for option in command]
        _run([*listing, "update"], state, f"list of packages of {package_list.mirror} {package_list.suite}")
        unread.rename(sources)
    return command


def _pip() -> list[str]:
    for python in (sys.executable, "python3"):
        command = [python, "-m", "pip"]
        if shutil.which(python) and subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
            return command
    raise ValueError("pip is in neither this environment nor python3; install it (python3 -m ensurepip)")


def _run(command: list[str], directory: pathlib.Path, what: str) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        said = " ".join((result.stderr or result.stdout).split())[-500:]
        raise ValueError(f"{what}: {command[0]} failed ({said}); check the network, or the versions in the list")


def _write_recipe(directory: pathlib.Path, package_list: PackageList, results: list[Gathered]) -> None:
    """Writes packages.json and, last, recipe.toml: it names what is whole."""
    _write_whole(directory / "packages.json", json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    tables = []
    for name, source in package_list.sources.items():
        parts = [result for result in results if result.documents.get(name)]
        if not parts:
            continue
        licences = dict.fromkeys(licence for part in parts for licence in part.licence.split(", "))
        table = {"name": name, "paths": [f"{name}/{part.package.name}.jsonl" for part in parts]} | {
            key: source[key] for key in ("weight", "kind", "language")
        }
        table["licence"] = ", ".join(licences) + "; texts in licences/"
        tables.append("[[source]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    _write_whole(directory / "recipe.toml", "\n".join(tables))


def _write_whole(path: pathlib.Path, text: str) -> None:
    arriving = path.with_name(path.name + ".arriving")
    arriving.write_text(text, "utf-8")
    arriving.replace(path)
