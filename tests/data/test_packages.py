"""Text out of packages: which files, whose licence, and what happens when a registry brings something else."""

import gzip
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import zipfile

import pytest

from dsv3_jax.data import markup, package_text, packages, sources
from dsv3_jax.data.package_text import Package

LONG = "A sentence that is long enough to be kept, and says nothing else. " * 4
PAGE = f"<!DOCTYPE html><html><head><title>no</title></head><body><nav>no</nav><p>{LONG}</p></body></html>"
METADATA = "Metadata-Version: 2.1\nName: tiny\nLicense-Expression: MIT\n\n" + LONG


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "registry" / "tiny-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny/code.py", f"x = '''{LONG}'''\n")
        file.writestr("tiny/stub.py", "x = 1\n")
        file.writestr("tiny/skipped.py", LONG)
        file.writestr("tiny/data.bin", b"\0" * 300)
        file.writestr("tiny/latin1.py", LONG.replace("e", "é").encode("latin-1"))
        file.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        file.writestr("tiny-1.0.dist-info/licenses/LICENSE", "Permission is hereby granted")
    return path


@pytest.fixture
def deb(tmp_path):
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not on this machine")
    root = tmp_path / "deb"
    files = {
        "DEBIAN/control": "Package: manual\nVersion: 1\nArchitecture: all\nMaintainer: M <m@x>\nDescription: d\n",
        "usr/share/doc/manual/copyright": "Files: *\nLicense: GPL-2+\n text\n\nLicense: MIT\n",
        "usr/share/doc/manual/de-DE/a.html": PAGE.replace("sentence", "Sätze"),
        "usr/share/doc/manual/en-US/a.html": PAGE,
        "usr/share/doc/manual/sv-SE/a.html": PAGE,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    path = tmp_path / "registry" / "manual_1_all.deb"
    path.parent.mkdir(exist_ok=True)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, path], check=True, capture_output=True)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def package_list(tmp_path, wheel, deb, **replacements):
    text = f"""
[debian]
mirror = "http://mirror"
suite = "stable"
[[source]]
name = "python"
weight = 0.5
kind = "code"
language = "python"
[[source]]
name = "english"
weight = 0.3
kind = "text"
language = "en"
[[source]]
name = "others"
weight = 0.2
kind = "text"
language = "mixed"
[[package]]
registry = "pypi"
name = "tiny"
version = "1.0"
sha256 = "{sha256(wheel)}"
source = "python"
include = ["*.py", "*/METADATA"]
exclude = ["*/skipped.py"]
[[package]]
registry = "debian"
name = "manual"
version = "1"
sha256 = "{sha256(deb)}"
language_pattern = "/manual/([a-z]+)-"
include = ["*.html"]
"""
    for old, new in replacements.items():
        text = text.replace(old, new)
    path = tmp_path / "packages.toml"
    path.write_text(text)
    return packages.load_package_list(path)


@pytest.fixture
def registries(tmp_path, monkeypatch):
    """Puts clients in place that copy from a directory, and counts their calls."""
    directory, calls = tmp_path / "registry", tmp_path / "calls"
    binaries = tmp_path / "bin"
    binaries.mkdir()
    script = (
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *update*) ;; *download*) cp {directory}/*.SUFFIX . ;; esac\n'
    )
    for name, suffix in (("apt-get", "deb"), ("fake-pip", "whl")):
        (binaries / name).write_text(script.replace("SUFFIX", suffix))
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setattr(packages, "_pip", lambda: ["fake-pip"])
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def gather(listed, directory, **changes):
    arguments = {"registries": packages.REGISTRIES, "num_workers": 1, "on_package": lambda gathered: None}
    return packages.gather(listed, directory, **arguments | changes)


def rows(path):
    return {row["path"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def test_packages_become_sources_with_their_licences(tmp_path, wheel, deb, registries):
    output = tmp_path / "raw"
    python, manual = gather(package_list(tmp_path, wheel, deb), output)
    assert (python.licence, manual.licence) == ("MIT", "GPL-2+, MIT")
    assert python.num_undecodable == 1
    assert set(rows(output / "python/tiny.jsonl")) == {"tiny/code.py", "tiny-1.0.dist-info/METADATA"}
    assert rows(output / "english/manual.jsonl") == {"usr/share/doc/manual/en-US/a.html": LONG.strip() + "\n"}
    german = rows(output / "others/manual.jsonl")["usr/share/doc/manual/de-DE/a.html"]
    assert german == LONG.strip().replace("sentence", "Sätze") + "\n"
    assert manual.documents == {"english": 1, "others": 2}
    recipe = {source.name: source for source in sources.load_recipe(output / "recipe.toml")}
    assert {name: source.weight for name, source in recipe.items()} == {"python": 0.5, "english": 0.3, "others": 0.2}
    assert recipe["others"].paths == (str(output / "others/manual.jsonl"),)
    assert recipe["others"].licence.startswith("GPL-2+, MIT")
    texts = "".join(path.read_text() for path in (output / "licences").glob("*.txt"))
    assert "Permission is hereby granted" in texts
    assert "License: GPL-2+" in texts


def test_what_is_done_is_not_done_again(tmp_path, wheel, deb, registries, monkeypatch):
    output = tmp_path / "raw"
    listed = package_list(tmp_path, wheel, deb)
    first = gather(listed, output)
    calls = registries()
    assert len(calls) == 3  # apt-get update, apt-get download, pip download
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl")}
    assert gather(listed, output) == first
    assert registries() == calls
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl")} == files
    changed = package_list(tmp_path, wheel, deb, **{'exclude = ["*/skipped.py"]\n': ""})
    gather(changed, output)
    assert "tiny/skipped.py" in rows(output / "python/tiny.jsonl")


def test_one_registry_alone(tmp_path, wheel, deb, registries):
    (python,) = gather(package_list(tmp_path, wheel, deb), tmp_path / "raw", registries=["pypi"])
    assert python.package.name == "tiny"
    assert [source.name for source in sources.load_recipe(tmp_path / "raw/recipe.toml")] == ["python"]
    assert len(registries()) == 1


def test_a_package_with_another_hash_is_refused_and_no_recipe_is_written(tmp_path, wheel, deb, registries):
    listed = package_list(tmp_path, wheel, deb, **{sha256(wheel): "0" * 64})
    with pytest.raises(ValueError, match=r"packages of pypi=\['tiny 1.0'\]: have another sha256"):
        gather(listed, tmp_path / "raw")
    assert not (tmp_path / "raw/recipe.toml").exists()


def test_what_a_client_says_is_passed_on(tmp_path, wheel, deb, registries):
    (tmp_path / "bin/fake-pip").write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"1 packages of pypi: fake-pip failed \(no such version\)"):
        gather(package_list(tmp_path, wheel, deb), tmp_path / "raw", registries=["pypi"])


def test_a_damaged_package_is_named(tmp_path):
    for name in ("a.whl", "a.deb"):
        path = tmp_path / name
        path.write_bytes(b"none")
        if name.endswith(".deb") and not shutil.which("dpkg-deb"):
            continue
        with pytest.raises(ValueError, match=rf"{name}: not a"):
            list(package_text.files_of(path))


def test_an_include_that_matches_nothing_is_refused(tmp_path, wheel):
    package = Package("pypi", "tiny", "1.0", sha256(wheel), include=("*.rs",), source="python")
    with pytest.raises(ValueError, match=r"package tiny include=\['\*\.rs'\]"):
        package_text.write_text(package, wheel, tmp_path, {})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "python"', 'source = "ruby"', r"tiny source='ruby': is none of python"),
        ('source = "python"', "", r"tiny source='': give either"),
        ('registry = "pypi"', 'registry = "npm"', r"tiny registry='npm'"),
        ('version = "1.0"', 'verzion = "1.0"', r"tiny fields=\['verzion'\]: are unknown"),
        ('version = "1.0"', "", r"tiny fields=\['version'\]: are missing"),
        ("[debian]", "[ubuntu]", r"tables=\['debian'\]: are missing"),
        ("[debian]", "[debian", r"not TOML"),
    ],
)
def test_errors_in_a_list_name_the_package_and_the_field(tmp_path, wheel, deb, old, new, message):
    with pytest.raises(ValueError, match=message):
        package_list(tmp_path, wheel, deb, **{old: new})


def test_the_lists_that_are_shipped_are_whole():
    for path in sorted((pathlib.Path(__file__).parents[2] / "configs/corpora").glob("*.toml")):
        listed = packages.load_package_list(path)
        assert len({package.name for package in listed.packages}) == len(listed.packages) > 10
        assert all(len(package.sha256) == 64 and package.version for package in listed.packages)
        assert sum(source["weight"] for source in listed.sources.values()) == pytest.approx(1)


def test_long_texts_are_cut_between_lines_and_lose_nothing():
    text = "".join(f"line {i}\n" + ("\n" if i % 10 == 9 else "") for i in range(1000)) + "é" * 500
    for max_bytes in (100, 256, 5000, 10**6):
        pieces = list(package_text.split_long(text, max_bytes))
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= max_bytes or "\n" not in piece.rstrip("\n") for piece in pieces)
        assert len(pieces) < 2.5 * len(text.encode()) / max_bytes + 2
    pieces = list(package_text.split_long(text, 256))
    assert sum(piece.endswith("\n\n") for piece in pieces) > 0.9 * len(pieces)


def test_markup_goes_and_what_a_reader_sees_stays():
    page = """<?xml version="1.0"?><!DOCTYPE html>
        <html><head><title>no</title><script>no()</script></head><body><nav><ul><li>no</ul></nav>
        <div class="toc x">no<div>no</div>no</div><h1>Title <em>one</em></h1>
        <img class="toc"><p>Some
           text&nbsp;&amp; more &#x2014; <a href="x">link</a>.<br/>Next line</p>
        <pre>if x:\n    y &lt; 1\n</pre><script src="a.js"/><ul><li>item<li>other</ul></body></html>"""
    assert markup.is_markup(page.encode())
    expected = "Title one\n\nSome text & more — link.\nNext line\n\nif x:\n    y < 1\n\nitem\nother\n"
    assert markup.html_to_text(page).replace("\xa0", " ") == expected


def test_bytes_are_decoded_as_they_say():
    page = '<html><meta charset="koi8-r"><p>Привет</p></html>'
    assert markup.decode(page.encode("koi8-r")) == page
    assert markup.decode("Zwölf".encode()) == "Zwölf"
    assert markup.decode("Zwölf".encode("latin-1")) is None
    assert markup.decode(b'<meta charset="nonsense">\xff') is None


def test_compressed_files_in_packages_are_read():
    assert package_text._text_of("a.txt.gz", gzip.compress(LONG.encode())) == LONG
    assert package_text._text_of("a.txt.gz", gzip.compress(LONG.encode())[:-9]) is None
    assert package_text._text_of("a.txt", b"\0" * 1000) is None
